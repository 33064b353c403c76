"""Where things lie on this machine: the declarations that ship with the repository, and the cache of prepared files."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def declarations_folder() -> Path:
    """Return the folder of the declarations of tasks, mixtures and models: ``$SUBSPACE_DATA``, else ``data``."""
    return Path(os.environ.get("SUBSPACE_DATA") or REPOSITORY / "data")


def cache_folder() -> Path:
    """Return the folder of prepared models and data: ``$SUBSPACE_CACHE``, else ``data/cache`` beside the package."""
    return Path(os.environ.get("SUBSPACE_CACHE") or REPOSITORY / "data" / "cache")


def svd_cache_folder() -> Path:
    """Return the folder of weights' singular value decompositions: ``$SUBSPACE_SVD``, else ``svd`` in the cache."""
    return Path(os.environ.get("SUBSPACE_SVD") or cache_folder() / "svd")
