"""Part of files."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from subspace.errors import UserError

MANIFEST = "prepared.json"


# A folder that is whole or not there.


def build_dir_atomically(
    folder: Path, is_good: Callable[[Path], bool], build: Callable[[Path], Mapping[str, Any]]
) -> bool:
    """Make a folder unless it is there and good, and tell whether it was made.

    ``build`` fills an empty folder beside it and returns facts for its manifest. Processes that come at the same time
    wait for the first and find the work done.
    """
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if is_good(folder):
                return False
            remove_partial(folder)
            work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
            try:
                _write_manifest(work, build(work))
                if folder.exists():
                    folder.rename(Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent)) / "old")
                work.rename(folder)
            finally:
                remove_partial(folder)
    return True


def read_manifest(folder: Path, *, thorough: bool = False) -> dict[str, Any] | None:
    """Return the manifest's facts of a folder that ``make_folder`` made, or None if a file in it is not as it was.

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
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": listed}, indent=1) + "\n", encoding="utf-8")
    # Whoever wrote through a temporary file left it readable by its owner only; a cache may be shared.
    for path in (folder, *files):
        path.chmod(0o755 if path.is_dir() else 0o644)


def file_sha256(path: Path) -> str:
    """Return a file's checksum."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_partial(path: Path) -> None:
    """Remove what is half-made beside this path. Whoever holds the lock may: it is nobody else's any more."""
    for remains in path.parent.glob(f".{path.name}.tmp-*"):
        shutil.rmtree(remains, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        # A file system without locks costs double work at worst: the last move is atomic with or without one.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn a full disk, or one that may not be written, into words."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Some libraries wrap the operating system's error in one of their own, and only the text survives.
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            free = shutil.disk_usage(_existing(place)).free
            raise UserError(
                f"{place} was to be written, but the disk is full ({free / 1e6:,.0f} MB are free; model and data "
                "need 1,500). Nothing half-written was kept. Free some space, or set SUBSPACE_CACHE to another disk"
            ) from None
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"{place} was to be written, but may not be. Set SUBSPACE_CACHE to a folder of your own"
            ) from None
        raise


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
