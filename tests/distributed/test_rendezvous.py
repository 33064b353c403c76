"""A run on one machine meets where no other machine can join it, and junk in the environment is answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from subspace.distributed import launcher
from subspace.distributed.collectives import shutdown
from subspace.distributed.engine import init_distributed
from subspace.errors import UserError

REPORT = """
import json, psutil, sys
from subspace.distributed.collectives import barrier, rank, shutdown
from subspace.distributed.engine import init_distributed
init_distributed()
barrier()
found = [c.laddr.ip for c in psutil.Process().net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
barrier()
shutdown()
print(json.dumps([rank(), found]))
"""


def listening() -> list[str]:
    """Return the addresses at which this process listens."""
    connections = psutil.Process().net_connections(kind="tcp")
    return [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]


def test_a_process_alone_listens_on_the_loopback_interface() -> None:
    shutdown()  # of a group that an earlier test left
    before = listening()
    init_distributed()
    try:
        after = listening()
    finally:
        shutdown()
    assert len(after) > len(before)
    assert {address for address in after if address not in before} <= {"127.0.0.1", "::1"}


@pytest.mark.long
@pytest.mark.processes
def test_two_processes_listen_on_the_loopback_interface(tmp_path: Path) -> None:
    script = tmp_path / "report.py"
    script.write_text(REPORT)
    common = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(launcher.free_port())
    started = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        said, _ = process.communicate(timeout=120)
        _, found = json.loads(said.splitlines()[-1])
        assert found
        assert set(found) <= {"127.0.0.1", "::1"}


GOOD = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "node-1.local",
    "MASTER_PORT": "29500",
}


def test_what_a_launcher_says_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    assert launcher.launch_fault() is None
    assert (launcher.launched_rank(), launcher.launched_world_size()) == (1, 2)


def test_torchrun_counts_though_another_launchers_variable_is_still_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**GOOD, "LOCAL_SIZE": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    assert launcher.launch_fault() is None
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert "LOCAL_SIZE is 1" in (launcher.launch_fault() or "")


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("WORLD_SIZE", "abc", "WORLD_SIZE is 'abc', but should be a number from 1"),
        ("RANK", "2", "RANK is 2 where WORLD_SIZE is 2, and ranks are counted from 0"),
        ("LOCAL_RANK", "7", "LOCAL_RANK is 7 where LOCAL_SIZE is 2"),
        ("MASTER_PORT", "-1", "MASTER_PORT is '-1', but should be a number from 1 to 65,535"),
        ("MASTER_ADDR", "a b", "MASTER_ADDR is 'a b', which is no host's name"),
    ],
)
def test_junk_that_looks_like_a_launcher_is_refused_at_once(
    name: str, value: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, text in {**GOOD, name: value}.items():
        monkeypatch.setenv(key, text)
    with pytest.raises(UserError, match=complaint):
        launcher.init_rank_env()
    assert launcher.should_report_error(2)  # without waiting for a first process that there is not


def test_processes_without_an_address_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, text in {**GOOD, "MASTER_PORT": ""}.items():
        if text:
            monkeypatch.setenv(key, text)
    with pytest.raises(UserError, match="MASTER_PORT not, so that the processes cannot meet"):
        init_distributed()


def test_half_of_a_launcher_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "abc")
    assert not launcher.under_launcher()
    assert launcher.launched_rank() == 0


def test_more_processes_than_cores_can_serve_are_refused() -> None:
    with pytest.raises(UserError, match="processes were requested, but this machine has"):
        launcher.build_launch(["train", "x.yaml"], processes=100_000)
