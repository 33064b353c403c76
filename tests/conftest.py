"""What every test stands on: a quiet machine without a network, and nothing that lies about on it.

A test runs in a folder of its own that shows the repository's launch/ and ds_configs/ and nothing else (no runs/), and
without the user's settings of this package, of launchers and of the hub. Processes that it starts import this checkout.
Prepared models and data are read from the real cache; what tests add to it goes to a folder of the session.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

#: What a launcher, a batch system or a user may have set, by how the name begins.
NOT_INHERITED = ("SLURM_", "HF_", "WANDB_", "TRANSFORMERS_", "SUBSPACE_DATA", "SUBSPACE_SVD")
for name in [name for name in os.environ if name.startswith(NOT_INHERITED)]:
    del os.environ[name]

# Before torch or transformers is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(Path(tempfile.gettempdir()) / "no-such-hub-cache")
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
os.environ["DS_ENV_FILE"] = "no-such-deepspeed-env"  # in place of ~/.deepspeed_env
# The device that everything asks for: see pytest_configure.
os.environ["DS_ACCELERATOR"] = "cpu"

import pytest
import torch

from subspace.common import paths
from subspace.common.progress import show_notices
from subspace.distributed.launcher import DETERMINISTIC_ENV
from subspace.distributed.peers import STATUS_FILE

#: Files of tests that take longest, first: with several workers, none of them is left for the end.
LONGEST_FIRST = [
    "distributed/test_zero.py",
    "distributed/test_signals.py",
    "training/test_resume_ranks.py",
    "long/test_matrix.py",
    "evaluation/test_evaluate.py",
    "planning/test_plan.py",
    "training/test_resume.py",
    "reporting/test_statistics.py",
    "fake_cuda/test_cuda.py",
    "evaluation/test_llm_adapters_published.py",
    "distributed/test_launcher.py",
    "launch/test_entry_points.py",
    "models/test_loading.py",
    "adapters/test_multi_adapter.py",
]


def pytest_configure(config: pytest.Config) -> None:
    """Choose the device of this session, and keep the order of :data:`LONGEST_FIRST` where workers get whole files.

    Every test but those that need a GPU runs on the CPU, whatever the machine has. Those have a session of their own,
    since DeepSpeed chooses its device once in a process: ``-m gpu``.
    """
    marks = config.option.markexpr
    if "gpu" in marks and "not gpu" not in marks:
        os.environ["DS_ACCELERATOR"] = "cuda"
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first, then those that start processes."""
    folder = Path(__file__).parent
    order = {str(folder / name): place for place, name in enumerate(LONGEST_FIRST)}
    starts = {str(item.path) for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: order.get(str(item.path), 99 if str(item.path) in starts else 100))


@pytest.fixture(autouse=True, scope="module")
def frozen_heap() -> None:
    """Take what has been imported out of the garbage collector, which DeepSpeed runs in full for every engine."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what this machine cannot run; say how it could."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("gpu") and os.environ["DS_ACCELERATOR"] != "cuda":
        pytest.skip("needs a session on the GPU: -m gpu")
    if item.get_closest_marker("model") and not (paths.cache_folder() / "models").is_dir():
        pytest.skip("needs the prepared model and data: subspace prepare")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many test functions passed: cases of one function are not counted as tests."""
    passed = [report.nodeid for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    functions = {nodeid.partition("[")[0] for nodeid in passed}
    terminalreporter.write_line(f"{len(functions)} test functions ({len(passed)} cases) passed")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Read prepared models and data from the real cache, and keep what tests write out of the user's folders."""
    real, own = paths.cache_folder().resolve(), tmp_path_factory.mktemp("cache")
    for name in ("models", "data", "downloads"):
        if (real / name).is_dir():
            (own / name).symlink_to(real / name)
    (own / "tokens").mkdir()
    for encoded in (real / "tokens").glob("*"):
        (own / "tokens" / encoded.name).symlink_to(encoded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBSPACE_CACHE", str(own))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))  # the list of method files that tests run
        yield


@pytest.fixture(autouse=True, scope="session")
def notices() -> None:
    """Show what the package logs on standard error, as the command line does."""
    show_notices()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give every test a folder without runs, and the environment of a process that no launcher started.

    What a run sets goes away with the test.
    """
    before = dict(os.environ)
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", STATUS_FILE)
    for name in (*launchers, "PYTORCH_ALLOC_CONF", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", *DETERMINISTIC_ENV):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path_factory.mktemp("cwd")
    for part in ("launch", "ds_configs"):
        (folder / part).symlink_to(paths.REPOSITORY / part)
    monkeypatch.chdir(folder)
    yield
    os.environ.clear()
    os.environ.update(before)
