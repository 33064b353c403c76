"""Limits of time and memory for what somebody else's file makes this process do: templates and regular expressions.

``(a+)+$`` takes longer than anybody waits over thirty letters, and ``'a' * 10 ** 11`` takes all memory. Python's own
machinery for both heeds signals and failed allocations, so a timer and the process's limit of address space suffice.
"""

from __future__ import annotations

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


class _Overtime(BaseException):
    """The time is over. Not an Exception, so that nothing in between takes it for a failure of its own."""


def _expire(number: int, frame: FrameType | None) -> None:
    raise _Overtime


#: The limit inside which the main thread is, the innermost.
_innermost: limited | None = None


class limited:  # noqa: N801  (a context manager, used like a function)
    """Context manager: end what is done inside with a UserError when it takes too long, or too much memory.

    Only the main thread can be interrupted. In another one nothing is limited in time. A limit inside another one ends
    by itself and leaves the outer one its end, also where many short ones follow one another.

    Args:
        what: what is done, for the message: ``the template 'x'``.
        seconds: how long it may take.
        memory: bytes that the process may grow by; None for no limit. Setting it costs some microseconds.
    """

    def __init__(self, what: str, *, seconds: float = MOST_SECONDS, memory: int | None = None) -> None:
        self.what, self.seconds, self.memory = what, seconds, memory
        self._timed = threading.current_thread() is threading.main_thread()
        self._space: tuple[int, int] | None = None
        self._around: limited | None = None
        self._end = 0.0

    def __enter__(self) -> Self:
        global _innermost
        if self._timed:
            self._around = _innermost
            if self._around and time.monotonic() > self._around._end:
                raise _Overtime  # of the outer one, whose timer short ones would start anew for ever
        if self.memory is not None:
            self._limit_memory(self.memory)
        if self._timed:
            _innermost, self._end = self, time.monotonic() + self.seconds
            self._before = signal.signal(signal.SIGALRM, _expire)
            self._outer = signal.setitimer(signal.ITIMER_REAL, self.seconds)[0]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        global _innermost
        try:
            if self._timed:
                _innermost = self._around
                left = signal.setitimer(signal.ITIMER_REAL, 0)[0]
                signal.signal(signal.SIGALRM, self._before)
                if self._outer:
                    signal.setitimer(signal.ITIMER_REAL, max(self._outer - (self.seconds - left), 1e-3))
        except _Overtime:  # between the end of what was done and here
            signal.signal(signal.SIGALRM, self._before)
        finally:
            if self._space:
                resource.setrlimit(resource.RLIMIT_AS, self._space)
        if kind is not None and issubclass(kind, _Overtime):
            raise UserError(f"{self.what} took more than {self.seconds:g} s, and was stopped") from None
        if kind is not None and issubclass(kind, MemoryError) and self.memory is not None:
            raise UserError(
                f"{self.what} wanted more than {self.memory >> 20:,} MiB of memory, and was stopped"
            ) from None

    def _limit_memory(self, most: int) -> None:
        try:
            pages = int(Path("/proc/self/statm").read_bytes().split()[0])
        except (OSError, ValueError, IndexError):  # another system than Linux
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = pages * resource.getpagesize() + most
        if (soft == resource.RLIM_INFINITY or wanted < soft) and (hard == resource.RLIM_INFINITY or wanted <= hard):
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
            self._space = (soft, hard)
