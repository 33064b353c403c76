"""What processes learn of one another where no launcher of ours sees them all; most of them here are small scripts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from subspace.common.paths import REPOSITORY
from subspace.distributed import launcher, peers
from subspace.distributed.watchdog import Watchdog

pytestmark = pytest.mark.processes

RANK = """
import sys, time
from pathlib import Path
from subspace.distributed import peers

folder, rank, hosts, does = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","), sys.argv[4]
peers.REPORT_GRACE_S, peers.EXIT_GRACE_S = 0.3, 0.5
if rank == 0:
    where = peers.open_listener()
    (folder / "part").write_text(str(where.getsockname()[1]))
    (folder / "part").rename(folder / "port")
else:
    while not (folder / "port").exists():
        time.sleep(0.02)
    where = ("127.0.0.1", int((folder / "port").read_text()))
peers.start(rank, hosts, "token", where)
print("ready", flush=True)
wish, _, value = does.partition(" ")
if wish == "leaves":
    peers.stop()
elif wish == "reports":
    sys.stdin.readline()
    peers.report_failure(int(value))
    sys.exit(int(value))
elif wish == "ends":
    sys.exit(0)
elif wish == "raises":
    raise ValueError("a bug")
time.sleep(60)  # as in a collective that waits for ever
"""


class Group:
    """Ranks that are connected."""

    def __init__(self, folder: Path, hosts: str, **does: str) -> None:
        (folder / "rank.py").write_text(RANK)
        self.ranks = [
            subprocess.Popen(
                [sys.executable, folder / "rank.py", folder, str(rank), hosts, does.get(f"rank{rank}", "waits")],
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(len(hosts.split(",")))
        ]
        for rank in self.ranks:
            assert rank.stdout
            assert rank.stdout.readline() == "ready\n"

    def end(self) -> list[tuple[int, str]]:
        """Return status and words of each rank."""
        told = [rank.communicate(timeout=120)[1] for rank in self.ranks]
        return [(rank.returncode, words) for rank, words in zip(self.ranks, told, strict=True)]


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., Group]]:
    groups: list[Group] = []

    def group(hosts: str, **does: str) -> Group:
        groups.append(Group(tmp_path, hosts, **does))
        return groups[-1]

    yield group
    for rank in (rank for group in groups for rank in group.ranks):
        rank.kill()
        rank.communicate()


def test_a_killed_process_ends_the_others_with_one_message(connect: Callable[..., Group]) -> None:
    group = connect("a,b,b")
    group.ranks[2].kill()
    (first, said), *others = group.end()
    assert (first, others) == (1, [(1, ""), (-signal.SIGKILL, "")])
    assert said.startswith("error: rank 2 (host b) ended without a word: ")
    assert said.count("\n") == 1


def test_rank_0_is_missed_by_the_first_one_on_another_host(connect: Callable[..., Group]) -> None:
    group = connect("a,a,b,b")
    group.ranks[0].kill()
    assert [status for status, _ in group.end()] == [-signal.SIGKILL, 1, 1, 1]
    assert [words[:23] for _, words in group.end()] == ["", "", "error: rank 0 (host a) ", ""]


def test_a_failure_that_was_reported_ends_the_others_silently_with_its_status(connect: Callable[..., Group]) -> None:
    group = connect("a,b,c", rank1="reports 75")
    assert group.ranks[1].stdin
    group.ranks[1].stdin.write("\n")
    group.ranks[1].stdin.flush()
    assert group.end() == [(75, "")] * 3


def test_who_says_farewell_or_is_only_stopped_is_not_missed(connect: Callable[..., Group]) -> None:
    group = connect("a,b,c,d", rank1="leaves", rank2="ends")
    group.ranks[3].send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    assert [rank.poll() for rank in group.ranks] == [None, None, 0, None]


def test_a_process_that_ends_by_an_exception_is_missed(connect: Callable[..., Group]) -> None:
    group = connect("a,b", rank1="raises")
    (status, said), (_, bug) = group.end()
    assert status == 1
    assert "rank 1 (host b) ended" in said
    assert bug.endswith("ValueError: a bug\n")


def test_strangers_are_not_listened_to(connect: Callable[..., Group], tmp_path: Path) -> None:
    group = connect("a,b")
    where = ("127.0.0.1", int((tmp_path / "port").read_text()))
    for words in (b"failed 3\n", b"wrong 1\nfailed 3\n", b""):
        with socket.create_connection(where) as stranger:
            stranger.sendall(words)
    time.sleep(1)
    assert [rank.poll() for rank in group.ranks] == [None, None]


def test_a_machine_that_is_gone_is_noticed_within_half_a_minute() -> None:
    """By the kernel's probes: ten idle seconds, then one each five seconds."""
    watch = peers.PeerWatch(1, ["a", "b"], "token")
    with peers.open_listener() as listener:
        watch.connect("127.0.0.1", listener.getsockname()[1])
        accepted, _ = listener.accept()
        connection = watch._peers[0].connection
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = {name: connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in peers.KEEPALIVE}
        assert options == peers.KEEPALIVE
        watch.close()
        accepted.close()


# --- before the processes are connected ---

FAILS = """
import sys, time
from subspace.distributed import launcher
launcher.REPORT_DELAY_S = 2.0
if "fails" in sys.argv:
    if launcher.should_report_error(2):
        print("error", file=sys.stderr)
    sys.exit(2)
"""


def _fail(*ranks: int) -> list[str]:
    """Let ranks of three fail as under SLURM, where they share nothing; return what each says."""
    port = str(launcher.free_port())
    common = {**os.environ, "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    common["PYTHONPATH"] = str(REPOSITORY)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", FAILS, "fails" if rank in ranks else "runs"],
            env={**common, "RANK": str(rank), "SLURM_PROCID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [2 if rank in ranks else 0 for rank in range(3)]
    return said


def test_a_failure_of_all_before_they_are_connected_is_told_once() -> None:
    assert _fail(0, 1, 2) == ["error\n", "", ""]


def test_a_failure_of_one_before_they_are_connected_is_told_by_it() -> None:
    assert _fail(1) == ["", "error\n", ""]


# --- in a run ---

WAITS = """
import sys, time
from subspace.distributed import engine, peers
engine.init_distributed()
print("ready", flush=True)
time.sleep(100)  # NCCL would wait so
"""


@pytest.mark.long
def test_a_killed_process_of_a_run_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes as srun or torchrun start them."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    environment = {**os.environ, "MASTER_PORT": str(launcher.free_port()), "DS_ACCELERATOR": "cpu"}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", WAITS],
            env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    )
    for process in (first, second):
        assert process.stdout
        assert any(line == "ready\n" for line in process.stdout)
    second.kill()
    said = first.communicate(timeout=120)[1].splitlines()
    second.communicate()
    assert first.returncode == 1
    assert [line[:14] for line in said if line.startswith("error")] == ["error: rank 1 "]


@pytest.mark.parametrize(
    ("reports", "launchers", "silent"), [({0, 2}, True, ["1"]), (None, True, []), (None, False, ["0", "2"])]
)
def test_the_watchdog_misses_only_those_that_it_would_have_heard_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reports: set[int] | None, launchers: bool, silent: list[str]
) -> None:
    """By their connections; by their files only where one launcher has started all on this machine."""
    (tmp_path / "rank-1.txt").touch()
    monkeypatch.setattr(peers, "hang_reports", lambda: reports)
    monkeypatch.setattr(peers, "several_launchers", lambda: launchers)
    assert Watchdog(tmp_path, 1.0, 0, 3)._silent() == silent
