"""Atomic writes of files and folders.

All of this project's writes go through here: content is written under another name, fsynced and renamed. A process
that is killed at any moment, a full disk, or two concurrent processes never leave a partial file under the final name:
there is the old content or the new one. What a killed process has left is removed by the next one that writes there.
Permissions follow the user's umask, also where a library writes through a private file. An error of the system names
the file that was to be written.

Folders are exchanged in one operation where the file system can (renameat2 of Linux; NFS cannot). Elsewhere the new
one first gets the name ``FOLDER.new``, which only a complete folder has, and :func:`settle_folder` finishes what was
broken off between two renames.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from subspace.common.foreign.text import open_regular, read_json
from subspace.common.locks import Busy, has_ended, locked, this_process
from subspace.common.paths import nearest_existing
from subspace.errors import UserError, file_trouble

MANIFEST = "prepared.json"
PARTIAL = ".partial"
#: What a complete folder is called between two renames.
NEW = ".new"
LONGEST_NAME = 255  # bytes
#: Errors that say something about what was read.
NOT_OF_WRITING = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)


# One file.


def write_file(file: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file atomically, creating its folder if needed.

    Args:
        file: its path. An existing file stays until the new content is on disk.
        content: bytes, text (written as UTF-8), or a function that writes to the path it is called with.

    Raises:
        OSError: writing fails, or reading back gives other content.
    """
    make_folder(file.parent)
    _sweep(file)
    # A unique name: several processes may write the same file, and the last one to finish wins.
    partial = file.with_name(f"{_partial_prefix(file)}{this_process()}.{secrets.token_hex(4)}{PARTIAL}")
    with _naming(partial, file):
        try:
            partial.touch(exist_ok=False)  # which follows no link
            mode = stat.S_IMODE(partial.stat().st_mode)
            if callable(content):
                content(partial)
                partial.chmod(mode)  # some libraries replace it by a private file
                fsync_path(partial)
            else:
                write_checked(partial, content.encode() if isinstance(content, str) else content)
            os.replace(partial, file)  # noqa: PTH105  (the tests replace it by its name)
        finally:
            partial.unlink(missing_ok=True)
    fsync_path(file.parent)


def write_json(file: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; objects that JSON cannot represent are written as strings."""
    write_file(file, json.dumps(value, indent=2, default=str) + "\n")


def write_checked(file: Path, content: bytes) -> None:
    """Write a file in place, fsync it and read it back; for use in folders that are renamed when complete.

    Raises:
        OSError: writing fails, or reading back gives other content.
    """
    with _naming(file, file):
        file.write_bytes(content)
        fsync_path(file)
        if file.read_bytes() != content:
            raise OSError(errno.EIO, "it reads back differently; is the disk sound?", str(file))


def open_log(file: Path) -> IO[str]:
    """Open a text file that grows by lines, at its end, creating it if needed; a symbolic link is not followed.

    Raises:
        OSError: it cannot be opened, or it is a link, which may lead anywhere in a folder from somebody else.
    """
    return open(file, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot flush a folder.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content as a hexadecimal string; raise UserError for what is no regular file."""
    with open_regular(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def _naming(partial: Path, final: Path) -> Iterator[None]:
    """Let an error of the system name the file that was to be written, and not the partial one or none.

    A library's own error that wraps one of the system becomes that.
    """
    try:
        yield
    except OSError as error:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else str(partial)
        if file_trouble(error):
            error.filename, error.filename2 = name.replace(str(partial), str(final)), None
        raise
    except UserError:
        raise
    except Exception as error:
        if (trouble := file_trouble(error)) is None:
            raise
        raise OSError(trouble.number, os.strerror(trouble.number), str(final)) from error


def _partial_prefix(file: Path) -> str:
    return f".{file.name.encode()[:100].decode(errors='ignore')}."


def _sweep(file: Path) -> None:
    """Remove what killed processes of this machine have left of a file that they were writing."""
    prefix = _partial_prefix(file)
    with suppress(OSError):
        for path in file.parent.iterdir():
            is_partial = path.name.startswith(prefix) and path.name.endswith(PARTIAL)
            if is_partial and has_ended(path.name.removeprefix(prefix).partition(".")[0]):
                path.unlink(missing_ok=True)


# One folder.


def make_folder(folder: Path) -> None:
    """Create a folder with those above it, unless it is there, and flush their names to disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync_path(path.parent)


@contextmanager
def write_folder(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """Context manager: yield an empty folder, which is renamed to ``folder`` when the block ends without an error.

    Only one process at a time may do so; see :func:`locked`. After an error, the new folder is removed.

    Args:
        folder: its path. An existing folder stays until the new one is on disk.
        replace: whether to replace a folder that is not empty; otherwise that is an error (``ENOTEMPTY``).
    """
    with temporary_folder(folder) as partial:
        yield partial
        finish_folder(partial, folder, replace=replace)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Context manager: yield an empty folder next to a path, removed at the end, or by the next call if killed."""
    partial = begin_folder(path)
    try:
        with _naming(partial, path):
            yield partial
    finally:
        _remove(partial)


def begin_folder(folder: Path) -> Path:
    """Return an empty folder to fill, to be renamed by :func:`finish_folder`; remove an unfinished earlier one."""
    settle_folder(folder)
    for left in _leftovers(folder):
        _remove(left)
    partial = _beside(folder, PARTIAL)
    make_folder(folder.parent)
    with _naming(partial, folder):
        partial.mkdir()
    return partial


def finish_folder(partial: Path, folder: Path, *, replace: bool = True) -> None:
    """Flush a filled folder to disk and rename it to its final name, replacing an existing folder."""
    with _naming(partial, folder):
        mode = stat.S_IMODE(partial.stat().st_mode)  # set by the umask; for a file, without the execute bits
        for path in partial.rglob("*"):
            if not path.is_symlink():
                path.chmod(mode if path.is_dir() else mode & 0o666)
                fsync_path(path)
        fsync_path(partial)
        if replace and os.path.lexists(folder):
            _exchange(partial, folder)
        else:
            partial.rename(folder)
            fsync_path(folder.parent)


def settle_folder(folder: Path) -> None:
    """Finish the replacement of a folder that was broken off between its two renames, before it is looked at."""
    new = _beside(folder, NEW)
    if not os.path.lexists(folder) and os.path.lexists(new):
        with suppress(FileNotFoundError):  # another process has done so
            new.rename(folder)
            fsync_path(folder.parent)


def _exchange(partial: Path, folder: Path) -> None:
    """Put a complete folder in the place of another, which is removed."""
    if _exchange_names(partial, folder):
        fsync_path(folder.parent)
        _remove(partial)
        return
    new, old = _beside(folder, NEW), _beside(folder, f".old{PARTIAL}")
    partial.rename(new)
    fsync_path(folder.parent)
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if not os.path.lexists(folder):  # else a reader has done it
            old.rename(folder)
            _remove(new)
            raise
    fsync_path(folder.parent)
    _remove(old)


def _exchange_names(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders in one operation; return False where that is impossible."""
    renameat2 = getattr(_libc(), "renameat2", None)
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):  # a file system, a kernel, a sandbox
        return False
    raise OSError(number, os.strerror(number), str(other))


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def move_folder(folder: Path, target: Path) -> None:
    """Rename a folder, replacing an existing folder of that name."""
    remove_folder(target)
    folder.rename(target)
    fsync_path(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it exists, such that a partial one is never visible under its name."""
    if os.path.lexists(folder):
        old = _beside(folder, f".old{PARTIAL}")
        _remove(old)
        folder.rename(old)
        _remove(old)


def _leftovers(folder: Path) -> list[Path]:
    """Return what a process that was killed has left next to a folder that it was writing."""
    beside = (_beside(folder, suffix) for suffix in (PARTIAL, f".old{PARTIAL}", NEW))
    return [path for path in beside if os.path.lexists(path)]


def _beside(folder: Path, suffix: str) -> Path:
    """Return a path next to a folder whose name begins as that does."""
    name = folder.name
    if len(name.encode()) > LONGEST_NAME - 20:
        name = f"{name.encode()[:150].decode(errors='ignore')}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return folder.with_name(name + suffix)


def _remove(path: Path) -> None:
    """Remove a file or folder; of a symbolic link, the link."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


# A cache folder with a manifest of its files.


def build_dir_atomically(
    folder: Path, is_good: Callable[[Path], bool], build: Callable[[Path], Mapping[str, Any]]
) -> bool:
    """Build a folder unless an intact one exists; return True if it was built.

    ``build`` fills an empty folder and returns facts for its manifest. Concurrent callers wait for the first one and
    use its result.
    """
    with suppress(OSError):
        settle_folder(folder)
    if is_good(folder):  # before locking, so that a read-only cache works
        _clear(folder)
        return False
    with disk_errors(folder), locked(folder):
        if is_good(folder):
            return False
        with write_folder(folder) as work:
            _write_manifest(work, build(work))
    return True


def _clear(folder: Path) -> None:
    """Remove what lies next to an intact folder, unless a process is just making another, or it may only be read."""
    if _leftovers(folder):
        with suppress(OSError, Busy), locked(folder, wait=False):
            for left in _leftovers(folder):
                _remove(left)


#: Files that have been read and were as their manifest says.
_intact: set[tuple[str, int, int, int, str]] = set()


def read_manifest(folder: Path, *, thorough: bool = False) -> dict[str, Any] | None:
    """Return the facts in a manifest of :func:`build_dir_atomically`, or None if a file of the folder has changed.

    Sizes are always compared; checksums where ``thorough``, of a file that has not changed once in a process.
    """
    try:
        manifest: dict[str, Any] = read_json(folder / MANIFEST, dict[str, Any])
        for name, (size, checksum) in manifest.pop("files").items():
            about = (folder / name).stat()
            if about.st_size != size:
                return None
            state = (str(folder / name), about.st_ino, about.st_mtime_ns, about.st_ctime_ns, checksum)
            if thorough and state not in _intact:
                if file_sha256(folder / name) != checksum:
                    return None
                _intact.add(state)
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return manifest


def _write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {str(path.relative_to(folder)): [path.stat().st_size, file_sha256(path)] for path in files}
    write_checked(folder / MANIFEST, (json.dumps({**facts, "files": listed}, indent=1) + "\n").encode())


# Full or read-only disks.


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system, raised while writing to the cache, into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        trouble = file_trouble(error)
        if trouble is None or trouble.number in NOT_OF_WRITING or not _is_about(trouble.file, path):
            raise
        reason = trouble.reason
        if trouble.number in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(nearest_existing(path)).free
            reason += f" ({free / 1e6:,.0f} MB are free; model and data need 1,500)"
        raise UserError(
            f"{path} was to be written, but {reason}. Nothing half-written was kept. {trouble.cure}. "
            "SUBSPACE_CACHE sets another folder"
        ) from None


def _is_about(file: str, path: Path) -> bool:
    """Return True if a file is the one at a path, or inside or beside or above it; also where it is not known."""
    return not file or Path(file).is_relative_to(path.parent) or path.is_relative_to(file)
