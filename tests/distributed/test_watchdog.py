"""What the watchdog prints of a process that hangs; test_signals.py sees whole runs hang."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from subspace.common import files
from subspace.common.progress import no_progress
from subspace.distributed import watchdog
from subspace.distributed.watchdog import FRAMES, Watchdog

HANGS = """
import sys, time
from pathlib import Path
from subspace.common.files import write_file
from subspace.distributed import watchdog

watchdog.REPORT_GRACE_S = 0.1  # there is no other process to wait for

def foreign(frames):
    if frames > 1:
        foreign(frames - 1)
    else:
        time.sleep(60)

folder = Path(sys.argv[1])
rank, ranks = map(int, sys.argv[3:])
with watchdog.Watchdog(folder, seconds=0.2, rank=rank, ranks=ranks):
    write_file(folder / "file", lambda path: foreign(int(sys.argv[2])))
"""


@pytest.mark.processes
@pytest.mark.parametrize("depth", [1, FRAMES - 2, FRAMES - 1, FRAMES, 3 * FRAMES])
def test_a_report_has_the_line_of_this_package_that_waits(tmp_path: Path, depth: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path), str(depth), "0", "1"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    head, *report, end = done.stderr.splitlines()
    assert head == "rank 0 of 1 has been in step 0 for 0.2 s, here:"
    frames = [line for line in report if line.startswith('  File "')]
    own = [line for line in frames if f'"{files.__file__}"' in line]
    assert len(own) == 1
    assert own[0].endswith("in write_file")
    # After the callback that this package called, one frame for each call of the foreign function.
    assert len(frames) == (FRAMES if depth + 1 < FRAMES else FRAMES + 1)
    assert end == "error: step 0 hangs. The reports above say where each rank is."


@pytest.mark.processes
def test_where_the_first_rank_is_silent_the_next_one_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path), "1", "1", "3"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("rank 1 of 3 has been in step 0 for 0.2 s, here:\n")
    end = "error: step 0 hangs. The reports above say where each rank is. No report from rank 0, 2.\n"
    assert done.stderr.endswith(end)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What is set when the watchdog would end this process."""
    event = threading.Event()
    monkeypatch.setattr(watchdog, "REPORT_GRACE_S", 0.0)
    monkeypatch.setattr(os, "_exit", lambda status: event.set())
    return event


def test_one_watchdog_inside_another_takes_its_place(tmp_path: Path, ended: threading.Event) -> None:
    with Watchdog(tmp_path, 0.1, 0, 1) as outer:
        with Watchdog(tmp_path / "inner", 60, 0, 1):
            watchdog.beat("something long")
            assert not ended.wait(0.5)
        outer.beat("the end")
        assert ended.wait(10)
    assert "in the end for 0.1 s" in (tmp_path / "rank-0.txt").read_text()


def test_patience_and_progress_put_off_the_end(tmp_path: Path, ended: threading.Event) -> None:
    with Watchdog(tmp_path, 0.2, 0, 1) as dog:
        watchdog.beat("loading", 100)
        assert dog.allowed == pytest.approx(20)
        with watchdog.beating(no_progress)("decomposing", 3, "matrices") as at:
            assert dog.doing == "decomposing"
            assert dog.allowed == pytest.approx(0.2)
            for done in range(3):
                at(done)
        watchdog.beat("loading", 100)
    assert not ended.is_set()


def test_a_link_in_the_place_of_a_report_is_not_followed(tmp_path: Path, ended: threading.Event) -> None:
    with Watchdog(tmp_path / "hang", 0.1, 0, 1):
        (tmp_path / "hang").mkdir()
        (tmp_path / "hang" / "rank-0.txt").symlink_to(tmp_path / "victim")
        assert ended.wait(10)
    assert not (tmp_path / "victim").exists()
