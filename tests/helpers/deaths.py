"""The death of a process at each of its operations on files, in turn.

A writer breaks off just before its n-th operation below a folder: at every opening, renaming, removing, creating,
changing of permissions and flushing, and in the middle of what Python writes. From then on every operation there fails,
so that nothing is cleaned up, as after SIGKILL. What is left is then looked at, for all n.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from subspace.common import files, locks

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate"}


class Death(BaseException):
    """What a dead process does not do any more."""


class _Counter:
    """The operations below a folder; from the one with the number ``last`` on, counted from 0, each raises."""

    def __init__(self, root: Path, last: int) -> None:
        self.root, self.last, self.done = str(root), last, 0

    def tick(self) -> None:
        if self.done >= self.last:
            raise Death
        self.done += 1

    def audit(self, event: str, arguments: tuple[object, ...]) -> None:
        named = any(self.root in os.fsdecode(a) for a in arguments if isinstance(a, str | bytes | os.PathLike))
        # What is removed with a folder is named by the folder's descriptor.
        if named or (event in ("os.remove", "os.rmdir") and arguments[-1] != -1):
            self.tick()


_counter: _Counter | None = None


@cache
def _listen() -> None:
    """Let Python tell of every operation; it can be told so once, and not to stop."""

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if _counter and event in EVENTS:
            _counter.audit(event, arguments)

    sys.addaudithook(audit)


@cache
def _dead_process() -> str:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return f"{locks.this_process().partition('-')[0]}-{process.pid:x}"


def _dies_at(number: int, root: Path, write: Callable[[], object]) -> bool:
    """Let a writer die before an operation; return False if it came to its end before."""
    global _counter
    _listen()
    mark, counter = _dead_process(), _Counter(root, number)
    fsync, exchange = os.fsync, files._exchange_names

    def flush(handle: int) -> None:
        counter.tick()
        fsync(handle)

    def exchange_names(one: Path, other: Path) -> bool:
        counter.tick()
        return exchange(one, other)

    def write_bytes(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            counter.tick()
            file.write(content[len(content) // 2 :])
        return len(content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", flush)
        patch.setattr(files, "_exchange_names", exchange_names)
        patch.setattr(files, "this_process", lambda: mark)
        patch.setattr(Path, "write_bytes", write_bytes)
        _counter = counter
        try:
            write()
        except Death:
            return True
        finally:
            _counter = None
    return False


def each_death(root: Path, write: Callable[[], object], before: Callable[[], object]) -> Iterator[int]:
    """Yield the number of the operation that a writer has died at, for each in turn; what it left is below ``root``.

    ``before`` makes the state in which the writer begins, in a new folder ``root``.
    """
    number = 0
    while True:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        before()
        if not _dies_at(number, root, write):
            return
        yield number
        number += 1
