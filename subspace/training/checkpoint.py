"""Atomic checkpoint directories verified by a SHA-256 manifest.

They are named ``checkpoints/step-000120``. One is written under another name, fsynced, read back and renamed, so that
a process killed at any moment leaves the older ones unchanged. ``manifest.json`` has the size and SHA-256 of each
file, and of itself; no file is opened before the manifest is verified. No file is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from subspace.common.files import (
    PARTIAL,
    begin_folder,
    file_sha256,
    finish_folder,
    move_folder,
    remove_folder,
    write_checked,
)

MANIFEST = "manifest.json"
DAMAGED = ".damaged"


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return folder / "checkpoints" / f"step-{step:06d}"


def begin_checkpoint(target: Path) -> Path:
    """Return an empty folder for a checkpoint's files, to be renamed by :func:`finish_checkpoint`."""
    return begin_folder(target)


def finish_checkpoint(unfinished: Path, target: Path) -> None:
    """Write the manifest of a folder's files and rename the folder to ``target``."""
    inside = sorted(path for path in unfinished.rglob("*") if path.is_file())
    files = {str(path.relative_to(unfinished)): [path.stat().st_size, file_sha256(path)] for path in inside}
    write_checked(unfinished / MANIFEST, _manifest(files))
    finish_folder(unfinished, target)


def find_corruption(checkpoint: Path) -> str | None:
    """Return a description of a checkpoint's damage; None if every file is as written."""
    try:
        text = (checkpoint / MANIFEST).read_bytes()
        files = json.loads(text)["files"]
        if text != _manifest(files):
            return f"{MANIFEST} is damaged"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or damaged"
    for name, (size, checksum) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if file_sha256(path) != checksum:
            return f"{name} is damaged"
    return None


def find_newest(folder: Path, before: int | None = None) -> tuple[Path | None, list[str]]:
    """Return a run's newest intact checkpoint, and notices of damaged ones, which are renamed.

    With ``before``, only checkpoints of earlier steps count.
    """
    passed_over: list[str] = []
    for path in reversed(checkpoints(folder)):
        if before is not None and int(path.name.removeprefix("step-")) >= before:
            continue
        problem = find_corruption(path)
        if problem is None:
            return path, passed_over
        passed_over.append(f"the checkpoint {path.name} cannot be used: {problem}")
        # Under its own name it would count as one of the checkpoints to keep.
        move_folder(path, path.with_name(path.name + DAMAGED))
    return None, passed_over


def last_checkpoint_hint(folder: Path) -> str:
    """Return a sentence that names a stopped run's last checkpoint."""
    saved = checkpoints(folder)
    return f"The last good checkpoint is {saved[-1]}" if saved else "No checkpoint was saved before (train.save_every)"


def prune_checkpoints(folder: Path, keep: int, also: Collection[int] = ()) -> None:
    """Remove all but the last ``keep`` checkpoints and those of the steps ``also``, and unfinished ones."""
    found = checkpoints(folder)
    kept = {*found[-keep:], *(checkpoint_path(folder, step) for step in also)}
    for path in set(found) - kept:
        remove_folder(path)
    for path in (folder / "checkpoints").iterdir():
        if path.suffix in (PARTIAL, DAMAGED):
            shutil.rmtree(path, ignore_errors=True)


def _manifest(files: dict[str, Any]) -> bytes:
    """Return a manifest's canonical bytes, its own checksum included, so that any change is detected."""
    seal = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return (json.dumps({"format": 1, "files": files, "seal": seal}, indent=1) + "\n").encode()
