"""A study in processes of its own, killed at any moment: the same command goes on, to the same bytes."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from subspace.errors import RunStopped
from subspace.study.files import TIMES
from tests.helpers.studies import STUDY, make_study

pytestmark = [pytest.mark.long, pytest.mark.processes]
KILLS = 5


def command(file: Path, parallel: int) -> list[str]:
    return [sys.executable, "-m", "subspace", "study", "run", str(file), "--parallel", str(parallel), "--together", "3"]


def begun(file: Path, parallel: int) -> subprocess.Popen[bytes]:
    """Start a study in a session of its own."""
    given = command(file, parallel)
    return subprocess.Popen(given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def is_over(process: subprocess.Popen[bytes]) -> bool:
    """Whether nothing of a session is left."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def cells(folder: Path) -> bytes:
    """Return a study's ``cells.csv`` without the columns that depend on the machine, which come last."""
    with (folder / "cells.csv").open(newline="") as opened:
        rows = list(csv.reader(opened))
    kept = len(rows[0]) - len(TIMES)
    assert tuple(rows[0][kept:]) == TIMES
    return "\n".join(",".join(row[:kept]) for row in rows).encode()


def logged(folder: Path) -> list[bytes]:
    """Return what the logs of a study's cells hold."""
    return [log.read_bytes() for log in sorted(folder.glob("**/log.jsonl"))]


def test_a_signal_ends_all_commands_that_run_at_a_time(tmp_path: Path) -> None:
    file = make_study(
        tmp_path, text=STUDY.replace("{runs}", str(tmp_path)).replace("train.steps: 5", "train.steps: 500")
    )
    process = begun(file, 2)
    until = time.monotonic() + 300
    while len(logged(tmp_path / "toy")) < 6:  # of two passes
        assert process.poll() is None
        assert time.monotonic() < until, "nothing is trained"
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == RunStopped.status
    while not is_over(process):
        assert time.monotonic() < until, "something is left"
        time.sleep(0.1)
    assert len(list((tmp_path / "toy").glob("*/*/*/checkpoints/step-*"))) == 6


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_study_that_is_killed_five_times_leaves_the_same_bytes(parallel: int, tmp_path: Path) -> None:
    """Two methods, three rates, two final seeds, and halving: SIGKILL to the study alone, or to all that it started."""
    whole, killed = (
        make_study(tmp_path, text=STUDY.replace("{runs}", str(tmp_path / name)), name=name)
        for name in ("whole", "killed")
    )
    subprocess.run(command(whole, parallel), check=True, capture_output=True)
    draw = random.Random(int(os.environ.get("KILLS_SEED", "0")))
    for number in range(KILLS):
        before = logged(tmp_path / "killed")
        process = begun(killed, parallel)
        until = time.monotonic() + 300
        while logged(tmp_path / "killed") == before:
            assert process.poll() is None, "the study ended before it was killed as often as it was to be"
            assert time.monotonic() < until, "nothing is trained"
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))  # in a step, a checkpoint, the end of a pass, or before the next
        if number % 2:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()  # its training ends by itself
        process.wait()
    subprocess.run(command(killed, parallel), check=True, capture_output=True)
    one, other = (tmp_path / name / name for name in ("whole", "killed"))
    assert cells(other) == cells(one)
    assert (other / "curves.csv").read_bytes() == (one / "curves.csv").read_bytes()
    for adapter in sorted(one.glob("*/*/seed-[01]/adapter/*.safetensors")):
        assert (other / adapter.relative_to(one)).read_bytes() == adapter.read_bytes()
