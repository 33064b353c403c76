"""``runs/STUDY/study.json``: the resolved grid, by which a study goes on, and refuses to go on as another one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from subspace.common.files import write_json
from subspace.common.foreign.text import read_json
from subspace.common.hashing import hash_json
from subspace.common.progress import Progress, no_progress
from subspace.errors import UserError
from subspace.study.cells import Cell
from subspace.study.config import Study
from subspace.study.grid import Grid, resolve
from subspace.study.search import Trial

STUDY_FILE = "study.json"
SCHEMA = 1


def open_grid(study: Study, progress: Progress = no_progress, *, write: bool = False) -> Grid:
    """Return a study's grid: as it is recorded, if its file still means the same, else resolved anew.

    Args:
        study: the study.
        progress: shows the passes that centre the ladders.
        write: whether to record a new one.

    Raises:
        UserError: runs of the study exist that the new grid does not have.
    """
    plain = resolve(study, centred=False)
    asked = grid_hash(plain)
    recorded = _read(plain)
    if recorded and recorded["asked"] == asked:
        return _restored(plain, recorded["grid"])
    if recorded:  # what needs no gradients is refused before they are taken
        refuse_changed(recorded["grid"], plain, rates=bool(study.rates.list))
    grid = resolve(study, progress)
    if recorded:
        refuse_changed(recorded["grid"], grid)
    if write:
        content = {"schema": SCHEMA, "asked": asked, "hash": grid_hash(grid), "grid": grid.as_dict()}
        write_json(grid.folder / STUDY_FILE, content)
    return grid


def _read(grid: Grid) -> dict[str, Any] | None:
    file = grid.folder / STUDY_FILE
    if not file.exists():
        return None
    try:
        found: dict[str, Any] = read_json(file, dict[str, Any])
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']}")
        found["grid"]["contenders"], found["asked"]
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}). Remove it: the runs stay, and are found again") from None
    return found


def grid_hash(grid: Grid) -> str:
    """Return the hash of all that decides the study's numbers; where its files lie does not."""
    return hash_json({key: value for key, value in _plain(grid).items() if key not in ("base", "runs")})


def _plain(grid: Grid) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(grid.as_dict(), default=str))
    return plain


def _restored(plain: Grid, recorded: Mapping[str, Any]) -> Grid:
    """Return the grid with the gradients and trials of its record."""
    by_label = {entry["label"]: entry for entry in recorded["contenders"]}
    contenders = []
    for contender in plain.contenders:
        entry = by_label[contender.label]
        trials = tuple(_trial(trial) for trial in entry["trials"])
        measured = {"gradient": entry["gradient"], "exponent": entry["exponent"]}
        contenders.append(replace(contender, trials=trials, **measured))
    return replace(plain, contenders=tuple(contenders))


def _trial(plain: Any) -> Trial:
    rate, axes = plain
    return Trial(rate, tuple((name, value) for name, value in axes))


def refuse_changed(recorded: Mapping[str, Any], grid: Grid, *, rates: bool = True) -> None:
    """Raise UserError if a run that was begun under the recorded grid is another one, or none, under this one.

    Without ``rates``, the grid's are not known yet.
    """
    new = _plain(grid)
    before = {entry["label"]: entry for entry in recorded["contenders"]}
    for label, entry in before.items():
        begun = list(_begun(grid, recorded, entry))
        if not begun:
            continue
        changes = [*_changes(recorded, new, ("shared", "rules")), *_contender_changes(entry, new, rates=rates)]
        if changes:
            raise UserError(
                f"the study {grid.name} has {begun[0].folder}, from before {changes[0]}. Undo that, give the study "
                f"another name, or remove {grid.folder / label} to run {label} again"
            )
        for name in ("search_seeds", "final_seeds"):
            gone = {*recorded[name]} - {*new[name]}
            for cell in begun:
                if cell.seed in gone:
                    raise UserError(
                        f"the study {grid.name} has {cell.folder}, but {name.replace('_', '.')} no longer has "
                        f"{cell.seed}. Leaving out what is trained would choose results: put it back, or give the "
                        "study another name"
                    )


def _begun(grid: Grid, recorded: Mapping[str, Any], entry: Mapping[str, Any]) -> Iterator[Cell]:
    """Yield the cells of a recorded method of which there is anything."""
    for trial in map(_trial, entry["trials"]):
        for seed in (*recorded["search_seeds"], *recorded["final_seeds"]):
            cell = Cell(grid, entry["label"], trial, seed)
            if cell.begun:
                yield cell


def _contender_changes(entry: Mapping[str, Any], new: Mapping[str, Any], *, rates: bool) -> Iterator[str]:
    now = next((other for other in new["contenders"] if other["label"] == entry["label"]), None)
    if now is None:  # a method that is no longer compared: its runs stay where they are
        return
    yield from _changes(entry, now, ("name", "settings", "targets"))
    if rates and any(trial not in now["trials"] for trial in entry["trials"]):
        yield f"its rates changed from {_rates(entry)} to {_rates(now)}"


def _rates(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted({trial[0] for trial in entry["trials"]}))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts:
        old, new = dict(_flat(part, before[part])), dict(_flat(part, now[part]))
        for key in {**old, **new}:
            younger = part == "shared" and key not in old  # a setting that did not exist has its default
            if old.get(key) != new.get(key) and not younger:
                name = key.removeprefix("shared.").removeprefix("rules.")
                yield f"{name} changed from {old.get(key)!r} to {new.get(key)!r}"


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value
