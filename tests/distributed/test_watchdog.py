"""What the watchdog prints of a process that hangs; test_signals.py sees whole runs hang."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from subspace.common import files
from subspace.distributed.watchdog import FRAMES

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
with watchdog.Watchdog(folder, seconds=0.2, rank=0, ranks=1):
    write_file(folder / "file", lambda path: foreign(int(sys.argv[2])))
"""


@pytest.mark.processes
@pytest.mark.parametrize("depth", [1, FRAMES - 2, FRAMES - 1, FRAMES, 3 * FRAMES])
def test_a_report_has_the_line_of_this_package_that_waits(tmp_path: Path, depth: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path), str(depth)],
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
