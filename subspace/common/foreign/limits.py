"""Limits of time and memory for what somebody else's file makes this process do: templates and regular expressions.

``(a+)+$`` takes longer than anybody waits over thirty letters, and ``'a' * 10 ** 11`` takes all memory. Python's own
machinery for both heeds signals and failed allocations, so a timer and the process's limit of address space suffice.
"""

from __future__ import annotations

import math
import resource
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from subspace.errors import UserError

#: Seconds and bytes that one template, expression or match may take. Honest ones take microseconds and kilobytes.
MOST_SECONDS, MOST_MEMORY = 2.0, 1 << 30
#: Seconds between two looks of the timer: a limit inside another one ends at most so late.
LOOK_SECONDS = 0.25


class _Overtime(BaseException):
    """The time is over. Not an Exception, so that nothing in between takes it for a failure of its own."""


#: The limit inside which the main thread is, the innermost.
_innermost: limited | None = None


def _look(number: int, frame: FrameType | None) -> None:
    if frame is not None and frame.f_code.co_filename == __file__:
        return  # a limit is being entered or left, and must not stay half so: the next look, or the next limit, says it
    if _innermost and time.monotonic() >= _innermost.end:
        raise _Overtime


class limited:  # noqa: N801  (a context manager, used like a function)
    """Context manager: end what is done inside with a UserError when it takes too long, or too much memory.

    Only the main thread can be interrupted. In another one nothing is limited in time. The outermost limit owns the
    process's timer; those inside only say when they end, which is never after the one around them.

    Args:
        what: what is done, for the message: ``the template 'x'``.
        seconds: how long it may take.
        memory: bytes that the process may grow by; None for no limit. Setting it costs some microseconds.
    """

    def __init__(self, what: str, *, seconds: float = MOST_SECONDS, memory: int | None = None) -> None:
        self.what, self.seconds, self.memory = what, seconds, memory
        self.end = math.inf
        self._timed = threading.current_thread() is threading.main_thread()
        self._around: limited | None = None
        self._space: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        try:
            if self._timed:
                self._start_time()
            if self.memory is not None:
                self._limit_memory(self.memory)
        except BaseException:  # the end of the limit around this one
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._leave()
        if kind is not None and issubclass(kind, _Overtime) and not (self._around and self._around.is_over()):
            raise UserError(f"{self.what} took more than {self.seconds:g} s, and was stopped") from None
        if kind is not None and issubclass(kind, MemoryError) and self.memory is not None:
            raise UserError(
                f"{self.what} wanted more than {self.memory >> 20:,} MiB of memory, and was stopped"
            ) from None

    def is_over(self) -> bool:
        """Return whether its time is over."""
        return time.monotonic() >= self.end

    def _start_time(self) -> None:
        global _innermost
        now = time.monotonic()
        self._around, self._start = _innermost, now
        if self._around and now >= self._around.end:
            raise _Overtime  # said here, too: limits of microseconds leave a signal little to interrupt
        self.end = min(now + self.seconds, self._around.end if self._around else math.inf)
        _innermost = self
        if not self._around:
            self._before = signal.signal(signal.SIGALRM, _look)
            self._others = signal.setitimer(signal.ITIMER_REAL, min(self.seconds, LOOK_SECONDS), LOOK_SECONDS)

    def _leave(self) -> None:
        """Give back the timer and the memory; a signal in here finds nothing that is over."""
        global _innermost
        self.end = math.inf
        if self._space:
            resource.setrlimit(resource.RLIMIT_AS, self._space)
        if _innermost is not self:
            return
        _innermost = self._around
        if not self._around:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)
            left, interval = self._others
            if left:  # a timer that is not of this module
                passed = time.monotonic() - self._start
                signal.setitimer(signal.ITIMER_REAL, max(left - passed, 1e-3), interval)

    def _limit_memory(self, most: int) -> None:
        used = _address_space(fresh=not self._around)
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = used + most
        lower = soft == resource.RLIM_INFINITY or wanted < soft
        if used and lower and (hard == resource.RLIM_INFINITY or wanted <= hard):
            self._space = (soft, hard)
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def one_timer() -> limited:
    """Return a limit without an end, for loops over many short ones: these share its timer and cost a tenth."""
    return limited("", seconds=math.inf)


_seen_space = (-math.inf, 0)


def _address_space(*, fresh: bool) -> int:
    """Return the bytes of this process's address space, at most a second old unless fresh; 0 where Linux is not."""
    global _seen_space
    if fresh or time.monotonic() - _seen_space[0] > 1:
        try:
            pages = int(Path("/proc/self/statm").read_bytes().split()[0])
        except (OSError, ValueError, IndexError):
            pages = 0
        _seen_space = (time.monotonic(), pages * resource.getpagesize())
    return _seen_space[1]
