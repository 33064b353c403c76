"""Locks between processes, on one machine and on several that share a file system.

:func:`locked` waits, for what any process may build: a folder of the cache. :func:`in_use` does not: two processes that
write a run's folder are a mistake, of which the second is told who the first is.

The system frees a lock when its process ends, however that happens. On a file system that several machines share it may
know the locks of each machine alone. So whoever holds a lock also renews a record beside it, and one that another
machine's process has left counts until it has not been renewed for :data:`SILENCE_S`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import filelock

from subspace.common.foreign.text import open_regular
from subspace.errors import UserError

logger = logging.getLogger("subspace")

LOCK, HOLDER = ".lock", ".in-use.json"
#: Seconds between two renewals of a record, and without one until its process counts as gone.
RENEWAL_S, SILENCE_S = 10.0, 45.0
#: Seconds of waiting for a lock after which the user is told.
PATIENCE_S = 10.0


# Processes.


@cache
def _machine() -> str:
    """Return what tells this machine, and this container's processes, from others, as eight hexadecimal digits."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:8]


def this_process() -> str:
    """Return a short name of this process, to be given to :func:`has_ended`."""
    return f"{_machine()}-{os.getpid():x}"


def has_ended(process: str) -> bool:
    """Return True if a process of this machine, by its :func:`this_process`, is there no longer; of another, False."""
    machine, _, number = process.partition("-")
    if machine != _machine():
        return False
    try:
        os.kill(int(number, 16), 0)
    except (ProcessLookupError, ValueError):
        return True
    except OSError:  # somebody else's
        return False
    return False


# Locks that are waited for.


class Busy(Exception):
    """Another process holds a lock that was not to be waited for."""


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on a path, across processes and threads, until the block ends.

    Raises:
        Busy: another process holds it, and ``wait`` is not set.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_name(f".{path.name}{LOCK}"))
    try:
        lock.acquire(timeout=PATIENCE_S if wait else 0)
    except filelock.Timeout:
        if not wait:
            raise Busy from None
        logger.info("waiting for another process, which is writing %s", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# Locks by which one process knows that another is there.


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Hold a lock on a file until the block ends, or this process does: see :func:`is_held`."""
    with filelock.FileLock(file):
        yield


def is_held(file: Path) -> bool:
    """Return True if a process holds a file by :func:`held`; False if it has ended or never began."""
    lock = filelock.FileLock(file)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except OSError:  # the folder is gone
        return False
    lock.release()
    return False


# Locks that are refused.


@contextmanager
def in_use(folder: Path, *, reads: bool = False) -> Iterator[None]:
    """Hold a folder for this process alone until the block ends. What was created for that is removed.

    Args:
        folder: its path; it need not be there.
        reads: the folder is only read. Then one that may not be written to is used without a lock.

    Raises:
        UserError: another process has it, which is named.
    """
    created = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _held(folder, reads=reads):
            yield
    finally:
        for path in created:  # the innermost first
            with suppress(OSError):  # something has been written there
                path.rmdir()


@contextmanager
def _held(folder: Path, *, reads: bool) -> Iterator[None]:
    lock, record = filelock.FileLock(folder / LOCK), folder / HOLDER
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise _refusal(folder, _read(record)) from None
    except OSError:
        if reads and not os.access(folder, os.W_OK):
            yield
            return
        raise
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(record, ended), name="lock", daemon=True)
    try:
        for path in folder.glob(f"{HOLDER}.*"):  # of a process that was killed as it wrote its record
            path.unlink(missing_ok=True)
        _wait_for_silence(folder, record)
        try:
            _write(record)
            renewal.start()
            yield
        finally:
            ended.set()
            if renewal.ident:
                renewal.join()
            # While it is held: whoever has opened it meanwhile sees that it is gone.
            for path in (record, folder / LOCK):
                with suppress(OSError):
                    path.unlink(missing_ok=True)
    finally:
        lock.release()


def _refusal(folder: Path, holder: dict[str, Any]) -> UserError:
    if holder:
        who = "process {pid} on {host}, since {since}: {command}".format(**holder)
        end = f"Wait for it, or end it on {holder['host']}: kill {holder['pid']}"
    else:
        who, end = "another process", "Wait for it"
    return UserError(f"{folder} is in use by {who}. {end}")


def _wait_for_silence(folder: Path, record: Path) -> None:
    """Raise UserError if a process of another machine is still renewing the record that it has left."""
    holder = _read(record)
    if not holder or holder["machine"] == _machine():  # whose lock would be held
        return
    renewed, now = _time(record), _now(folder)
    end = time.monotonic() + max(0.0, SILENCE_S - (now - renewed))
    if time.monotonic() < end:
        logger.info("waiting %.0f s to see if process %s on %s has ended", SILENCE_S, holder["pid"], holder["host"])
    while time.monotonic() < end:
        time.sleep(min(1.0, SILENCE_S / 10))
        if _time(record) != renewed:
            raise _refusal(folder, holder)


def _time(file: Path) -> float:
    with suppress(OSError), file.open("rb") as opened:  # a network file system asks its server when a file is opened
        return os.fstat(opened.fileno()).st_mtime
    return 0.0


def _now(folder: Path) -> float:
    """Return the time by the clock that files in a folder get theirs from."""
    probe = folder / f".{secrets.token_hex(8)}{LOCK}"
    probe.touch(exist_ok=False)
    try:
        return _time(probe)
    finally:
        probe.unlink(missing_ok=True)


def _write(record: Path) -> None:
    holder = {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
    }
    # Under another name first, which follows no link; a reader never sees half of it.
    partial = record.with_name(f"{record.name}.{secrets.token_hex(4)}")
    with partial.open("x") as file:
        json.dump(holder, file)
    partial.replace(record)


def _read(record: Path) -> dict[str, Any]:
    """Return what a record says; empty if there is none that makes sense."""
    with suppress(UserError, OSError, ValueError, TypeError, AttributeError, RecursionError):
        with open_regular(record) as file:
            holder = json.loads(file.read(10_000))
        if {"host", "machine", "pid", "since", "command"} <= holder.keys():
            return {key: "".join(c for c in str(value) if c.isprintable()) for key, value in holder.items()}
    return {}


def _renew(record: Path, ended: threading.Event) -> None:
    while not ended.wait(RENEWAL_S):
        with suppress(OSError):
            os.utime(record)
