"""``subspace doctor`` as users run it: in this process, in two, and with faults planted in one of two."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from subspace.cli import main as cli
from subspace.common.paths import REPOSITORY
from subspace.distributed import launcher
from subspace.doctor import examine
from subspace.doctor.base import Asked
from subspace.doctor.checks import CHECKS
from subspace.doctor.checks.network import AllReduce
from tests.helpers.material import make_material

NAMES = [check.name for check in CHECKS]

#: Where other tests take the cores, a process may come late.
PATIENT = ("--json", "--wait", "120")
#: Seen by Python before anything else: the clock of this process is a minute ahead.
CLOCK = "import time; real = time.time; time.time = lambda: real() + 60\n"


def lines(report: Mapping[str, Any]) -> dict[str, str]:
    """Return each check's state and what it found, as one text."""
    return {
        check["name"]: " | ".join([check["state"], *(finding["found"] for finding in check["findings"])])
        for check in report["checks"]
    }


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in NAMES if not re.search(rf"^ *{name} +(ok|warning|skipped) ", shown, re.MULTILINE)] == []
    assert list(Path.cwd().glob(".*")) == []  # it leaves nothing


def test_a_full_disk_and_missing_data_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_material(tmp_path)
    (tmp_path / "data.jsonl").unlink()
    real = os.statvfs

    def full(path: Any) -> os.statvfs_result:
        found = list(real(path))
        found[4] = 1  # f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", full)
    assert cli.main(["doctor", str(config), "train.steps=2", "--json"]) == 2
    found = lines(json.loads(capsys.readouterr().out))
    assert list(found) == NAMES
    assert found["disk"].startswith("failed | ")
    assert found["prepared"].startswith("failed | ")
    assert "is not there" in found["prepared"]
    assert found["settings"].startswith("ok | ")


def test_a_port_that_is_taken_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        assert cli.main(["doctor", "--json"]) == 2
    found = lines(json.loads(capsys.readouterr().out))
    assert found["start"].startswith(f"failed | rank 0 cannot listen at 127.0.0.1:{port}: ")
    assert found["all-reduce"] == "skipped | not reached"
    assert found["versions"].startswith("ok | ")


@pytest.mark.long
@pytest.mark.processes
def test_two_processes_through_the_launcher(tmp_path: Path) -> None:
    config = make_material(tmp_path)
    command = [
        sys.executable,
        "-m",
        "subspace",
        "doctor",
        str(config),
        "evaluate.tasks=[]",
        "--processes",
        "2",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    report = json.loads(done.stdout)
    found = lines(report)
    assert (done.returncode, report["status"]) == (0, 0), (found, done.stderr[-2000:])
    assert list(found) == NAMES
    assert [name for name, text in found.items() if text.startswith(("failed", "skipped"))] == []
    assert found["start"].startswith("ok | 2 processes on ")
    assert "gloo: 4.1 kB in " in found["all-reduce"]
    assert "a step reduces" in found["all-reduce"]


@pytest.fixture
def first_of_two(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Make this process rank 0 of 2, as srun would, and return the variables of rank 1."""
    port = str(launcher.free_port())
    common = {"WORLD_SIZE": "2", "LOCAL_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**common, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    return {**os.environ, **common, "RANK": "1"}


@pytest.mark.processes
def test_what_is_wrong_with_one_of_two_ranks_is_found(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    first_of_two: dict[str, str],
) -> None:
    """Another version, clock, folder and configuration; no compiler, no data."""
    folders = [tmp_path / name for name in ("a", "b")]
    make_material(folders[0])
    shutil.copytree(folders[0], folders[1])
    for folder in folders:
        text = (folder / "run.yaml").read_text().replace(str(folders[0]), ".")
        (folder / "run.yaml").write_text(text)
    (folders[1] / "data.jsonl").unlink()
    planted = tmp_path / "planted"
    (planted / "bitsandbytes-0.1.dist-info").mkdir(parents=True)
    (planted / "bitsandbytes-0.1.dist-info" / "METADATA").write_text("Name: bitsandbytes\nVersion: 0.1\n")
    (planted / "sitecustomize.py").write_text(CLOCK)
    changed = {"PYTHONPATH": f"{planted}{os.pathsep}{REPOSITORY}", "PATH": str(planted), "CXX": ""}

    arguments = ["doctor", "run.yaml", "train.compile=true", *PATIENT]
    second = subprocess.Popen(
        [sys.executable, "-m", "subspace", *arguments],
        cwd=folders[1],
        env={**first_of_two, **changed},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    monkeypatch.chdir(folders[0])
    assert cli.main(arguments) == 2
    said, complaint = second.communicate(timeout=300)
    assert (second.returncode, said) == (2, ""), complaint[-2000:]
    found = lines(json.loads(capsys.readouterr().out))
    assert "bitsandbytes differs: " in found["versions"]
    assert "0.1 (rank 1 on " in found["versions"]
    assert "data ./data.jsonl: the data file ./data.jsonl is not there. " in found["prepared"]
    assert "train.compile needs a C++ compiler, and neither g++ nor clang++ is here (rank 1 on " in found["settings"]
    assert "train.compile needs a C++ compiler (rank 1 on " in found["compilers"]
    assert f"is not in {folders[0]} of rank 0" in found["shared"]
    assert "the clock of " in found["clocks"]
    assert found["all-reduce"].startswith("ok | ")
    assert [file.name for folder in folders for file in folder.glob(".*")] == []  # it leaves nothing


def test_a_rank_that_does_not_come_is_named_in_time(
    capsys: pytest.CaptureFixture[str], first_of_two: dict[str, str]
) -> None:
    assert cli.main(["doctor", "--wait", "1", "--json"]) == 2
    found = lines(json.loads(capsys.readouterr().out))
    assert found["start"].startswith("failed | rank 1 of 2 did not come to 127.0.0.1:")
    assert found["all-reduce"] == "skipped | not reached"


def test_a_rank_that_cannot_reach_the_first_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, first_of_two: dict[str, str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(launcher, "REPORT_DELAY_S", 0.0)
    assert cli.main(["doctor", "--wait", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: rank 1 on ")
    assert "cannot reach rank 0 at 127.0.0.1:" in said


def test_a_process_group_that_hangs_is_given_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    given_up = threading.Event()

    def hang(self: AllReduce, asked: Asked) -> dict[str, Any]:
        assert given_up.wait(60)
        return {}

    def leave(status: int) -> None:  # in place of the end of this process
        left.append(status)
        given_up.set()

    monkeypatch.setattr(AllReduce, "collect", hang)
    monkeypatch.setattr(examine, "_leave", leave)
    cli.main(["doctor", "--wait", "1", "--json"])
    assert left == [2]
    report, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)  # another one follows: it went on after all
    assert lines(report)["all-reduce"].startswith("failed | not done within 1 s (rank 0 on ")


def test_a_library_that_all_stand_on_is_missed_in_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "subspace.doctor.examine", None)  # as if an import in it failed
    assert cli.main(["doctor"]) == 2
    assert "cannot import what every command needs: import of subspace.doctor.examine" in capsys.readouterr().err


def test_hosts_that_ssh_does_not_reach_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(
        '#!/bin/bash\ncase "$*" in *" good "*) eval "${@: -1}" ;; *" empty "*) echo hello ;;\n'
        '*) echo "ssh: connect to host bad port 22: No route to host" >&2; exit 255 ;; esac\n'
    )
    (tmp_path / "pdsh").write_text("#!/bin/sh\nexit 1\n")
    for program in (ssh, tmp_path / "pdsh"):
        program.chmod(0o755)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("good slots=1\nempty slots=1\nbad slots=1\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert cli.main(["doctor", "--hostfile", str(hostfile), "--json"]) == 2
    found = lines(json.loads(capsys.readouterr().out))
    assert list(found) == NAMES
    assert found["start"].startswith("failed | empty has no folder ")
    assert "ssh cannot reach bad: ssh: connect to host bad port 22: No route to host" in found["start"]
    assert "good" not in found["start"]


@pytest.mark.processes
def test_the_launchers_start_it(tmp_path: Path) -> None:
    """By a hostfile, and under SLURM, where no configuration need be given."""
    (tmp_path / "hostfile").write_text("a slots=1\nb slots=1\n")
    job = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "a,b", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1"}
    for command in (["launch/cluster.sh", str(tmp_path / "hostfile"), "doctor"], ["launch/slurm.sh", "doctor"]):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, **job, "PATH": path}
        printed = subprocess.run(
            ["bash", *command, "--dry-run"], env=environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout
        assert re.search(r"subspace doctor( --wait 30)?\s*$", printed), printed


def test_help_lists_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["doctor", "--help"])
    told = capsys.readouterr().out
    assert [check.name for check in CHECKS if f"  {check.name} " not in told or check.asks not in told] == []
