"""The host's memory as this process uses it: how much it holds, and how glibc gives back what is freed.

glibc keeps what was freed for later, and cannot use all of it again when shapes change from step to step: the process
grows by a quarter and more. Large tensors are better returned to the system at once.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

# Of mallopt.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGE = 1 << 17  # bytes; glibc's own threshold grows to 256 times that,
LARGEST = 1 << 25  # which is the most that it takes
NEVER = -1


def resident_memory(line: str = "VmRSS") -> int:
    """Return the bytes that this process holds, or with ``VmHWM`` the most it has held; 0 where Linux does not say.

    The most that ``getrusage`` knows may be that of the process which started this one.
    """
    with contextlib.suppress(OSError):
        for text in Path("/proc/self/status").read_text().splitlines():
            if text.startswith(f"{line}:"):
                return int(text.split()[1]) * 1024
    return 0


def return_freed_memory() -> None:
    """Let large blocks go back to the system when they are freed, from now on. Without glibc, nothing happens."""
    _set_thresholds(LARGE, LARGE)


def keep_freed_memory() -> None:
    """Let freed blocks stay and be used again, from now on, as glibc does where nobody asks otherwise.

    What a step frees, the next one wants again, and the system clears every page before it gives it back.
    """
    _set_thresholds(LARGEST, NEVER)


def _set_thresholds(mapped: int, trimmed: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(MMAP_THRESHOLD, mapped)
        libc.mallopt(TRIM_THRESHOLD, trimmed)
