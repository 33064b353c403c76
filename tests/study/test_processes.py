"""What each of the commands that a study runs at a time has of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from subspace.cli.main import main
from subspace.errors import UserError
from subspace.study import processes
from subspace.study.processes import Commands
from tests.helpers.studies import make_study


def shares(commands: Commands) -> list[dict[str, str]]:
    return [commands.shares.get_nowait() for _ in range(commands.shares.qsize())]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine of eight cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return monkeypatch


def test_each_has_gpus_of_its_own(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(processes, "visible_devices", lambda: ["4", "5", "GPU-6", "7"])
    assert shares(Commands(1, 2)) == [{}]
    assert shares(Commands(3)) == [{"CUDA_VISIBLE_DEVICES": name} for name in ("4", "5", "GPU-6")]
    assert shares(Commands(2, 2)) == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "GPU-6,7"}]
    with pytest.raises(UserError, match=r"--parallel 3 .* with 2 to a training.*has 4 GPUs. Use --parallel 2"):
        Commands(3, 2)


def test_each_has_its_share_of_the_cores_or_what_the_user_says(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(processes, "visible_devices", list)
    assert shares(Commands(2)) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert shares(Commands(2, 2)) == [{"OMP_NUM_THREADS": "2"}] * 2
    with pytest.raises(UserError, match="8 cores and no GPU. Use --parallel 8"):
        Commands(9)
    machine.setenv("OMP_NUM_THREADS", "3")
    assert shares(Commands(2)) == [{"OMP_NUM_THREADS": "3"}] * 2


@pytest.mark.processes
@pytest.mark.parametrize("threads", [1, 3])
def test_a_forked_command_has_as_many_threads_as_its_share_says(threads: int, tmp_path: Path) -> None:
    commands = Commands()
    commands.shares.get_nowait()
    commands.shares.put({"OMP_NUM_THREADS": str(threads)})
    (tmp_path / "threads.py").write_text("import torch\nraise RuntimeError(f'{torch.get_num_threads()} threads')\n")
    assert commands(["methods", str(tmp_path / "threads.py")], tmp_path / "output.txt") != 0
    assert f"{threads} threads" in (tmp_path / "output.txt").read_text()


@pytest.mark.processes
@pytest.mark.parametrize("bad", [False, True])
def test_a_command_starts_anew_where_the_server_has_touched_the_gpu(bad: bool, tmp_path: Path) -> None:
    method = tmp_path / "fork.py"
    method.write_text("import multiprocessing\nraise RuntimeError(f'fork: {multiprocessing.parent_process()}')\n")
    touched = f"torch.cuda._is_in_bad_fork = lambda: {bad}"
    code = (
        f"import torch; {touched}; from subspace.study.processes import _command; import os; "
        f"_command(['methods', {str(method)!r}], {str(tmp_path / 'output.txt')!r}, dict(os.environ), '.')"
    )
    spawn = (
        f"import multiprocessing; p = multiprocessing.get_context('fork').Process(target=exec, args=({code!r},)); "
        "p.start(); p.join(); exit(p.exitcode)"
    )
    done = subprocess.run([sys.executable, "-c", spawn], capture_output=True, text=True, check=False)
    said = (tmp_path / "output.txt").read_text()
    assert done.returncode > 0, done.stderr
    assert ("fork: None" in said) == bad, said


def test_too_many_at_a_time_are_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "run", str(make_study(tmp_path)), "--parallel", "5000"]) == 2
    assert "--parallel 5000 was asked for" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
