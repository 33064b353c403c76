"""Who holds a folder is told; a lock outlives nobody; another machine's process counts while it gives a sign."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from subspace.common import locks
from subspace.common.locks import HOLDER, Busy, has_ended, held, in_use, is_held, locked, this_process
from subspace.common.paths import REPOSITORY
from subspace.errors import UserError

HOLDS = """
import sys, time
from pathlib import Path
from subspace.common.locks import in_use
with in_use(Path(sys.argv[1])):
    print("holds it", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder ``run``."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        assert process.stdout.readline() == "holds it\n"
        yield process
        process.kill()


@pytest.mark.processes
def test_who_holds_a_folder_is_told(other: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused, in_use(tmp_path / "run"):
        pass
    told = rf"is in use by process {other.pid} on \S+, since [\d :-]+: -c .*\. Wait for it, or end it on \S+: kill \d+$"
    assert re.search(told, str(refused.value))


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_does_not_outlive_its_process(
    other: subprocess.Popen[str], number: signal.Signals, tmp_path: Path
) -> None:
    other.send_signal(number)
    other.wait()
    assert (tmp_path / "run" / HOLDER).exists()
    with in_use(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / HOLDER).read_text())["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_nothing_is_left_of_a_lock(tmp_path: Path) -> None:
    with in_use(tmp_path / "runs" / "run"):
        assert (tmp_path / "runs" / "run").is_dir()
    assert list(tmp_path.iterdir()) == []
    with in_use(tmp_path / "runs" / "run"):
        (tmp_path / "runs" / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "runs" / "run").iterdir()] == ["file"]


def test_a_thread_is_refused_as_well(tmp_path: Path) -> None:
    with (
        in_use(tmp_path / "run"),
        pytest.raises(UserError, match=f"process {os.getpid()} on"),
        in_use(tmp_path / "run"),
    ):
        pass


def leave_record(folder: Path, **changes: object) -> Path:
    """Leave what a process of another machine writes there."""
    folder.mkdir(exist_ok=True)
    about = {"host": "node7", "machine": "another", "pid": 12, "since": "10:00", "command": "subspace train"}
    (folder / HOLDER).write_text(json.dumps({**about, **changes}))
    return folder / HOLDER


def test_another_machines_process_counts_while_it_gives_a_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "SILENCE_S", 60.0)
    record = leave_record(tmp_path / "run", host="node7\x1b[31m")
    renewal = threading.Timer(0.2, os.utime, [record])
    renewal.start()
    said = r"in use by process 12 on node7\[31m, since 10:00: subspace train"
    with pytest.raises(UserError, match=said), in_use(tmp_path / "run"):
        pass
    renewal.join()
    assert record.exists()  # it is the other's


def test_another_machines_process_that_is_silent_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "SILENCE_S", 0.3)
    leave_record(tmp_path / "run")
    with caplog.at_level(logging.INFO, logger="subspace"), in_use(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / HOLDER).read_text())["pid"] == os.getpid()
    assert "to see if process 12 on node7 has ended" in caplog.text


def test_a_record_that_is_old_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    record = leave_record(tmp_path / "run")
    os.utime(record, (1e9, 1e9))
    with in_use(tmp_path / "run"):
        pass


@pytest.mark.parametrize("content", ["", "[]", "null", '{"host": 1}', "[" * 9999, "\0"])
def test_a_spoiled_record_holds_nobody_up(content: str, tmp_path: Path) -> None:
    leave_record(tmp_path / "run").write_text(content)
    with in_use(tmp_path / "run"):
        pass


def test_a_lock_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "RENEWAL_S", 0.01)
    renewed = threading.Event()
    monkeypatch.setattr(os, "utime", lambda path: renewed.set() if path.name == HOLDER else None)
    with in_use(tmp_path / "run"):
        assert renewed.wait(10)


@pytest.mark.parametrize("name", [".lock", HOLDER])
def test_a_link_in_its_place_is_not_followed(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "victim")
    try:
        with in_use(tmp_path / "run"):
            pass
    except OSError:
        assert name == ".lock"
    assert not (tmp_path / "victim").exists()


def test_a_cache_s_lock_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / ".folder.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"), locked(tmp_path / "folder"):
        pass
    assert not (tmp_path / "victim").exists()


def test_who_waits_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(locks, "PATIENCE_S", 0.1)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path / "folder"):
            entered.set()
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(10)
    with pytest.raises(Busy), locked(tmp_path / "folder", wait=False):
        pass
    threading.Timer(0.3, leave.set).start()
    with caplog.at_level(logging.INFO, logger="subspace"), locked(tmp_path / "folder"):
        pass
    holder.join()
    assert "waiting for another process, which is writing" in caplog.text


def test_a_file_is_held_by_whoever_is_there(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "file")
    with held(tmp_path / "file"):
        assert is_held(tmp_path / "file")
    assert not is_held(tmp_path / "file")
    assert not is_held(tmp_path / "no folder" / "file")


def test_a_process_that_is_there_has_not_ended() -> None:
    assert not has_ended(this_process())
    assert not has_ended("another-1")  # of another machine nothing is known
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert has_ended(f"{this_process().partition('-')[0]}-{process.pid:x}")
