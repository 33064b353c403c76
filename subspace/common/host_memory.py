"""Host memory of this process: resident size, and whether glibc returns freed memory to the system.

glibc caches freed memory, and cannot reuse all of it when shapes change from step to step: the process grows by a
quarter and more. Large tensors are better returned to the system at once, except where the next step allocates the
same sizes again, because the system zeroes every page before it hands it out.

The malloc policy is process-wide, so only the command line sets it (:func:`manage_malloc`). A program that calls the
package as a library keeps its own policy.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

# Parameters of mallopt.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGE = 1 << 17  # bytes; glibc's own threshold grows to 256 times that,
LARGEST = 1 << 25  # which is the most that it takes
NEVER = -1

_managed = False


def resident_memory(line: str = "VmRSS") -> int:
    """Return this process's resident memory in bytes, or its peak with ``VmHWM``; 0 if /proc does not provide it.

    The peak that ``getrusage`` reports may be that of the parent process, and psutil reports none.
    """
    with contextlib.suppress(OSError):
        for text in Path("/proc/self/status").read_text().splitlines():
            if text.startswith(f"{line}:"):
                return int(text.split()[1]) * 1024
    return 0


def manage_malloc() -> None:
    """Enable :func:`set_malloc_trim` in this process; to be called by programs, never by a library."""
    global _managed
    _managed = True


def set_malloc_trim(trim: bool) -> None:
    """Set whether freed large blocks are returned to the system at once or kept for reuse.

    Does nothing if malloc is not glibc's, or if :func:`manage_malloc` was not called.
    """
    if _managed:
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(MMAP_THRESHOLD, LARGE if trim else LARGEST)
            libc.mallopt(TRIM_THRESHOLD, LARGE if trim else NEVER)


def available_memory() -> tuple[int, int]:
    """Return the memory in bytes that processes of this machine or container may still take, and that there is in all.

    0 and 0 if /proc does not provide it.
    """
    found = {"MemAvailable": 0, "MemTotal": 0}
    with contextlib.suppress(OSError):
        for text in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = text.partition(":")
            if name in found:
                found[name] = int(value.split()[0]) * 1024
    available, total = found["MemAvailable"], found["MemTotal"]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # a container's own limit; the file says "max" without one
        limit = int((group / "memory.max").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Pages of files that are in memory count as used, but are given back when memory is short.
        used = int((group / "memory.current").read_text()) - int(statistics["inactive_file"])
        available, total = min(available, max(limit - used, 0)), min(total, limit)
    return available, total
