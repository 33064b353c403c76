"""Cells that are trained in one pass, as a file while they are: after a kill they go on together.

What a run computes depends, in its last digits, on which others share its passes. So a training that a kill interrupts
goes on with all the cells that it began with, from the last step of which each has a checkpoint; those that had come
further are taken back to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from typing_extensions import TypedDict

from subspace.common.files import remove_folder, write_json
from subspace.common.foreign.text import read_json
from subspace.common.locks import in_use
from subspace.errors import UserError
from subspace.study.cells import FAILED_FILE, Cell
from subspace.study.grid import Grid
from subspace.training.checkpoint import ADAPTER, ENVIRONMENT_FILE, checkpoint_path, checkpoints, step_of

PASS_FILE = "pass.json"


class _Record(TypedDict):
    """Up to which step which cells are trained, by their folders in the study's."""

    until: int
    cells: list[str]


def begin_pass(grid: Grid, cells: Sequence[Cell], until: int) -> None:
    """Record that these cells are trained together up to a step."""
    names = [cell.folder.relative_to(grid.folder).as_posix() for cell in cells]
    write_json(grid.folder / PASS_FILE, _Record(until=until, cells=names))


def end_pass(grid: Grid) -> None:
    """Record that no cells are."""
    (grid.folder / PASS_FILE).unlink(missing_ok=True)


def interrupted_pass(grid: Grid, cells: Iterable[Cell]) -> tuple[list[Cell], int] | None:
    """Return the cells of a training that has not reached its end, and up to which step they are due; None without one.

    Args:
        grid: the study's.
        cells: all that it has now. A training of others, as before a change of the study, is forgotten.
    """
    file = grid.folder / PASS_FILE
    if not file.exists():
        return None
    known = {cell.folder: cell for cell in cells}
    try:
        record: _Record = read_json(file, _Record)
    except UserError:  # of another version
        record = _Record(until=0, cells=[])
    found = [known[grid.folder / name] for name in record["cells"] if grid.folder / name in known]
    if len(found) < len(record["cells"]) or all(_has_reached(cell, record["until"]) for cell in found):
        end_pass(grid)
        return None
    return found, record["until"]


def take_back(cells: Sequence[Cell]) -> None:
    """Take cells back to the last step of which each has a checkpoint; to nothing, if there is none."""
    saved = [{step_of(path) for path in checkpoints(cell.folder)} for cell in cells]
    step = max(set.intersection(*saved), default=0)
    for cell in cells:
        _take_back(cell, step)


def _has_reached(cell: Cell, step: int) -> bool:
    if cell.failed:
        return True
    saved = cell.ended if step == cell.grid.steps else checkpoint_path(cell.folder, step).exists()
    return saved and step in cell.losses()


def _take_back(cell: Cell, step: int) -> None:
    """Remove what a cell has of later steps, but for lines of its log, which end where its training goes on."""
    with in_use(cell.folder):
        for path in checkpoints(cell.folder):
            if step_of(path) > step:
                remove_folder(path)
        remove_folder(cell.folder / ADAPTER)
        (cell.folder / FAILED_FILE).unlink(missing_ok=True)
        facts = cell.facts()
        if facts.keys() & {"outcome", "failure"}:
            kept = {key: value for key, value in facts.items() if key not in ("outcome", "failure")}
            write_json(cell.folder / ENVIRONMENT_FILE, kept)
    if not step:
        remove_folder(cell.folder)
