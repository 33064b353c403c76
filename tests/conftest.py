"""What every test stands on: a quiet machine without a network, and tests that are left out where they cannot run."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch or transformers is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from subspace.common import paths
from subspace.common.progress import show_notices
from subspace.distributed.signals import STATUS_FILE


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what this machine cannot run; say how it could."""
    if "gpu" in item.keywords and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if "model" in item.keywords and not paths.cache_folder().is_dir():
        pytest.skip("needs the prepared model and data: subspace prepare")


@pytest.fixture(autouse=True, scope="session")
def own_decompositions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests' singular value decompositions, and the list of method files that they run, out of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("SUBSPACE_SVD", str(tmp_path_factory.mktemp("svd")))
        yield


@pytest.fixture(autouse=True, scope="session")
def notices() -> None:
    """Show what the package logs on standard error, as the command line does."""
    show_notices()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test the environment of a process that no launcher started; what a run sets goes away with it."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", STATUS_FILE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
