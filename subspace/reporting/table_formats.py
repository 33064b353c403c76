"""Result tables as text: Markdown, LaTeX, CSV, JSON, or a page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from subspace.common.tables import csv_text, render_grids
from subspace.reporting.page.scores import tables_page
from subspace.reporting.retention import KEPT
from subspace.reporting.tables import Table, alike


def write(tables: Sequence[Table], form: str, *, transposed: bool = False) -> str:
    """Return tables as text, as a page, or as a format of ``render_grids``; ``transposed`` swaps rows and columns."""
    if form == "json":
        return json.dumps([table.as_dict() for table in tables], indent=2)
    if form == "csv":
        return _csv(tables)
    if form == "html":
        return tables_page(tables, transposed=transposed)
    return render_grids([table.grid.transposed() if transposed else table.grid for table in tables], form)


def _csv(tables: Sequence[Table]) -> str:
    """Return CSV with one line for each task, metric and method."""
    rows = [
        {
            "protocol": table.protocol, "task": row.task, "metric": row.metric, "items": row.n,
            "majority": row.majority, "in_mean": row.in_mean, "method": column.name,
            **dataclasses.asdict(cell), "fingerprint": row.fingerprint, **column.facts._asdict(),
            KEPT: more and more.value, f"{KEPT}_low": more and more.low, f"{KEPT}_high": more and more.high,
        }
        for table in tables
        for kept in [[None if found is None else found.more for found in alike(table.columns)]]
        for row in (*table.rows, *table.means)
        for column, cell, more in zip(table.columns, row.cells, kept, strict=True)
        if cell
    ]  # fmt: skip
    return csv_text(rows).rstrip("\n")
