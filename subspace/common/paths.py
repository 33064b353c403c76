"""Where this project's own files lie on this machine, in a checkout of the repository or as an installed package.

Declarations, engine files and recipes lie at the top of the repository. An installed package carries them in
``subspace/resources``, where links lead to them in a checkout, so that both are built from the same files.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

PACKAGE = Path(__file__).resolve().parent.parent
#: The folder that Python imports the package from: the repository in a checkout, else ``site-packages``.
REPOSITORY = PACKAGE.parent

# Top-level folders of the repository, and what an installed package calls them.
_RESOURCES = {"data": "data", "ds_configs": "engines", "launch/recipes": "recipes"}


def checkout() -> Path | None:
    """Return the repository that the package is run from, or None for an installed package."""
    parts = (REPOSITORY / "pyproject.toml", *map(REPOSITORY.joinpath, _RESOURCES))
    return REPOSITORY if all(part.exists() for part in parts) else None


def declarations_folder() -> Path:
    """Return the folder of the declarations of tasks, mixtures and models: ``$SUBSPACE_DATA``, else ``data``."""
    return Path(os.environ.get("SUBSPACE_DATA") or _resource("data"))


def engines_folder() -> Path:
    """Return the folder of DeepSpeed's configurations: ``ds_configs`` in a checkout."""
    return _resource("ds_configs")


def recipes_folder() -> Path:
    """Return the folder of the recipes: ``launch/recipes`` in a checkout."""
    return _resource("launch/recipes")


def find_resource(path: str | Path) -> Path | None:
    """Return the file that a path such as ``ds_configs/zero2.json`` names in the repository, wherever it lies now."""
    for name in _RESOURCES:
        if Path(path).is_relative_to(name) and (file := _resource(name) / Path(path).relative_to(name)).is_file():
            return file
    return None


def resource_name(file: Path) -> str | None:
    """Return how the repository names one of its files, as ``ds_configs/zero2.json``; None for any other file."""
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
    """Return the folder of weights' singular value decompositions: ``$SUBSPACE_SVD``, else ``svd`` in the cache."""
    return Path(os.environ.get("SUBSPACE_SVD") or cache_folder() / "svd")


def _resource(name: str) -> Path:
    repository = checkout()
    return repository / name if repository else PACKAGE / "resources" / _RESOURCES[name]
