"""The wrapper round DeepSpeed's launcher: what it starts, that signals reach all of it, that nothing stays behind.

The ranks run a small script that does what a run does with the launcher, and then what its argument says.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace.distributed import hosts, launcher, supervision
from subspace.distributed.peers import STATUS_FILE
from subspace.errors import RunStopped, UserError

ROOT = Path(__file__).resolve().parents[2]

RANK = """
import os, pathlib, sys, time
from subspace.distributed import launcher
what, folder = sys.argv[1:]
launcher.init_rank_env()
pathlib.Path(folder, os.environ["RANK"]).write_text(f"{os.getpid()} {os.getppid()}")
mine = what == "fails" or (what == "second-fails" and os.environ["RANK"] == "1")
if mine:
    if launcher.should_report_error(2):
        print("error: rank", os.environ["RANK"], file=sys.stderr, flush=True)
    sys.exit(2)
if what != "ends":
    time.sleep(100)
"""

FINISHES = RANK.replace('if what != "ends"', 'if what == "ends": launcher.write_success_marker()\nelse')

#: What ``subspace train`` does from its first line on.
LOADS = "loads = launcher.stopping_at_signal(); loads.__enter__(); launcher.init_rank_env()"

WRAPPER = """
import sys
from subspace.distributed import launcher
script, *arguments = sys.argv[1:]
sys.exit(launcher.build_launch(arguments, 2, program=[script]).run())
"""


class Run:
    """A wrapper with two ranks that have begun."""

    def __init__(self, folder: Path, what: str, script: str = FINISHES) -> None:
        self.folder = folder
        (folder / "rank.py").write_text(script)
        (folder / "wrapper.py").write_text(WRAPPER)
        self.wrapper = subprocess.Popen(
            [sys.executable, folder / "wrapper.py", folder / "rank.py", what, folder],
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "2,3"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pids(self, rank: int) -> tuple[int, int]:
        """Return the process of a rank and its parent, once they are there."""
        file = self.folder / str(rank)
        for _ in range(600):
            if file.exists() and (text := file.read_text()):
                pid, parent = text.split()
                return int(pid), int(parent)
            time.sleep(0.1)
        raise AssertionError("the ranks did not start within a minute")

    def end(self) -> tuple[int, str]:
        """Wait; return status and what was said on standard error, after a check that the ranks are gone."""
        printed, said = self.wrapper.communicate(timeout=300)
        # DeepSpeed's launcher says that it ignores CUDA_VISIBLE_DEVICES, where --json prints.
        assert printed == ""
        assert [rank for rank in (0, 1) if _alive(self.pids(rank)[0])] == []
        return self.wrapper.returncode, said


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(*arguments: str) -> Run:
        runs.append(Run(tmp_path, *arguments))
        return runs[-1]

    yield begin
    for run in runs:
        run.wrapper.kill()
        for rank in (0, 1):
            for pid in run.pids(rank):
                if _alive(pid):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.processes
def test_a_run_that_reaches_its_end_succeeds(start: Callable[..., Run]) -> None:
    assert start("ends").end() == (0, "")


@pytest.mark.processes
def test_a_run_that_ends_without_its_marker_fails(start: Callable[..., Run]) -> None:
    status, said = start("ends", RANK).end()
    assert status == 1
    assert "did not reach its end" in said


@pytest.mark.processes
def test_a_failure_of_all_ranks_is_told_once(start: Callable[..., Run]) -> None:
    assert start("fails").end() == (2, "error: rank 0\n")


@pytest.mark.processes
def test_a_failure_of_one_rank_is_told_by_it(start: Callable[..., Run]) -> None:
    assert start("second-fails").end() == (2, "error: rank 1\n")


@pytest.mark.processes
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=[] if number == signal.SIGTERM else pytest.mark.long)
        for number in supervision.SIGNALS
    ],
    ids=lambda number: number.name,
)
def test_a_signal_ends_all(start: Callable[..., Run], number: signal.Signals) -> None:
    run = start("waits")
    run.pids(0), run.pids(1)
    run.wrapper.send_signal(number)
    assert run.end() == (128 + number, "")


@pytest.mark.processes
def test_a_training_that_is_stopped_before_its_first_step_says_so_once(start: Callable[..., Run]) -> None:
    run = start("waits", RANK.replace("launcher.init_rank_env()", LOADS))
    run.pids(0), run.pids(1)
    run.wrapper.send_signal(signal.SIGTERM)
    status, said = run.end()
    assert status == RunStopped.status
    assert said.startswith("stopped: by a signal, before its first step")
    assert said.count("\n") == 1


@pytest.mark.processes
def test_a_killed_launcher_is_no_success(start: Callable[..., Run]) -> None:
    run = start("waits")
    run.pids(0)
    os.kill(run.pids(1)[1], signal.SIGKILL)
    status, said = run.end()
    assert status == 128 + signal.SIGKILL
    assert "a process of the run was ended by signal 9 (Killed)" in said


def _plan(**given: object) -> launcher.Launch:
    launch = launcher.build_launch(["train", "x.yaml", "name=a b"], **given)  # type: ignore[arg-type]
    assert launch is not None
    return launch


def world(launch: launcher.Launch) -> Any:
    """Return what DeepSpeed's launcher is told of devices."""
    (word,) = [word for word in launch.command if word.startswith("--world_info=")]
    return json.loads(base64.urlsafe_b64decode(word.removeprefix("--world_info=")))


def test_the_command_is_deepspeeds_own_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "visible_devices", list)
    launch = _plan(processes=3)
    assert launch.command[:3] == (sys.executable, "-m", "deepspeed.launcher.launch")
    assert world(launch) == {"localhost": [0, 1, 2]}
    port = launch.command[launch.command.index("--master_port") + 1]
    assert port not in ("0", "29500")  # one hangs, the other is everybody's
    assert launch.command[-5:] == ("--module", "subspace", "train", "x.yaml", "name=a b")
    assert launch.environment["DS_ACCELERATOR"] == "cpu"
    assert str(launch).endswith("--module subspace train x.yaml 'name=a b'")


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(launcher, "visible_devices", list)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12))
    assert _plan(processes=3).environment["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert _plan(processes=3).environment["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("bound_to", "on_node", "threads"),
    [(8, "64", "8"), (64, "64", "8"), (1, "8", "1"), (4, "64", "4"), (16, None, "2"), (4, None, "1")],
)
def test_a_task_that_is_bound_to_cores_of_its_own_uses_them_all(
    monkeypatch: pytest.MonkeyPatch, bound_to: int, on_node: str | None, threads: str
) -> None:
    """Eight tasks on a machine, with srun's variables or without."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(bound_to))
    if on_node:
        monkeypatch.setenv("SLURM_PROCID", "3")
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", on_node)
    assert launcher._threads(8) == threads


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "visible_devices", list)
    assert launcher.build_launch(["train", "x.yaml"]) is None
    assert launcher.build_launch(["train", "x.yaml"], processes=1) is None


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("2,3,5", ["2", "3", "5"]),
        (
            "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,GPU-0a1b,GPU-77",
            ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GPU-0a1b", "GPU-77"],
        ),
        ("MIG-1,MIG-GPU-2/0/1,MIG-3", ["MIG-1", "MIG-GPU-2/0/1", "MIG-3"]),
        (" 7, 1 ,0,-1,4", ["7", "1", "0"]),  # CUDA reads up to what is no device
        ("", None),
        (None, None),
    ],
)
def test_every_visible_device_gets_a_process_and_no_other(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str] | None
) -> None:
    """Through the launcher's numbers to the ranks, which see the caller's own list again, as far as it is used."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0 if visible == "" else 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible == "":
        assert launcher.build_launch(["train", "x.yaml"]) is None
        return
    for count in (2, 3):
        launch = _plan(processes=count)
        numbers = ",".join(map(str, range(count)))
        assert world(launch) == {"localhost": [*range(count)]}
        environment = launcher._ranks_environment(launch, Path("status"))
        assert "CUDA_VISIBLE_DEVICES" not in environment  # of which the launcher would speak on standard output
        expected = (names or ["0", "1", "2"])[:count]
        for rank in range(count):
            seen = _devices_of_rank(monkeypatch, environment, rank, numbers)
            assert seen == ([expected[rank]] if expected[0].startswith("MIG") else expected)


def _devices_of_rank(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], rank: int, numbers: str
) -> list[str]:
    """Return the devices that a rank sees, whose launcher has set what DeepSpeed's sets."""
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setenv("CUDA_VISIBLE_DEVICES", numbers)
        patch.setenv("RANK", str(rank))
        patch.setenv("LOCAL_RANK", str(rank))
        patch.setenv("WORLD_SIZE", "3")
        patch.delenv(STATUS_FILE)
        launcher.init_rank_env()
        logging.getLogger("DeepSpeed").filters.clear()
        assert launcher.DEVICES not in os.environ  # for whatever this rank starts
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "visible_devices", lambda: ["GPU-8932f937"])
    with pytest.raises(UserError, match=r"3 processes .* has 1\. Use --processes 1"):
        launcher.build_launch(["train", "x.yaml"], processes=3)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("# nothing\n", "names no host"),
        ("node1 slots=2\nnode2\n", "line 2 is 'node2'"),
        ("node1 slots=2\nnode1 slots=4\n", "line 2 names host 'node1' a second time"),
        (None, "No such file"),
        ("-oProxyCommand=id slots=1\n", "names the host '-oProxyCommand=id', which no host is called"),
        ("a;id slots=1\n", "which no host is called"),
    ],
)
def test_a_bad_hostfile_is_refused(tmp_path: Path, text: str | None, complaint: str) -> None:
    file = tmp_path / "hostfile"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=complaint):
        launcher.build_launch(["train", "x.yaml"], hostfile=str(file))


def test_the_example_of_a_hostfile_is_good() -> None:
    file = str(ROOT / "launch" / "hostfile.example")
    launch = _plan(hostfile=file, processes=4)
    assert launch.command[2:9] == (hosts.MODULE, "launch", "--hostfile", file, "--force_multi", "--num_gpus", "4")
    assert launch.hosts == ("node01", "node02")


def test_a_port_is_free() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", launcher.free_port()))
        listener.listen()


@pytest.mark.parametrize("own", [{}, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "x"}])
def test_a_ranks_allocator_grows_its_segments_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, own: dict[str, str]
) -> None:
    """Batches have other lengths in every step, and what is freed of segments that cannot grow is soon in pieces."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    launcher.set_rank_env()
    found = {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")}
    assert found == (own or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_a_process_becomes_the_only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launcher.under_launcher()
    launcher.init_rank_env()
    assert launcher.under_launcher()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    port = os.environ["MASTER_PORT"]
    launcher.init_rank_env()
    assert os.environ["MASTER_PORT"] == port
    logging.getLogger("DeepSpeed").filters.clear()  # which concerns the whole process


@pytest.mark.processes
@pytest.mark.parametrize("also_the_launcher", [False, True])
def test_a_killed_wrapper_leaves_nothing(start: Callable[..., Run], *, also_the_launcher: bool) -> None:
    run = start("waits")
    processes = [*run.pids(0), *run.pids(1)]
    run.wrapper.kill()
    if also_the_launcher:
        os.kill(run.pids(0)[1], signal.SIGKILL)
    for _ in range(300):
        if not any(map(_alive, processes)):
            break
        time.sleep(0.1)
    assert [pid for pid in processes if _alive(pid)] == []
    run.wrapper.communicate()


@pytest.mark.processes
def test_a_rank_that_is_stopped_is_told_of(start: Callable[..., Run]) -> None:
    run = start("waits")
    stopped = run.pids(1)[0]
    run.pids(0)
    os.kill(stopped, signal.SIGSTOP)
    assert run.wrapper.stderr
    assert run.wrapper.stderr.readline() == (
        f"note: process {stopped} of the run is stopped (SIGSTOP), and the others wait for it. It goes on with: "
        f"kill -CONT {stopped}\n"
    )
    os.kill(stopped, signal.SIGCONT)
    run.wrapper.send_signal(signal.SIGTERM)
    assert run.end() == (128 + signal.SIGTERM, "")


def test_a_guard_acts_when_its_maker_is_gone_and_not_before(tmp_path: Path) -> None:
    """It ends what runs on other hosts, which cannot see that the wrapper was killed."""
    program = (
        "import os, subprocess, sys\n"
        "from subspace.distributed.supervision import start_guard\n"
        "sleeper = subprocess.Popen(['sleep', '1000'], start_new_session=True, stdout=subprocess.DEVNULL)\n"
        "guard = start_guard(sleeper.pid, ['touch', sys.argv[1]], os.environ)\n"
        "print(sleeper.pid, flush=True)\n"
        "if sys.argv[2] == 'ends': guard.kill(), guard.wait(), sleeper.kill()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    for what in ("ends", "is killed"):
        command = [sys.executable, "-c", program, str(tmp_path / what), what]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
        for _ in range(100):
            if not _alive(int(done.stdout)) and (what == "ends" or (tmp_path / what).exists()):
                break
            time.sleep(0.1)
        assert not _alive(int(done.stdout))
        assert (tmp_path / what).exists() == (what == "is killed")
