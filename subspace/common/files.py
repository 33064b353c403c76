"""Atomic writes of files and folders.

All of this project's writes go through here: content is written under another name, fsynced and renamed. A
process that is killed at any moment, a full disk, or two concurrent processes never leave a partial file under the
final name. Permissions follow the user's umask, also where a library writes through a private file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from subspace.errors import UserError

MANIFEST = "prepared.json"
PARTIAL = ".partial"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


# One file.


def write_file(file: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file atomically, creating its folder if needed.

    Args:
        file: its path. An existing file stays until the new content is on disk.
        content: bytes, text (written as UTF-8), or a function that writes to the path it is called with.

    Raises:
        OSError: writing fails, or reading back gives other content.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # A unique name: several processes may write the same file, and the last one to finish wins.
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        partial.touch(exist_ok=False)
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
    file.write_bytes(content)
    fsync_path(file)
    if file.read_bytes() != content:
        raise OSError(errno.EIO, "it reads back differently; is the disk sound?", str(file))


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


def refuse_lfs_pointer(file: Path, request: str = "") -> None:
    """Raise UserError if a file is the few lines that git leaves in place of a large one without git-lfs."""
    with file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{request}{file.name} in {file.parent} is a pointer of Git LFS, a few lines in place of the file, as "
                "a clone without git-lfs leaves them. Run `git lfs install` and `git lfs pull` in that folder"
            )


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content as a hexadecimal string."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# One folder.


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
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def begin_folder(folder: Path) -> Path:
    """Return an empty folder to fill, to be renamed by :func:`finish_folder`; remove an unfinished earlier one."""
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_folder(partial: Path, folder: Path, *, replace: bool = True) -> None:
    """Flush a filled folder to disk and rename it to its final name, replacing an existing folder."""
    mode = stat.S_IMODE(partial.stat().st_mode)  # set by the umask; for a file, without the execute bits
    for path in partial.rglob("*"):
        if not path.is_symlink():
            path.chmod(mode if path.is_dir() else mode & 0o666)
            fsync_path(path)
    fsync_path(partial)
    old = folder.with_name(f"{folder.name}.old{PARTIAL}")
    shutil.rmtree(old, ignore_errors=True)
    if replace and folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    fsync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def move_folder(folder: Path, target: Path) -> None:
    """Rename a folder, replacing an existing folder of that name."""
    remove_folder(target)
    folder.rename(target)
    fsync_path(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it exists, such that a partial one is never visible under its name."""
    if folder.exists():
        old = folder.with_name(f"{folder.name}.old{PARTIAL}")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a path, across processes and threads, until the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        yield


# A cache folder with a manifest of its files.


def build_dir_atomically(
    folder: Path, is_good: Callable[[Path], bool], build: Callable[[Path], Mapping[str, Any]]
) -> bool:
    """Build a folder unless an intact one exists; return True if it was built.

    ``build`` fills an empty folder and returns facts for its manifest. Concurrent callers wait for the first one and
    use its result.
    """
    if is_good(folder):  # before locking, so that a read-only cache works
        return False
    with disk_errors(folder), locked(folder):
        if is_good(folder):
            return False
        with write_folder(folder) as work:
            _write_manifest(work, build(work))
    return True


def read_manifest(folder: Path, *, thorough: bool = False) -> dict[str, Any] | None:
    """Return the facts in a manifest of :func:`build_dir_atomically`, or None if a file of the folder has changed.

    Sizes are always compared; checksums where ``thorough``.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, checksum) in manifest.pop("files").items():
            if (folder / name).stat().st_size != size or (thorough and file_sha256(folder / name) != checksum):
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest


def _write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {str(path.relative_to(folder)): [path.stat().st_size, file_sha256(path)] for path in files}
    write_checked(folder / MANIFEST, (json.dumps({**facts, "files": listed}, indent=1) + "\n").encode())


# Full or read-only disks.


def is_disk_full(error: Exception) -> bool:
    """Return True if an error means that the disk, or the user's quota, is full."""
    # Some libraries wrap the operating system's error in one of their own, and only the text survives.
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of a full or read-only disk, raised while writing to the cache, into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            free = shutil.disk_usage(nearest_existing(path)).free
            raise UserError(
                f"{path} was to be written, but the disk is full ({free / 1e6:,.0f} MB are free; model and data "
                "need 1,500). Nothing half-written was kept. Free some space, or set SUBSPACE_CACHE to another disk"
            ) from None
        number = getattr(error, "errno", None)
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"{path} was to be written, but may not be. Set SUBSPACE_CACHE to a folder of your own"
            ) from None
        if number == errno.EFBIG:
            raise UserError(
                f"{path} was to be written, but the system allows no file of that size: see 'ulimit -f'"
            ) from None
        raise


def nearest_existing(path: Path) -> Path:
    """Return the path if it exists, else the nearest folder above that does."""
    return path if path.exists() else nearest_existing(path.parent)
