"""Termination of hanging runs, with stack traces of every process.

A process that waits for another one waits silently, for ever or until a collective's timeout, whose error does not
say which process is missing. Here a thread in each process monitors the time since its last heartbeat: while the
processes meet, while a model is loaded, in the training loop, while items are scored.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from subspace.common.paths import PACKAGE
from subspace.common.progress import Progress, ProgressCallback, signs
from subspace.distributed import peers
from subspace.distributed.signals import write_status

#: Seconds from a process's report to its exit, so that all processes have reported before the first one exits.
REPORT_GRACE_S = 5.0
#: How many times as long as a step the loading of a model may take.
LOADING_PATIENCE = 4.0
#: Innermost frames to print, after the last one of this package; the file has the full stacks.
FRAMES = 4


class Watchdog:
    """Context manager that reports and ends the process if :meth:`beat` is not called for ``seconds``.

    One inside another takes its place until it ends.

    Args:
        folder: where ``rank-N.txt`` is written, the stack traces of a process's threads.
        seconds: timeout; 0 disables the watchdog.
        rank: this process's rank.
        ranks: the number of processes.
    """

    def __init__(self, folder: Path, seconds: float, rank: int, ranks: int) -> None:
        self.folder, self.seconds, self.rank, self.ranks = folder, seconds, rank, ranks
        self.doing, self.allowed = "step 0", seconds
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._outer: Watchdog | None = None

    def __enter__(self) -> Self:
        global _current
        self._last = time.monotonic()
        (self.folder / f"rank-{self.rank}.txt").unlink(missing_ok=True)  # from a previous run
        self._outer, _current = _current, self
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        self._ended.set()
        _current = self._outer
        if self._outer:
            self._outer.beat(self._outer.doing)

    def beat(self, doing: int | str, patience: float = 1.0) -> None:
        """Record a heartbeat: in a step, or in another part of the run, which may take ``patience`` times as long."""
        self.doing = f"step {doing}" if isinstance(doing, int) else doing
        self._last, self.allowed = time.monotonic(), patience * self.seconds

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            if _current is self and time.monotonic() - self._last > self.allowed:
                self._report()
                return

    def _report(self) -> None:
        peers.report_hang()
        stack = traceback.extract_stack(sys._current_frames()[self._watched])
        head = f"rank {self.rank} of {self.ranks} has been in {self.doing} for {self.allowed:g} s, here:\n"
        # One write, so that reports of several processes are not mixed.
        os.write(2, "".join([head, *traceback.format_list(_select_frames(stack))]).encode())
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank-{self.rank}.txt").open("x") as file:  # which follows no link
                print(head, file=file, flush=True)  # faulthandler writes to the descriptor, past the buffer
                faulthandler.dump_traceback(file)
        if self._ended.wait(REPORT_GRACE_S if self.rank == 0 else 2 * REPORT_GRACE_S):
            return  # the loop has ended meanwhile
        if self._speaks():
            missing = f" No report from rank {', '.join(silent)}." if (silent := self._silent()) else ""
            said = f"error: {self.doing} hangs. The reports above say where each rank is.{missing}\n"
            os.write(2, said.encode())
            write_status(1)
            peers.report_failure(1)
        os._exit(1)

    def _speaks(self) -> bool:
        """Return True on the rank that says what hangs: the first, or where that is silent the first that reported."""
        if self.rank == 0:
            return True
        if peers.failure_reported():
            return False
        if peers.several_launchers():  # what hangs on other machines is known to the first rank only
            return os.environ.get("LOCAL_RANK") in ("0", "1")
        reports = (n for n in range(self.ranks) if (self.folder / f"rank-{n}.txt").exists())
        return next(reports, self.rank) == self.rank

    def _silent(self) -> list[str]:
        """Return the ranks that have not reported: by their connections, or else by files on this machine."""
        reports = peers.hang_reports() if self.rank == 0 else None
        if reports is None:
            if peers.several_launchers():
                return [] if self.rank == 0 else ["0"]
            reports = {n for n in range(self.ranks) if (self.folder / f"rank-{n}.txt").exists()}
        return [str(n) for n in range(self.ranks) if n not in reports]


_current: Watchdog | None = None


def beat(doing: int | str, patience: float = 1.0) -> None:
    """Tell the watchdog of this process, if there is one, what the process is doing now: see :meth:`Watchdog.beat`."""
    if isinstance(doing, str):
        signs.note(doing)
    if _current:
        _current.beat(doing, patience)


def beating(progress: Progress) -> Progress:
    """Return a display of progress that tells the watchdog of each advance."""

    @contextlib.contextmanager
    def watched(title: str, total: float = 0, unit: str = "") -> Iterator[ProgressCallback]:
        beat(title)
        with progress(title, total, unit) as at:

            def advance(done: float, detail: str = "") -> None:
                beat(title)
                at(done, detail)

            yield advance

    return watched


def _select_frames(stack: list[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Return the innermost frames, preceded by the last one of this package if that lies further out."""
    last_own = [frame for frame in stack if Path(frame.filename).resolve().is_relative_to(PACKAGE)][-1:]
    return [*(frame for frame in last_own if frame not in stack[-FRAMES:]), *stack[-FRAMES:]]
