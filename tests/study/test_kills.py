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

from subspace.study.files import TIMES
from tests.helpers.studies import STUDY, make_study

pytestmark = [pytest.mark.long, pytest.mark.processes]
KILLS = 5


def command(file: Path) -> list[str]:
    return [sys.executable, "-m", "subspace", "study", "run", str(file)]


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


def test_a_study_that_is_killed_five_times_leaves_the_same_bytes(tmp_path: Path) -> None:
    """Two methods, three rates, two final seeds, and halving: SIGKILL to the study alone, or to all that it started."""
    whole, killed = (
        make_study(tmp_path, text=STUDY.replace("{runs}", str(tmp_path / name)), name=name)
        for name in ("whole", "killed")
    )
    subprocess.run(command(whole), check=True, capture_output=True)
    draw = random.Random(int(os.environ.get("KILLS_SEED", "0")))
    for number in range(KILLS):
        before = logged(tmp_path / "killed")
        process = subprocess.Popen(
            command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
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
    subprocess.run(command(killed), check=True, capture_output=True)
    one, other = (tmp_path / name / name for name in ("whole", "killed"))
    assert cells(other) == cells(one)
    assert (other / "curves.csv").read_bytes() == (one / "curves.csv").read_bytes()
    for adapter in sorted(one.glob("*/*/seed-[01]/adapter/*.safetensors")):
        assert (other / adapter.relative_to(one)).read_bytes() == adapter.read_bytes()
