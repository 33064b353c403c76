"""Runs over ssh on two hosts: the same numbers as on one, and nothing left or harmed when something goes wrong."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from subspace.adapters.serialization import TENSORS
from subspace.evaluation.results import read_items
from subspace.training.checkpoint import checkpoints
from tests.cluster.conftest import reached, settings
from tests.cluster.hosts import Hosts, Program
from tests.helpers.material import logged

pytestmark = pytest.mark.cluster

#: All that a shell, ssh or pdsh might take for itself.
TEXTS = [
    r"targets=[layers\.(0|1)\.self_attn\.q_proj]",
    r"patterns={'.*\.(q|k)_proj$': {r: 4}}",
    "$HOME ${HOME} $(touch executed) `touch executed`",
    "a'b\"c \"d e\" 'f g'",
    '"',
    "'",
    "\\",
    r"\n \\ \$HOME",
    "; touch executed",
    "&& touch executed",
    "| touch executed",
    "&touch executed",
    "> executed",
    "<executed",
    "",
    " ",
    "two  blanks, a\ttab and a\nnew line",
    "*",
    "?*[a-z]",
    "{a,b}",
    "~",
    "!!",
    "# no comment",
    "%h %n %u %%",
    "a=b=c",
    "--option=x y",
    "é 深 \U0001f600",
]

SHOW = """
import json, os, pathlib, sys
folder, *arguments = sys.argv[1:]
pathlib.Path(folder, os.environ["RANK"]).write_text(json.dumps([os.uname().nodename, arguments]))
"""

LAUNCH = """
import json, pathlib, sys
from subspace.distributed import launcher
arguments = json.loads(pathlib.Path(sys.argv[1]).read_text())
sys.exit(launcher.build_launch(arguments, 2, hostfile="hostfile", program=["show.py"]).run())
"""


class Head:
    """``launch/cluster.sh``, given on the first host for both."""

    def __init__(self, hosts: Hosts, place: Path) -> None:
        self._hosts, self._place = hosts, place
        self._before = {process.pid for host in hosts for process in host.processes()}

    def start(self, *arguments: str | Path, hostfile: str = "node1 slots=1\nnode2 slots=1\n") -> Program:
        file = self._place / f"hostfile-{time.monotonic_ns()}"
        file.write_text(hostfile)
        command = ["bash", "launch/cluster.sh", file.name, *arguments]
        return self._hosts[0].start(*command, folder=self._place, environment={"DS_ENV_FILE": "environment"})

    def left(self, seconds: float = 20) -> list[str]:
        """Return what still runs on the hosts, after some seconds of patience, of what did not run before."""
        end = time.monotonic() + seconds
        while True:
            now = [process for host in self._hosts for process in host.processes() if process.pid not in self._before]
            if not now or time.monotonic() > end:
                break
            time.sleep(0.2)
        said = []
        for process in now:
            with contextlib.suppress(Exception):
                said.append(" ".join(process.cmdline()))
        return said


@pytest.fixture
def head(hosts: Hosts, place: Path) -> Head:
    return Head(hosts, place)


def succeeded(program: Program) -> None:
    """See a command end with status 0, with notices on standard error and nothing that went wrong."""
    assert program.wait(400) == 0, program.err
    assert "rror" not in program.err


def test_two_hosts_train_what_one_does(head: Head, hosts: Hosts, place: Path, whole: Path) -> None:
    program = head.start("train", *settings("pair"))
    reached(place / "runs" / "pair", 1, program.ended)
    assert [host.ranks() for host in hosts] == [[0], [1]]
    succeeded(program)
    assert "next: subspace evaluate runs/pair" in program.out
    assert logged(place / "runs" / "pair") == logged(whole)
    tensors = [(run / "adapter" / TENSORS).read_bytes() for run in (place / "runs" / "pair", whole)]
    assert tensors[0] == tensors[1]
    assert head.left() == []


def test_two_processes_a_host_and_a_regular_expression(head: Head, hosts: Hosts, place: Path, whole: Path) -> None:
    """The expression names the layers that are the default, so that the losses are to be the same."""
    expression = r"targets=['.*\.(q|k|v|up|down)_proj$']"
    program = head.start("train", *settings("four", expression), hostfile="node1 slots=2\nnode2 slots=2\n")
    reached(place / "runs" / "four", 1, program.ended)
    assert [host.ranks() for host in hosts] == [[0, 1], [2, 3]]
    succeeded(program)
    assert logged(place / "runs" / "four")[:20] == pytest.approx(logged(whole)[:20], abs=1e-3)
    assert head.left() == []


def test_a_host_other_than_this_one(head: Head, hosts: Hosts, place: Path) -> None:
    program = head.start("train", *settings("other"), hostfile="# not here\nnode2 slots=1\n")
    reached(place / "runs" / "other", 1, program.ended)
    assert [host.ranks() for host in hosts] == [[], [0]]
    succeeded(program)
    assert head.left() == []


def test_two_hosts_score_what_one_process_does(head: Head, hosts: Hosts, place: Path, whole: Path) -> None:
    one, two = (shutil.copytree(whole, place / "runs" / f"scored-by-{name}") for name in ("one", "two"))
    asked = ["evaluate.tasks=asked.yaml", "evaluate.protocol=[likelihood, llm-adapters]"]
    hosts[0].check(".venv/bin/python", "-m", "subspace", "evaluate", "runs/scored-by-one", *asked, folder=place)
    program = head.start("evaluate", "runs/scored-by-two", *asked)
    succeeded(program)
    for protocol in ("likelihood", "llm-adapters"):
        answers = [read_items(run / "evaluation" / protocol / "asked.jsonl") for run in (one, two)]
        assert [item["id"] for item in answers[0]] == [f"test-{number}" for number in range(21)]
        assert answers[0] == answers[1]
    assert head.left() == []


def test_every_text_arrives_as_it_is_and_nothing_is_executed(head: Head, hosts: Hosts, place: Path) -> None:
    (place / "show.py").write_text(SHOW)
    (place / "launch.py").write_text(LAUNCH)
    (place / "hostfile").write_text("node1 slots=2\nnode2 slots=2\n")
    (place / "shown").mkdir()
    (place / "texts.json").write_text(json.dumps([str(place / "shown"), *TEXTS]))
    before = sorted(place.iterdir())
    program = hosts[0].run(".venv/bin/python", "launch.py", "texts.json", folder=place)
    succeeded(program)
    shown = [json.loads((place / "shown" / str(rank)).read_text()) for rank in range(4)]
    assert shown == [[node, TEXTS] for node in ("node1", "node1", "node2", "node2")]
    assert sorted(place.iterdir()) == before
    assert not [host.name for host in hosts if "executed" in host.check("ls", "/root", "/tmp")]


ONE = "node1 slots=1\n"


@pytest.mark.parametrize(
    ("hostfile", "complaint"),
    [
        (f"{ONE}nobody slots=1\n", "nobody"),
        (f"nobody slots=1\n{ONE}", "nobody"),
        (f"{ONE}node2 slots=1\n{ONE}", "node1"),
    ],
    ids=["unknown", "unknown-first", "twice"],
)
def test_a_host_that_cannot_be(head: Head, hosts: Hosts, place: Path, hostfile: str, complaint: str) -> None:
    refused(head, head.start("train", *settings("refused"), hostfile=hostfile), place, complaint)


def test_a_host_that_refuses_ssh(head: Head, hosts: Hosts, place: Path) -> None:
    hosts[1].stop_sshd()
    try:
        refused(head, head.start("train", *settings("refused")), place, "node2", "refused")
    finally:
        hosts[1].start_sshd()


def test_a_host_that_is_off(head: Head, hosts: Hosts, place: Path) -> None:
    hosts.unplug(hosts[1])
    try:
        refused(head, head.start("train", *settings("refused")), place, "node2")
    finally:
        hosts.plug(hosts[1])


def test_a_host_without_the_folder(head: Head, hosts: Hosts, place: Path) -> None:
    hosts[1].check("mount", "-t", "tmpfs", "none", place.parent)
    try:
        refused(head, head.start("train", *settings("refused")), place, "node2", str(place))
    finally:
        hosts[1].check("umount", place.parent)


def refused(head: Head, program: Program, place: Path, *complaints: str) -> None:
    """See a command end soon, with one message that names the host and what is wrong."""
    assert program.wait(120) == 2, program.err
    *signs_of_life, line = program.err.splitlines()
    assert [sign for sign in signs_of_life if not sign.endswith(" ...")] == []
    assert line.startswith("error: ")
    assert [complaint for complaint in complaints if complaint not in line] == []
    assert program.out == ""
    assert not (place / "runs" / "refused").exists()
    assert head.left() == []


@pytest.fixture
def bystanders(hosts: Hosts) -> Iterator[Callable[[], list[int | None]]]:
    """Somebody else's run on each host, by its command line; gives how they have ended."""
    name = f"{sys.prefix}/bin/python -u -m deepspeed.launcher.launch --world_info=e30="
    others = [host.start("bash", "-c", 'exec -a "$0" sleep 600', name) for host in hosts]
    while not all(any(process.cmdline()[:1] == [name] for process in host.processes()) for host in hosts):
        time.sleep(0.1)
    yield lambda: [other.poll() for other in others]
    for other in others:
        if other.poll() is None:
            other.signal(signal.SIGKILL)
            other.wait(10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_on_all_hosts_and_ends_nothing_else(
    hosts: Hosts, bystanders: Callable[[], list[int | None]], place: Path, number: signal.Signals
) -> None:
    head, name = Head(hosts, place), f"stopped-by-{number.name}"
    program = head.start("train", *settings(name, "train.steps=100000"))
    reached(place / "runs" / name, 5, program.ended)
    program.signal(number)
    assert program.wait(180) == 75, program.err
    last = logged(place / "runs" / name, "step")[-1]
    assert program.err.count("stopped:") == 1
    assert f"stopped: after step {last}, by a signal" in program.err
    assert [path.name for path in checkpoints(place / "runs" / name)] == [f"step-{last:06d}"]
    assert head.left() == []
    assert bystanders() == [None, None]


@pytest.mark.parametrize("way", ["killed", "silent"])
def test_a_host_that_dies_ends_the_run(hosts: Hosts, place: Path, way: str) -> None:
    """Connections are closed where the kernel still can; where the network is gone first, they just fall silent."""
    head = Head(hosts, place)
    program = head.start("train", *settings(way, "train.steps=100000"))
    reached(place / "runs" / way, 5, program.ended)
    if way == "silent":
        hosts.unplug(hosts[1])
    hosts[1].kill()
    try:
        assert program.wait(240) not in (0, 75), program.err
        assert program.err.count("error:") == 1
        assert "Traceback" not in program.err
        assert head.left() == [], program.err
    finally:
        hosts.boot(hosts[1])
