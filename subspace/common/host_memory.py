"""The host's memory as this process uses it: how much it holds, and whether glibc gives back what is freed.

glibc keeps what was freed for later, and cannot use all of it again when shapes change from step to step: the process
grows by a quarter and more. Large tensors are better returned to the system at once, except where the next step wants
the same again, because the system clears every page before it gives it back.

This is a matter of the whole process, so only the command line manages it (:func:`manage_malloc`). In a program that
calls the package as a library, glibc does as that program has it.
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

_managed = False


def resident_memory(line: str = "VmRSS") -> int:
    """Return the bytes that this process holds, or with ``VmHWM`` the most it has held; 0 where Linux does not say.

    The most that ``getrusage`` knows may be that of the process which started this one, and psutil knows none.
    """
    with contextlib.suppress(OSError):
        for text in Path("/proc/self/status").read_text().splitlines():
            if text.startswith(f"{line}:"):
                return int(text.split()[1]) * 1024
    return 0


def manage_malloc() -> None:
    """Let :func:`set_malloc_trim` act in this process from now on: for a program to call, never for a library."""
    global _managed
    _managed = True


def set_malloc_trim(trim: bool) -> None:
    """Return large blocks to the system when they are freed, from now on, or keep them to be used again.

    Nothing happens where malloc is not glibc's, or no program asked for it with :func:`manage_malloc`.
    """
    if _managed:
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(MMAP_THRESHOLD, LARGE if trim else LARGEST)
            libc.mallopt(TRIM_THRESHOLD, LARGE if trim else NEVER)
