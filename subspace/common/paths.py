"""Locations of this project's own files, in a checkout of the repository or as an installed package.

Declarations, engine files and recipes are at the top of the repository. An installed package has them in
``subspace/resources``, which in a checkout holds links to them, so that both use the same files.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

PACKAGE = Path(__file__).resolve().parent.parent
#: The folder that contains the package: the repository in a checkout, else ``site-packages``.
REPOSITORY = PACKAGE.parent

# Top-level folders of the repository, and what an installed package calls them.
_RESOURCES = {"data": "data", "ds_configs": "engines", "launch/recipes": "recipes", "launch/studies": "studies"}


def checkout() -> Path | None:
    """Return the repository root in a checkout, or None for an installed package."""
    parts = (REPOSITORY / "pyproject.toml", *map(REPOSITORY.joinpath, _RESOURCES))
    return REPOSITORY if all(part.exists() for part in parts) else None


def declarations_folder() -> Path:
    """Return the folder of task, mixture and model declarations: ``$SUBSPACE_DATA``, else ``data``."""
    return Path(os.environ.get("SUBSPACE_DATA") or _resource("data"))


def engines_folder() -> Path:
    """Return the folder of DeepSpeed configurations: ``ds_configs`` in a checkout."""
    return _resource("ds_configs")


def recipes_folder() -> Path:
    """Return the folder of the recipes: ``launch/recipes`` in a checkout."""
    return _resource("launch/recipes")


def find_resource(path: str | Path) -> Path | None:
    """Return the file for a repository path such as ``ds_configs/zero2.json``, in a checkout or installed package."""
    for name in _RESOURCES:
        if Path(path).is_relative_to(name) and (file := _resource(name) / Path(path).relative_to(name)).is_file():
            return file
    return None


def resource_name(file: Path) -> str | None:
    """Return a file's repository path, such as ``ds_configs/zero2.json``; None for files outside the project."""
    for name in _RESOURCES:
        if file.is_relative_to(_resource(name)):
            return f"{name}/{file.relative_to(_resource(name))}"
    return None


def cache_folder() -> Path:
    """Return the folder of prepared models and data.

    That is ``$SUBSPACE_CACHE``, else ``data/cache`` in a checkout, else ``subspace`` in the user's cache folder.
    """
    if folder := os.environ.get("SUBSPACE_CACHE"):
        return Path(folder)
    repository = checkout()
    return repository / "data" / "cache" if repository else platformdirs.user_cache_path("subspace", appauthor=False)


def svd_cache_folder() -> Path:
    """Return the folder of cached SVDs of weights: ``$SUBSPACE_SVD``, else ``svd`` in the cache."""
    return Path(os.environ.get("SUBSPACE_SVD") or cache_folder() / "svd")


def nearest_existing(path: Path) -> Path:
    """Return the path if it exists, else the nearest folder above that does."""
    return path if path.exists() else nearest_existing(path.parent)


def _resource(name: str) -> Path:
    repository = checkout()
    return repository / name if repository else PACKAGE / "resources" / _RESOURCES[name]
