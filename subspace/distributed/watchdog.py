"""A watch over the training loop: a run that no longer moves is ended, and every process says where it stood.

A process that waits for another one waits in silence, for ever or until a collective's own time limit, and then knows
only that it has waited. Here each process has a thread that looks at how long ago the loop was last seen to move.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Self

#: Seconds in which the processes have all had their say, before the first of them ends the run.
REPORT_GRACE_S = 5.0
FRAMES = 4  # the innermost of a stack that are shown, after the last of this package; the file has all


class Watchdog:
    """While entered, expects :meth:`beat` at least every so many seconds; else it reports, and ends the process.

    Args:
        folder: for the whole stacks, ``rank-N.txt`` each.
        seconds: without a beat; 0 is no watch.
        rank: this process's number.
        ranks: of how many.
    """

    def __init__(self, folder: Path, seconds: float, rank: int, ranks: int) -> None:
        self.folder, self.seconds, self.rank, self.ranks = folder, seconds, rank, ranks
        self.step = 0
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._last = time.monotonic()
        (self.folder / f"rank-{self.rank}.txt").unlink(missing_ok=True)  # an earlier life's
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def beat(self, step: int) -> None:
        """Note that the loop moves, and is in this step."""
        self.step, self._last = step, time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._last > self.seconds:
                self._report()
                return

    def _report(self) -> None:
        stack = traceback.format_stack(sys._current_frames()[self._watched])
        head = f"rank {self.rank} of {self.ranks} has been in step {self.step} for {self.seconds:g} s, here:\n"
        # One write, so that what several processes say at a time stays apart.
        own = [frame for frame in stack[:-FRAMES] if str(Path(__file__).parent) in frame][-1:]
        os.write(2, "".join([head, *own, *stack[-FRAMES:]]).encode())
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"rank-{self.rank}.txt").write_text("".join([head, *stack]))
        if self._ended.wait(REPORT_GRACE_S if self.rank == 0 else 2 * REPORT_GRACE_S):
            return  # it moved after all
        if self.rank == 0:
            silent = [str(n) for n in range(self.ranks) if not (self.folder / f"rank-{n}.txt").exists()]
            nothing = f" Nothing was heard of rank {', '.join(silent)}." if silent else ""
            os.write(2, f"error: step {self.step} hangs. Each rank is where it says above.{nothing}\n".encode())
        os._exit(1)
