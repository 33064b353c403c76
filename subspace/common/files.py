"""Files and folders on disk, each there whole or not at all.

Whatever this project writes goes through here: it is written under another name, flushed to the disk, and renamed. A
process that is killed at any moment, a full disk, or two processes at once leave nothing that could be taken for the
real thing. Permissions are those that the user's umask gives, also where a library writes through a private file.
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


# One file.


def write_file(file: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file, whole or not at all, and make its folder where there is none.

    Args:
        file: its path. What was there before stays until the new content is on the disk.
        content: bytes, text (written as UTF-8), or a function that writes the file whose path it is given.

    Raises:
        OSError: the disk does not take the content, or gives back something else.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: several processes may write the same file, and the last one to finish wins.
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        partial.touch(exist_ok=False)
        mode = stat.S_IMODE(partial.stat().st_mode)
        if callable(content):
            content(partial)
            partial.chmod(mode)  # some libraries put a private file in its place
            fsync_path(partial)
        else:
            write_checked(partial, content.encode() if isinstance(content, str) else content)
        os.replace(partial, file)  # noqa: PTH105  (the tests replace it by its name)
    finally:
        partial.unlink(missing_ok=True)
    fsync_path(file.parent)


def write_json(file: Path, value: Any) -> None:
    """Write a value as JSON for people, whole or not at all; what JSON does not know is written as text."""
    write_file(file, json.dumps(value, indent=2, default=str) + "\n")


def write_checked(file: Path, content: bytes) -> None:
    """Write a file in place, flush it to the disk and read it back: for folders that are renamed when they are whole.

    Raises:
        OSError: the disk does not take it, or gives back something else.
    """
    file.write_bytes(content)
    fsync_path(file)
    if file.read_bytes() != content:
        raise OSError(errno.EIO, "it reads back differently; is the disk sound?", str(file))


def fsync_path(path: Path) -> None:
    """Make sure that what was written to a file, or renamed in a folder, is on the disk."""
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
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# One folder.


@contextmanager
def write_folder(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """Give an empty folder to fill, which becomes ``folder`` when the block ends without an error.

    One process at a time may do so; see :func:`locked`. After an error, nothing of the new folder is left.

    Args:
        folder: its path. What was there before stays until the new folder is on the disk.
        replace: whether to replace a folder that has content; else that is an error (``ENOTEMPTY``).
    """
    with temporary_folder(folder) as partial:
        yield partial
        finish_folder(partial, folder, replace=replace)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside a path, which is removed when the block ends, or else by the next one to come."""
    partial = begin_folder(path)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def begin_folder(folder: Path) -> Path:
    """Return an empty folder to fill; :func:`finish_folder` gives it its name. An unfinished one is removed."""
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_folder(partial: Path, folder: Path, *, replace: bool = True) -> None:
    """Flush a filled folder to the disk and give it its name, in place of what has that name."""
    mode = stat.S_IMODE(partial.stat().st_mode)  # as the umask has it; for a file, without the bits to execute it
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
    """Give a folder another name, in place of what has that name."""
    remove_folder(target)
    folder.rename(target)
    fsync_path(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there, so that half of it is never found under its name."""
    if folder.exists():
        old = folder.with_name(f"{folder.name}.old{PARTIAL}")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process or thread works on this path, and keep others waiting until the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        yield


# A folder of the cache, with a manifest of what is in it.


def build_dir_atomically(
    folder: Path, is_good: Callable[[Path], bool], build: Callable[[Path], Mapping[str, Any]]
) -> bool:
    """Build a folder unless it is there and good; return whether it was built.

    ``build`` fills an empty folder and returns facts for its manifest. Processes that come at the same time wait for
    the first and find the work done.
    """
    if is_good(folder):  # also where the cache may only be read
        return False
    with disk_errors(folder), locked(folder):
        if is_good(folder):
            return False
        with write_folder(folder) as work:
            _write_manifest(work, build(work))
    return True


def read_manifest(folder: Path, *, thorough: bool = False) -> dict[str, Any] | None:
    """Return the facts in a manifest of :func:`build_dir_atomically`, or None if a file of the folder is not as it was.

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


# A disk that does not take what is written.


def is_disk_full(error: Exception) -> bool:
    """Return whether an error says that the disk, or the user's share of it, is full."""
    # Some libraries wrap the operating system's error in one of their own, and only the text survives.
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise a UserError for a disk that is full, or may not be written, while something is written to the cache."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            free = shutil.disk_usage(_existing(path)).free
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


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
