"""``subspace compare``: paired tests between runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from subspace.cli.command import Command, chosen_format, deliver, format_arguments, say, scored_arguments
from subspace.errors import UserError

if TYPE_CHECKING:
    from subspace.reporting.comparison import Comparison


def _arguments(parser: argparse.ArgumentParser) -> None:
    scored_arguments(parser)
    parser.add_argument("--published", action="store_true", help="compare each run with the scores of its `published:`")
    parser.add_argument("--items", action="store_true", help="list the items that only one of two got right")
    format_arguments(parser)


def _run(options: argparse.Namespace) -> int:
    from subspace.common.tables import print_grid
    from subspace.reporting.comparison import compare_runs, comparisons_csv

    folders, form = [Path(run) for run in options.runs], chosen_format(options)
    if options.published:
        return _show_published(folders, form, options)
    found = compare_runs(folders, options.protocol)
    if form == "terminal":
        for one in found:
            for grid in (one.grid, one.flipped) if options.items else (one.grid,):
                print_grid(grid)
            say(one.verdict)
        return 0
    if form == "html":
        from subspace.reporting.page.scores import comparisons_page

        text = comparisons_page(found, items=options.items)
    elif form in ("json", "csv"):
        text = json.dumps([one.as_dict() for one in found], indent=2) if form == "json" else comparisons_csv(found)
    else:
        text = "\n\n".join(part for one in found for part in _parts(one, form, items=options.items))
    deliver(text, options)
    return 0


def _parts(one: Comparison, form: str, *, items: bool) -> Iterator[str]:
    """Yield a comparison's tables and its verdict as Markdown or LaTeX."""
    from subspace.common.tables import render_grids

    for grid in (one.grid, one.flipped) if items else (one.grid,):
        yield render_grids([grid], form)
    yield one.verdict if form == "markdown" else "\n".join(f"% {line}" for line in one.verdict.splitlines())


def _show_published(folders: list[Path], form: str, options: argparse.Namespace) -> int:
    from subspace.common.tables import print_grid, render_grids
    from subspace.reporting.published import compare_with_published, published_csv

    if options.items:
        raise UserError("--items lists what flipped between two runs; published scores come without items")
    found = compare_with_published(folders, options.protocol)
    if form == "terminal":
        for one in found:
            print_grid(one.grid)
        return 0
    if form == "html":
        from subspace.reporting.page.scores import published_page

        text = published_page(found)
    elif form in ("json", "csv"):
        text = json.dumps([one.as_dict() for one in found], indent=2) if form == "json" else published_csv(found)
    else:
        text = render_grids([one.grid for one in found], form)
    deliver(text, options)
    return 0


COMMAND = Command(
    "compare",
    "compare runs: paired significance tests, confidence intervals, and the items that flipped",
    """examples:
  subspace compare runs/lora runs/dora
  subspace compare runs/lora runs/dora runs/pissa          each with the first, corrected for multiple tests
  subspace compare runs/lora runs/dora --items
  subspace compare runs/lora runs/dora --output difference.html    a page with a chart; .md, .tex, .csv, .json
  subspace compare runs/llama-7b-dora-r32 --published      with the literature's scores""",
    _arguments,
    _run,
)
