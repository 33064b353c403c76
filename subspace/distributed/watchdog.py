"""End a training run that hangs, with a report of where each process is.

A process that waits for another one waits silently, for ever or until the time limit of a collective, whose error says
only that it has waited. Here a thread in each process watches the time since the loop's last sign of life.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Self

#: Seconds from a process's report to its end, so that all processes have reported before the first one ends.
REPORT_GRACE_S = 5.0
FRAMES = 4  # innermost frames that are printed, after the last one of this package; the file has the whole stacks


class Watchdog:
    """While entered, expects :meth:`beat` at least every so many seconds; otherwise reports and ends the process.

    Args:
        folder: for ``rank-N.txt``, the stacks of all threads of a process.
        seconds: without a beat; 0 switches the watchdog off.
        rank: this process's number.
        ranks: the number of processes.
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
        (self.folder / f"rank-{self.rank}.txt").unlink(missing_ok=True)  # from a previous run
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def beat(self, step: int) -> None:
        """Record a sign of life in a step."""
        self.step, self._last = step, time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._last > self.seconds:
                self._report()
                return

    def _report(self) -> None:
        stack = traceback.format_stack(sys._current_frames()[self._watched])
        head = f"rank {self.rank} of {self.ranks} has been in step {self.step} for {self.seconds:g} s, here:\n"
        # One write, so that reports of several processes are not mixed.
        own = [frame for frame in stack[:-FRAMES] if str(Path(__file__).parent) in frame][-1:]
        os.write(2, "".join([head, *own, *stack[-FRAMES:]]).encode())
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank-{self.rank}.txt").open("w") as file:
                print(head, file=file, flush=True)  # faulthandler writes to the descriptor, past the buffer
                faulthandler.dump_traceback(file)
        if self._ended.wait(REPORT_GRACE_S if self.rank == 0 else 2 * REPORT_GRACE_S):
            return  # the loop has ended after all
        if self.rank == 0:
            silent = [str(n) for n in range(self.ranks) if not (self.folder / f"rank-{n}.txt").exists()]
            missing = f" No report from rank {', '.join(silent)}." if silent else ""
            os.write(2, f"error: step {self.step} hangs. The reports above say where each rank is.{missing}\n".encode())
        os._exit(1)
