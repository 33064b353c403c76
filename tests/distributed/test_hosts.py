"""Launches on several hosts. A stand-in for pdsh hands its line to a real shell for each host, as the real one does."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from subspace.common.paths import REPOSITORY
from subspace.distributed import hosts, launcher
from subspace.errors import UserError

PDSH = """#!{python}
import os, subprocess, sys, threading
assert sys.argv[1:3] == ["-S", "-f"] and sys.argv[4] == "-w", sys.argv
names, given_line = sys.argv[5].split(","), " ".join(sys.argv[6:])
assert int(sys.argv[3]) >= len(names) and os.environ["PDSH_RCMD_TYPE"] == "ssh"

def expand(host, number):
    text, rest = "", given_line
    while rest:
        code = {{"%h": host, "%n": str(number), "%u": "user", "%%": "%"}}.get(rest[:2])
        text, rest = text + (code or rest[0]), rest[2:] if code else rest[1:]
    return text

def run(number, host):
    # What sshd gives a shell, and no more; in a session of its own, as pdsh starts ssh and another machine has it.
    given = {{"PATH": "/usr/bin:/bin", "HOME": "/", "LANG": "C.UTF-8", "HOST_NAME": host}}
    line = expand(host, number)
    shell = subprocess.Popen(["bash", "-c", line], env=given, stdin=subprocess.DEVNULL, start_new_session=True)
    statuses[number] = shell.wait() % 256
    if statuses[number]:
        # In one write, as pdsh does: two hosts may end at once.
        os.write(2, f"pdsh@head: {{host}}: ssh exited with exit code {{statuses[number]}}\\n".encode())

statuses = [0] * len(names)
threads = [threading.Thread(target=run, args=each) for each in enumerate(names)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
sys.exit(max(statuses))
"""

#: What DeepSpeed's launcher and the real pdsh call: ssh ... HOST COMMAND.
SSH = """#!/bin/bash
case "${@: -1}" in
-I) echo 127.0.0.1 ;;
hostname) ;;
*) exec env -i PATH=/usr/bin:/bin HOME=/ LANG=C.UTF-8 HOST_NAME="${@: -2:1}" bash -c "${@: -1}" ;;
esac
"""

#: In place of the part of DeepSpeed's launcher that runs on each host: it notes what it was started with.
NOTES = """
import json, os, sys
what = {"words": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}
open(os.path.join(os.path.dirname(__file__), os.environ["HOST_NAME"]), "w").write(json.dumps(what))
"""

NASTY = [
    r"targets=[layers\.(0|1)\.self_attn\.q_proj]",
    "method={name: lora, patterns: {'layers\\.(0|1)\\..*': {r: 4}}}",
    "a b",
    "$HOME",
    "`touch executed`",
    "$(touch executed)",
    "; touch executed",
    "& touch executed",
    "| touch executed",
    "> executed",
    "a\nb",
    "touch executed\n",
    "\\",
    "'",
    '"',
    'it\'s "both"',
    "--option=-x",
    "-n",
    "--",
    "",
    " ",
    "*",
    "?[a-z]{1,2}~",
    "~",
    "#",
    "!x",
    "%n%h%u%%n",
    "100%",
    "größe=ß✓\u2028",
    "\t",
]


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that stand for pdsh and ssh."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "pdsh").write_text(PDSH.format(python=sys.executable))
    (folder / "ssh").write_text(SSH)
    for program in folder.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def undone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what DeepSpeed's launcher does to its process."""
    from deepspeed.launcher import runner
    from deepspeed.utils import logger

    monkeypatch.setattr(runner, "PDSHRunner", runner.PDSHRunner)
    monkeypatch.setattr(logger, "level", logger.level)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    logger.filters.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


def generated(count: int) -> list[str]:
    """Return words of everything that a shell may know."""
    draw = random.Random(0)
    letters = string.printable + "äß✓€"
    return ["".join(draw.choices(letters, k=draw.randrange(12))) for _ in range(count)]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("names", "pdsh"),
    [(["a", "b"], "ours"), (["alone"], "ours"), pytest.param(["a", "b"], "real", marks=pytest.mark.long)],
)
def test_every_word_arrives_at_every_host_as_it_was_given(
    names: list[str],
    pdsh: str,
    bin_folder: Path,
    undone: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Words, variables, interpreter and folder go through DeepSpeed's own launcher and a real shell."""
    if pdsh == "real":
        (bin_folder / "pdsh").unlink()
        if shutil.which("pdsh") is None:
            pytest.skip("needs pdsh")
    here = tmp_path / "a folder with $HOME `touch executed` 'quotes' & (brackets) 100%h"
    stub = here / "deepspeed" / "launcher"
    stub.mkdir(parents=True)
    for file in (stub.parent / "__init__.py", stub / "__init__.py"):
        file.touch()
    (stub / "launch.py").write_text(NOTES)
    python = here / "the python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "executable", str(python))
    values = {f"PYTHON_{number}": word for number, word in enumerate([*NASTY, *generated(20)])}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv(hosts.MARK_TO_GIVE, "mark")
    monkeypatch.setenv("DS_ENV_FILE", "env")
    (here / "env").write_text("\n# a comment\n\nNCCL_X = $(touch executed) a=b\nNCCL_Y='in quotes'\n")
    (here / "hostfile").write_text("".join(f"{name} slots=2\n" for name in names))
    words = [*NASTY, *generated(150)]
    given = ["--hostfile", "hostfile", "--force_multi", "--master_port", "29123", "--log_level", "critical"]
    assert hosts.main(["launch", *given, "--no_local_rank", "--module", "subspace", *words]) == 0
    for number, name in enumerate(names):
        arrived = json.loads((stub / name).read_text())
        first = arrived["words"].index("subspace")
        assert arrived["words"][first + 1 :] == words
        own = dict(word.removeprefix("--").partition("=")[::2] for word in arrived["words"][:first])
        assert (own["node_rank"], own["master_addr"], own["master_port"]) == (str(number), "127.0.0.1", "29123")
        assert {"module", "no_local_rank"} <= set(own)
        assert arrived["folder"] == str(here)
        found = {key: arrived["environment"].get(key) for key in values}
        assert found == values
        assert arrived["environment"]["NCCL_X"] == "$(touch executed) a=b"
        assert arrived["environment"]["NCCL_Y"] == "in quotes"
        assert arrived["environment"][hosts.MARK] == f"mark-{number}"
    assert not list(tmp_path.rglob("executed"))


def test_deepspeeds_launcher_on_a_host_takes_these_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.launcher import launch

    words = ["--world_info=e30", "--node_rank=1", "--master_addr=x", "--master_port=1", "--module", "--no_local_rank"]
    monkeypatch.setattr(sys, "argv", ["launch", *words, "--log_level=critical", "subspace", *NASTY])
    taken = launch.parse_args()
    assert (taken.node_rank, taken.training_script, taken.training_script_args) == (1, "subspace", NASTY)


def test_hosts_that_do_not_answer_are_told_of(
    bin_folder: Path, undone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bin_folder / "ssh").write_text("#!/bin/bash\nexit 255\n")
    (tmp_path / "hostfile").write_text("nowhere slots=2\n")
    given = ["--hostfile", str(tmp_path / "hostfile"), "--force_multi", "--module", "subspace", "train"]
    assert hosts.main(["launch", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("hostfile: `ssh nowhere hostname` fails without a password")


@pytest.mark.parametrize("line", ["word", "= x", "a-b=c", "1=2", "export A=b"])
def test_a_bad_line_of_the_environment_file_is_refused(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "env"))
    (tmp_path / "hostfile").write_text("a slots=1\n")
    (tmp_path / "env").write_text(f"A=b\n\n{line}\n")
    with pytest.raises(UserError, match=f"env', line 3 is '{line}', but should be NAME=VALUE"):
        launcher.build_launch(["train", "x.yaml"], hostfile=str(tmp_path / "hostfile"))


def test_the_environment_file_in_this_folder_counts_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ENV_FILE")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text("A=home\nB = home \n")
    Path(".deepspeed_env").write_text("# here\n\nA=here\nC=\n")
    assert hosts.read_environment_files() == {"A": "here", "B": "home", "C": ""}


@pytest.mark.parametrize(
    ("variables", "routes", "chosen"),
    [
        ({"MASTER_ADDR": "node1"}, {"node1": "10.0.0.2", "192.0.2.1": "172.16.0.2"}, "ib0"),
        # The first host's own name is an address of its own, on Debian.
        ({"MASTER_ADDR": "node1"}, {"node1": "127.0.1.1", "192.0.2.1": "172.16.0.2"}, "eth0"),
        ({"MASTER_ADDR": "node1"}, {}, None),
        ({"MASTER_ADDR": "node1", "NCCL_SOCKET_IFNAME": "eth0"}, {"node1": "10.0.0.2"}, "eth0"),
        ({"MASTER_ADDR": "node1", "NCCL_SOCKET_IFNAME": "^docker"}, {"node1": "10.0.0.2"}, "ib0"),
        ({"MASTER_ADDR": "node1", "GLOO_SOCKET_IFNAME": "x"}, {"node1": "10.0.0.2"}, None),
        ({"MASTER_ADDR": "node1", "LOCAL_SIZE": "4"}, {"node1": "10.0.0.2"}, None),
    ],
)
def test_gloo_takes_the_interface_by_which_hosts_reach_one_another(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], routes: dict[str, str], chosen: str | None
) -> None:
    own = {"lo": "127.0.0.1", "eth0": "172.16.0.2", "ib0": "10.0.0.2"}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {n: [SimpleNamespace(address=a)] for n, a in own.items()})
    monkeypatch.setattr(hosts, "_own_address", routes.get)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    assert hosts.gloo_interface() == chosen


# --- signals and failures: ranks that the stand-in for pdsh starts, two on each host ---

RANKS = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder, what = Path(sys.argv[1]), sys.argv[2]
if "RANK" not in os.environ:  # DeepSpeed's launcher on a host, which ends with the status of a rank that fails
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    first = 2 * int(os.environ["HOST_NAME"][-1])
    ranks = [
        subprocess.Popen([sys.executable, __file__, *sys.argv[1:]], env={**os.environ, "RANK": str(first + i)})
        for i in (0, 1)
    ]
    while not (status := max(rank.poll() or 0 for rank in ranks)) and any(rank.poll() is None for rank in ranks):
        time.sleep(0.05)
    sys.exit(status)
rank = os.environ["RANK"]

def stop(*_):
    (folder / f"asked-{rank}").touch()
    if what == "misses" and int(rank) > 1:
        sys.exit(1)  # and notices only that rank 0 is gone
    time.sleep(0.5 * (what == "misses"))
    if rank == "0":
        os.write(2, b"stopped: after step 7\\n")
    sys.exit(75)

signal.signal(signal.SIGUSR1, stop)
# A child has the rank's environment, but is no rank.
child = subprocess.Popen(["bash", "-c", f"trap 'touch {folder}/asked-child' USR1; read < <(sleep 100)"])
(folder / f"rank-{rank}").write_text(f"{os.getpid()} {child.pid}")
while True:
    time.sleep(0.05)
    if rank == "3" and (folder / "fail").exists():
        if what == "tells":
            os.write(2, b"error: rank 3 has no disk\\n")
        os._exit(2 if what == "tells" else 247)
"""

HEAD = """
import os, sys
from pathlib import Path
from subspace.distributed import hosts, supervision
from subspace.common.progress import show_notices
show_notices()
hosts.FAILED_GRACE_S = float(sys.argv[1])
line = hosts.launch_line(sys.argv[2:], {"PYTHONPATH": os.environ["PYTHONPATH"]}, "/", os.environ[hosts.MARK_TO_GIVE])
names = ["host0", "host1"]
sys.exit(supervision.supervise([*hosts.pdsh(names), line], hosts.pdsh_environment(os.environ), Path("status"), names))
"""


class Launched:
    """A launch on two hosts, and a launch of somebody else's with the same command line on one of them."""

    def __init__(self, folder: Path, what: str, grace: float) -> None:
        self.folder = folder
        (folder / "ranks.py").write_text(RANKS)
        self.words = [sys.executable, str(folder / "ranks.py"), str(folder), what]
        environment = {**os.environ, hosts.MARK: f"{folder}-0", "HOST_NAME": "host4"}
        self.other = subprocess.Popen(self.words, env=environment)
        self.head = subprocess.Popen(
            [sys.executable, "-c", HEAD, str(grace), *self.words],
            env={**os.environ, hosts.MARK_TO_GIVE: f"mine{folder}", "PYTHONPATH": str(REPOSITORY)},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pids = [self._pids(rank) for rank in (0, 1, 2, 3, 8, 9)]

    def _pids(self, rank: int) -> list[int]:
        file = self.folder / f"rank-{rank}"
        for _ in range(300):
            if file.exists() and (text := file.read_text()):
                return [int(pid) for pid in text.split()]
            time.sleep(0.1)
        raise AssertionError("the ranks did not start within half a minute")

    def end(self) -> tuple[int, list[str]]:
        """Wait for the end; return status and what was said, after a check of who is left."""
        _, said = self.head.communicate(timeout=240)
        for rank in self.pids[:4]:
            assert not any(_runs(pid) for pid in rank)
        for rank in self.pids[4:]:  # the other launch
            assert all(_runs(pid) for pid in rank)
        return self.head.returncode, said.splitlines()

    def clean(self) -> None:
        for mark in (f"mine{self.folder}-0", f"mine{self.folder}-1", f"{self.folder}-0"):
            hosts.signal_processes(mark, signal.SIGKILL)
        self.head.kill()
        self.other.wait()


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def begin(tmp_path: Path, bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Launched]]:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    started: list[Launched] = []

    def launched(what: str, grace: float = 30.0) -> Launched:
        started.append(Launched(tmp_path, what, grace))
        return started[-1]

    yield launched
    for each in started:
        each.clean()


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_stops_this_launch_on_all_hosts_and_no_other(
    begin: Callable[..., Launched], number: signal.Signals
) -> None:
    launched = begin("runs")
    launched.head.send_signal(number)
    assert launched.end() == (75, ["stopped: after step 7"])
    assert sorted(path.name for path in launched.folder.glob("asked-*")) == [f"asked-{rank}" for rank in range(4)]


@pytest.mark.processes
def test_a_stopped_launch_is_known_by_the_host_that_saved(begin: Callable[..., Launched]) -> None:
    launched = begin("misses")
    launched.head.send_signal(signal.SIGTERM)
    assert launched.end() == (75, ["stopped: after step 7"])


@pytest.mark.processes
def test_a_second_signal_ends_all_hosts_at_once(begin: Callable[..., Launched]) -> None:
    launched = begin("runs")
    for pid, _ in launched.pids[:4]:
        os.kill(pid, signal.SIGSTOP)  # no step ends any more
    launched.head.send_signal(signal.SIGTERM)
    time.sleep(1)
    launched.head.send_signal(signal.SIGTERM)
    assert launched.end() == (128 + signal.SIGTERM, [])


@pytest.mark.processes
@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("tells", 2, "error: rank 3 has no disk"),
        ("dies", 137, "error: a process of the run on host 'host1' was ended by signal 9 (Killed). Often that is the "),
    ],
)
def test_a_host_that_fails_ends_the_others_with_one_message(
    begin: Callable[..., Launched], what: str, status: int, said: str
) -> None:
    launched = begin(what, grace=0.5)
    (launched.folder / "fail").touch()
    returned, lines = launched.end()
    assert returned == status
    assert [line[: len(said)] for line in lines] == [said]


def test_a_run_counts_as_stopped_though_the_first_host_to_end_only_lost_its_peer() -> None:
    said = b"".join(b"pdsh@head: %s: ssh exited with exit code %d\n" % end for end in ((b"a", 1), (b"b", 75)))
    watch = hosts.HostWatch(io.BytesIO(said), io.BytesIO(), ["a", "b"])
    watch.finish()
    assert (watch.host, watch.status, watch.stopped) == ("a", 1, True)


def test_output_is_that_of_the_run_alone(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    said = b'a.b: {"loss": 1,\na.b:\na.b: "a.b: c": 2}\nanb: x\n'
    hosts.HostWatch(io.BytesIO(b"a.b: a notice\n"), io.BytesIO(said), ["a.b", "c"]).finish()
    assert capfdbinary.readouterr() == (b'{"loss": 1,\n\n"a.b: c": 2}\nanb: x\n', b"a.b: a notice\n")
