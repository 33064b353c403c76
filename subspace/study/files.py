"""The files of a study's report: ``report.html``, ``table.md``, ``table.tex``, ``cells.csv`` and ``curves.csv``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from subspace.common.files import write_file
from subspace.common.tables import csv_text
from subspace.reporting.retention import KEPT, read_kept
from subspace.study.cells import Cell, final_cells, search_cells, trial_name
from subspace.study.page.page import study_page
from subspace.study.report import report_grid
from subspace.study.results import StudyResult, plain

#: The file that has the report in a form of ``--format``.
FILES = {"html": "report.html", "markdown": "table.md", "latex": "table.tex", "csv": "cells.csv"}
#: Columns of ``cells.csv`` that depend on the machine, at its end.
TIMES = ("seconds", "seconds_a_step", "peak_memory")


def write_report(result: StudyResult) -> list[Path]:
    """Write the study's files into its folder and return them."""
    folder, grid = result.grid.folder, report_grid(result)
    cells, curves = list(cell_rows(result)), list(curve_rows(result))
    contents = {
        "report.html": study_page(result, cells, curves, made_with(result)),
        "table.md": grid.markdown() + "\n",
        "table.tex": grid.latex() + "\n",
        "cells.csv": csv_text(cells, TIMES),
        "curves.csv": csv_text(curves),
    }
    for name, content in contents.items():
        write_file(folder / name, content)
    return [folder / name for name in contents]


def cell_rows(result: StudyResult) -> Iterator[dict[str, Any]]:
    """Yield a row for each cell of which there is anything; the columns that depend on the machine come last."""
    for phase, cell in _cells(result):
        if not cell.begun:
            continue
        losses = cell.losses()
        contender = result.grid.contender(cell.method)
        last = max((int(line["step"]) for line in cell.log() if "seconds" in line), default=0)
        seconds = cell.seconds
        yield {
            **_names(cell, phase),
            **dict(cell.trial.axes),
            "trained": contender.trained,
            "steps": max((step for step in losses if not cell.failed), default=0),
            "state": "failed" if cell.failed else "finished" if cell.ended else "paused",
            **{f"loss_{step}": plain(losses.get(step)) for step in result.grid.rules.rungs},
            KEPT: _kept(cell),
            "seconds": seconds,
            "seconds_a_step": seconds / last if last and seconds is not None else None,
            "peak_memory": cell.peak_memory,
        }


def curve_rows(result: StudyResult) -> Iterator[dict[str, Any]]:
    """Yield every held-out loss of every cell: the curves over steps, and over rates."""
    for phase, cell in _cells(result):
        if not cell.failed:
            for step, loss in sorted(cell.losses().items()):
                yield {**_names(cell, phase), "step": step, "validation_loss": plain(loss)}


def _names(cell: Cell, phase: str) -> dict[str, Any]:
    """Return the columns that say which cell a row is of."""
    trial = cell.trial
    return {"method": cell.method, "phase": phase, "trial": trial_name(trial), "rate": trial.rate, "seed": cell.seed}


def _kept(cell: Cell) -> float | None:
    """Return the bits per byte that a cell needs more than its base, the mean over passages; None if not measured."""
    kept = read_kept([(cell.folder, None)]) if cell.measured else None
    return kept.more.value if kept and kept.more else None


def _cells(result: StudyResult) -> Iterator[tuple[str, Cell]]:
    for cell in search_cells(result.grid, result.outcome):
        yield "search", cell
    for cell in sorted(final_cells(result.grid, result.outcome), key=lambda cell: (cell.method, cell.seed)):
        yield "final", cell


def made_with(result: StudyResult) -> list[tuple[str, str]]:
    """Return what the finals were made with, by what their folders say: name and values, several where they differ."""
    found: dict[str, dict[str, None]] = {}
    for cell in final_cells(result.grid, result.outcome):
        facts = cell.facts()
        model, data = facts.get("model") or {}, facts.get("data") or {}
        values = {
            "commit": facts.get("commit"),
            "model": model.get("path") and f"{model['path']}, {model.get('dtype')}, {model.get('quantize')}",
            "data": data.get("mixture"),
            "rows": data.get("train") and f"{data['train']} trained on, {data.get('validation')} held out",
            "devices": ", ".join(map(str, facts.get("devices") or ())),
            "processes": facts.get("processes"),
            "python": facts.get("python"),
            **(facts.get("packages") or {}),
        }
        for name, value in values.items():
            if value not in (None, ""):
                found.setdefault(name, {})[str(value)] = None
    return [(name, "; ".join(values)) for name, values in found.items()]
