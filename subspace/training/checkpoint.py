"""Atomic checkpoint directories verified by a SHA-256 manifest.

They are named ``checkpoints/step-000120``. One is written under another name, fsynced, read back and renamed, so that
a process killed at any moment leaves the older ones unchanged. ``manifest.json`` has the size and SHA-256 of each
file, and of itself, and says of which run and step they are; no file is opened before the manifest is verified. No file
is a pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path, PurePath
from typing import Any, NotRequired

from typing_extensions import TypedDict

from subspace.adapters.serialization import read_description
from subspace.common.declarations import Amount, Count, Finite, Positive
from subspace.common.files import (
    PARTIAL,
    begin_folder,
    file_sha256,
    finish_folder,
    move_folder,
    remove_folder,
    settle_folder,
    write_checked,
)
from subspace.common.foreign.text import read_json
from subspace.errors import UserError, printable

MANIFEST = "manifest.json"
#: What checkpoints are renamed to that cannot be used, and those of another run, which nothing here removes.
DAMAGED, FOREIGN = ".damaged", ".foreign"
FACTS, ADAPTER, ENVIRONMENT_FILE = "training.json", "adapter", "environment.json"


class _Manifest(TypedDict):
    """A checkpoint's ``manifest.json``; those of format 1 do not say the run and the step."""

    format: Positive
    files: dict[str, list[int | str]]
    seal: str
    run: NotRequired[str | None]
    step: NotRequired[Count]


class _Step(TypedDict):
    step: Count


class Outcome(TypedDict):
    """How a training ended, in its ``environment.json``: steps, the last step's loss, seconds, and bytes at most."""

    steps: Positive
    loss: Finite
    seconds: Amount
    peak_memory: Count


class _Environment(TypedDict, total=False):
    run: str
    outcome: Outcome


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run, by their steps."""
    found = (path for path in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name))
    steps = {step_of(path): path for path in found if path.name == checkpoint_path(folder, step_of(path)).name}
    return [steps[step] for step in sorted(steps)]


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return folder / "checkpoints" / f"step-{step:06d}"


def begin_checkpoint(target: Path) -> Path:
    """Return an empty folder for a checkpoint's files, to be renamed by :func:`finish_checkpoint`."""
    return begin_folder(target)


def finish_checkpoint(unfinished: Path, target: Path, run: str | None = None) -> None:
    """Write the manifest of a folder's files, with its step and run, and rename the folder to ``target``."""
    inside = sorted(path for path in unfinished.rglob("*") if path.is_file())
    files = {str(path.relative_to(unfinished)): [path.stat().st_size, file_sha256(path)] for path in inside}
    write_checked(unfinished / MANIFEST, _manifest({"format": 2, "run": run, "step": step_of(target), "files": files}))
    finish_folder(unfinished, target)


def find_corruption(checkpoint: Path) -> str | None:
    """Return a description of a checkpoint's damage; None if every file is as written, for the step of its name."""
    file = checkpoint / MANIFEST
    try:
        content: dict[str, Any] = read_json(file, _Manifest)
        if file.read_bytes() != _manifest({key: value for key, value in content.items() if key != "seal"}):
            return f"{MANIFEST} is damaged"
    except (UserError, OSError):
        return f"{MANIFEST} is missing or damaged"
    for name, about in content["files"].items():
        size, checksum = (*about, "", "")[:2]
        path = checkpoint / name
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            return f"{MANIFEST} names {printable(name)}, which is no file of its folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if file_sha256(path) != checksum:
            return f"{name} is damaged"
    step = content.get("step") or _former_step(checkpoint)
    return None if step in (None, step_of(checkpoint)) else f"it is of step {step}, and was renamed"


def _former_step(checkpoint: Path) -> int | None:
    """Return the step of a checkpoint of an earlier version, whose manifest does not say it."""
    try:
        step: int = read_json(checkpoint / FACTS, _Step, finite=False)["step"]
    except UserError:
        return None
    return step


def run_of(checkpoint: Path) -> str | None:
    """Return the run that a checkpoint's manifest names; None if it does not, as those of earlier versions."""
    try:
        manifest: dict[str, Any] = read_json(checkpoint / MANIFEST, _Manifest)
    except UserError:
        return None
    return manifest.get("run")


def known_run_id(folder: Path) -> str | None:
    """Return the id of the run in a folder; None if it has none, as runs of earlier versions."""
    return read_environment(folder).get("run")


def read_environment(folder: Path) -> dict[str, Any]:
    """Return what a run has written about itself, with an :class:`Outcome` as ``outcome`` if its training has ended.

    Empty without such a file.

    Raises:
        UserError: the file cannot be read, or is none of a run.
    """
    file = folder / ENVIRONMENT_FILE
    if not os.path.lexists(file):
        return {}
    try:
        found: dict[str, Any] = read_json(file, _Environment, finite=False)  # the best of no validation is infinite
    except UserError as error:
        raise UserError(f"{error}. Copy the whole run again, or remove this file and resume: --resume") from None
    return found


def own_adapter(folder: Path) -> Path:
    """Return the folder of a finished run's adapter.

    Raises:
        UserError: there is none, or it is another run's.
    """
    adapter = folder / ADAPTER
    with contextlib.suppress(OSError):
        settle_folder(adapter)
    if not adapter.is_dir():
        raise UserError(f"the run {folder} has no adapter: its training did not reach the end. Train it again")
    about = read_description(adapter).get("about")
    run, named = known_run_id(folder), about.get("run") if isinstance(about, dict) else None
    if run != named:
        raise UserError(
            f"the adapter in {adapter} is of another run than its {ENVIRONMENT_FILE} and config.yaml. Copy whole run "
            "folders, or resume the training: subspace train CONFIG --resume"
        )
    return adapter


def find_newest(folder: Path, before: int | None = None, run: str | None = None) -> tuple[Path | None, list[str]]:
    """Return a run's newest intact checkpoint, and notices of damaged and foreign ones, which are renamed.

    With ``before``, only checkpoints of earlier steps count; with ``run``, only those that name this run or none.
    """
    passed_over: list[str] = []
    for path in reversed(checkpoints(folder)):
        if before is not None and step_of(path) >= before:
            continue
        problem = find_corruption(path)
        if problem is None and run and run_of(path) not in (None, run):
            passed_over.append(f"the checkpoint {path.name} is another run's: it is put aside as {path.name}{FOREIGN}")
            move_folder(path, path.with_name(path.name + FOREIGN))
            continue
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


def prune_checkpoints(folder: Path, keep: int, also: Collection[int] = (), run: str | None = None) -> None:
    """Remove all but a run's last ``keep`` checkpoints and those of the steps ``also``, and unfinished ones."""
    found = [path for path in checkpoints(folder) if run is None or run_of(path) in (None, run)]
    kept = {*found[-keep:], *(checkpoint_path(folder, step) for step in also)}
    for path in set(found) - kept:
        remove_folder(path)
    for path in (folder / "checkpoints").iterdir():
        if path.suffix in (PARTIAL, DAMAGED):
            shutil.rmtree(path, ignore_errors=True)


def _manifest(content: Mapping[str, Any]) -> bytes:
    """Return a manifest's canonical bytes, its own checksum included, so that any change is detected."""
    sealed = content["files"] if content["format"] == 1 else content
    seal = hashlib.sha256(json.dumps(sealed).encode()).hexdigest()
    return (json.dumps({**content, "seal": seal}, indent=1) + "\n").encode()
