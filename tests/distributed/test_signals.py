"""Real runs that are stopped, killed or hang: what they leave, what they say, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from subspace.adapters.serialization import TENSORS
from subspace.common.paths import REPOSITORY
from subspace.distributed.signals import SignalHandler
from subspace.errors import RunStopped
from subspace.training.checkpoint import checkpoints, find_corruption
from tests.helpers.material import logged, make_material

pytestmark = pytest.mark.processes

STEPS = 24


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


class Run:
    """``subspace train`` in processes of its own."""

    def __init__(self, material: Path, name: str, processes: int, *more: str) -> None:
        self.folder = material.parent / name
        settings = [
            f"runs={material.parent}",
            f"name={name}",
            f"train.steps={STEPS}",
            "train.micro_batch_size=2",
            *more,
        ]
        command = [sys.executable, "-m", "subspace", "train", str(material), *settings, "--processes", str(processes)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        self.first = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the processes that train, by rank."""
        family = [psutil.Process(self.first.pid), *psutil.Process(self.first.pid).children(recursive=True)]
        found = {}
        for process in family:
            with_rank = process.environ().get("RANK") if process.status() != psutil.STATUS_ZOMBIE else None
            if with_rank is not None:
                found[int(with_rank)] = process
        return found or {0: family[0]}

    def wait_for(self, step: int) -> None:
        """Wait until a step is done."""
        end = time.monotonic() + 400
        while self.first.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError, ValueError):  # not there yet, or a line half written
                if logged(self.folder, "step")[-1:] >= [step]:
                    return
            time.sleep(0.05)
        raise AssertionError(f"the run did not reach step {step}: {self.first.poll()}")

    def end(self) -> tuple[int, str]:
        """Wait for the end; return status and what was said on standard error."""
        family = psutil.Process(self.first.pid).children(recursive=True) if self.first.poll() is None else []
        _, said = self.first.communicate(timeout=400)
        psutil.wait_procs(family, timeout=10)
        assert [process for process in family if process.is_running()] == []
        return self.first.returncode, said


@pytest.fixture
def start(material: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(name: str, processes: int, *more: str) -> Run:
        runs.append(Run(material, name, processes, *more))
        return runs[-1]

    yield begin
    for run in runs:
        if run.first.poll() is None:
            for process in psutil.Process(run.first.pid).children(recursive=True):
                process.kill()
            run.first.kill()


@pytest.fixture(scope="module")
def whole(material: Path) -> Path:
    """The run that nobody disturbs."""
    run = Run(material, "whole", 2)
    status, said = run.end()
    assert status == 0, said
    return run.folder


def stopped_by(run: Run, number: signal.Signals) -> None:
    """Send a signal to a run and see it end with a checkpoint of the last step."""
    run.wait_for(5)
    run.first.send_signal(number)
    status, said = run.end()
    assert status == RunStopped.status == 75, said
    last = logged(run.folder, "step")[-1]
    assert said.splitlines()[-1].startswith(f"stopped: after step {last}, by a signal")
    assert "Traceback" not in said
    assert [path.name for path in checkpoints(run.folder)] == [f"step-{last:06d}"]


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGINT], ids=lambda number: number.name
)
def test_a_signal_makes_a_checkpoint(start: Callable[..., Run], number: signal.Signals) -> None:
    stopped_by(start(number.name, 2), number)


@pytest.mark.long
def test_a_stopped_run_goes_on_and_is_known_as_finished(start: Callable[..., Run], whole: Path) -> None:
    run = start("stopped", 2)
    stopped_by(run, signal.SIGUSR1)
    assert start("stopped", 2, "--resume").end()[0] == 0
    assert (run.folder / "adapter" / TENSORS).read_bytes() == (whole / "adapter" / TENSORS).read_bytes()
    assert logged(run.folder) == logged(whole)
    status, said = start("stopped", 2, "--resume").end()
    assert (status, said.splitlines()[-1]) == (0, f"{run.folder} is finished: there is nothing left to train")


def test_a_signal_to_a_run_of_one_process(start: Callable[..., Run]) -> None:
    run = start("one", 1)
    run.wait_for(5)
    run.first.send_signal(signal.SIGTERM)
    status, said = run.end()
    assert status == 75
    assert "stopped: after step" in said
    assert find_corruption(checkpoints(run.folder)[-1]) is None


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_killed_rank_ends_all_with_one_message(start: Callable[..., Run], rank: int) -> None:
    run = start(f"killed-{rank}", 2)
    run.wait_for(5)
    run.ranks()[rank].kill()
    killed = time.monotonic()
    status, said = run.end()
    assert time.monotonic() - killed < 30  # seconds, on a machine that does other things too
    assert status == 128 + signal.SIGKILL
    assert said.splitlines()[-1].startswith("error: a process of the run was ended by signal 9 (Killed)")
    assert "Traceback" not in said
    assert said.count("error:") == 1


@pytest.mark.long
def test_all_at_once_on_a_second_signal(start: Callable[..., Run]) -> None:
    run = start("twice", 2)
    run.wait_for(5)
    run.ranks()[1].suspend()  # so that no step ends any more
    run.first.send_signal(signal.SIGTERM)
    time.sleep(1)
    run.first.send_signal(signal.SIGTERM)
    assert run.end()[0] == 128 + signal.SIGTERM


@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_hang_is_reported_with_the_place_of_each_rank(start: Callable[..., Run], stopped: int) -> None:
    run, waits = start(f"hangs-{stopped}", 2, "train.hang_minutes=0.1"), 1 - stopped
    run.wait_for(5)
    run.ranks()[stopped].suspend()
    status, said = run.end()
    assert status == 1
    step = logged(run.folder, "step")[-1] + 1
    place = said.partition(f"rank {waits} of 2 has been in step {step} for 6 s, here:")[2]
    assert f"{REPOSITORY / 'subspace'}/" in place  # the line of ours that waits, and what it waits in
    assert f"error: step {step} hangs" in said
    assert f"No report from rank {stopped}" in said
    assert "in train" in (run.folder / "hang" / f"rank-{waits}.txt").read_text()


def test_a_rank_that_is_left_alone_ends_at_the_launchers_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's launcher sends SIGTERM to those that are left; it must not be taken for a wish to save."""
    script = (
        "import os, signal, sys, time\n"
        "from subspace.distributed.signals import SignalHandler\n"
        "with SignalHandler() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(signals.stop_requested)\n"
    )
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("SUBSPACE_STATUS_FILE", str(tmp_path / "status"))
    (tmp_path / "rank-0").write_text(str(os.getpid()))
    whole = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (whole.returncode, whole.stdout) == (0, "True\n")
    (tmp_path / "rank-1").write_text(str(gone.pid))
    left = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (left.returncode, left.stdout) == (128 + signal.SIGTERM, "")


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with SignalHandler() as signals:
        assert not signals.stop_requested
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.stop_requested
    assert signal.getsignal(signal.SIGTERM) is before
