"""Termination of hanging training runs, with stack traces of every process.

A process that waits for another one waits silently, for ever or until a collective's timeout, whose error does not
say which process is missing. Here a thread in each process monitors the time since the training loop's last heartbeat.
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

from subspace.common.paths import PACKAGE
from subspace.distributed import peers

#: Seconds from a process's report to its exit, so that all processes have reported before the first one exits.
REPORT_GRACE_S = 5.0
#: Innermost frames to print, after the last one of this package; the file has the full stacks.
FRAMES = 4


class Watchdog:
    """Context manager that reports and ends the process if :meth:`beat` is not called for ``seconds``.

    Args:
        folder: where ``rank-N.txt`` is written, the stack traces of a process's threads.
        seconds: timeout; 0 disables the watchdog.
        rank: this process's rank.
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
        """Record a heartbeat in a step."""
        self.step, self._last = step, time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._last > self.seconds:
                self._report()
                return

    def _report(self) -> None:
        peers.report_hang()
        stack = traceback.extract_stack(sys._current_frames()[self._watched])
        head = f"rank {self.rank} of {self.ranks} has been in step {self.step} for {self.seconds:g} s, here:\n"
        # One write, so that reports of several processes are not mixed.
        os.write(2, "".join([head, *traceback.format_list(_select_frames(stack))]).encode())
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank-{self.rank}.txt").open("w") as file:
                print(head, file=file, flush=True)  # faulthandler writes to the descriptor, past the buffer
                faulthandler.dump_traceback(file)
        if self._ended.wait(REPORT_GRACE_S if self.rank == 0 else 2 * REPORT_GRACE_S):
            return  # the loop has ended meanwhile
        if self.rank == 0:
            missing = f" No report from rank {', '.join(silent)}." if (silent := self._silent()) else ""
            os.write(2, f"error: step {self.step} hangs. The reports above say where each rank is.{missing}\n".encode())
            peers.report_failure(1)
        os._exit(1)

    def _silent(self) -> list[str]:
        """Return the ranks that have not reported: by their connections, or else by files on this machine."""
        reports = peers.hang_reports()
        if reports is None:
            if peers.several_launchers():
                return []
            reports = {n for n in range(self.ranks) if (self.folder / f"rank-{n}.txt").exists()}
        return [str(n) for n in range(self.ranks) if n not in reports]


def _select_frames(stack: list[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Return the innermost frames, preceded by the last one of this package if that lies further out."""
    last_own = [frame for frame in stack if Path(frame.filename).resolve().is_relative_to(PACKAGE)][-1:]
    return [*(frame for frame in last_own if frame not in stack[-FRAMES:]), *stack[-FRAMES:]]
