"""Cells that are trained in one pass, as a file each pass while they are: after a kill they go on together.

What a run computes depends, in its last digits, on which others share its passes. So a training that a kill interrupts
goes on with all the cells that it began with, from the last step of which each has a checkpoint; those that had come
further are taken back to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from typing_extensions import TypedDict

from subspace.common.files import remove_folder, write_json
from subspace.common.foreign.text import read_json
from subspace.common.locks import in_use
from subspace.errors import UserError
from subspace.study.cells import FAILED_FILE, Cell
from subspace.study.grid import Grid
from subspace.training.checkpoint import ADAPTER, ENVIRONMENT_FILE, checkpoint_path, checkpoints, step_of

#: In a study's folder, with a file for each pass.
PASSES = ".passes"


class Pass(NamedTuple):
    """Cells that are trained together, or one alone, up to a step."""

    cells: list[Cell]
    until: int

    @property
    def file(self) -> Path:
        """The file that is there while its cells are trained."""
        first = self.cells[0]
        return first.grid.folder / PASSES / f"{'_'.join(_place(first).split('/'))}.json"


class _Record(TypedDict):
    """Up to which step which cells are trained, by their folders in the study's."""

    until: int
    cells: list[str]


def begin_pass(begun: Pass) -> None:
    """Record that these cells are trained together up to a step."""
    write_json(begun.file, _Record(until=begun.until, cells=[_place(cell) for cell in begun.cells]))


def end_pass(ended: Pass) -> None:
    """Record that they are no longer."""
    ended.file.unlink(missing_ok=True)


def interrupted_passes(grid: Grid, cells: Iterable[Cell]) -> list[Pass]:
    """Return the passes that have not reached their end.

    Args:
        grid: the study's.
        cells: all that it has now. A pass with others, as before a change of the study, is forgotten.
    """
    known = {_place(cell): cell for cell in cells}
    found = []
    for file in sorted((grid.folder / PASSES).glob("*.json")):
        try:
            record: _Record = read_json(file, _Record)
        except UserError:  # of another version
            record = _Record(until=0, cells=[])
        own = [known[name] for name in record["cells"] if name in known]
        if len(own) < len(record["cells"]) or all(_has_reached(cell, record["until"]) for cell in own):
            file.unlink()
        else:
            found.append(Pass(own, record["until"]))
    return found


def _place(cell: Cell) -> str:
    return cell.folder.relative_to(cell.grid.folder).as_posix()


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
