"""``subspace table``: tables of results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from subspace.cli.command import Command, chosen_format, deliver, format_arguments, say, scored_arguments


def _arguments(parser: argparse.ArgumentParser) -> None:
    scored_arguments(parser)
    parser.add_argument("--transpose", action="store_true", help="methods as rows, tasks as columns; for many methods")
    parser.add_argument("--plot", metavar="FILE", help="also plot scores and intervals to a .png, .svg or .pdf file")
    format_arguments(parser)


def _run(options: argparse.Namespace) -> int:
    from subspace.common.tables import print_grid
    from subspace.reporting.table_formats import write
    from subspace.reporting.tables import build_tables

    form = chosen_format(options)
    found = build_tables([Path(run) for run in options.runs], options.protocol)
    if form == "terminal":
        for table in found:
            print_grid(table.grid.transposed() if options.transpose else table.grid)
    else:
        deliver(write(found, form, transposed=options.transpose), options)
    if options.plot:
        from subspace.reporting.plots import plot

        for file in plot(found, Path(options.plot)):
            say(f"plot: {file}", file=sys.stderr)
    return 0


COMMAND = Command(
    "table",
    "tabulate the results of runs side by side",
    """examples:
  subspace table runs/smollm2-135m runs/quickstart
  subspace table runs/* --protocol llm-adapters --markdown
  subspace table runs/dora-seed0 runs/dora-seed1 runs/dora-seed2      seeds of one method share a column: mean ± sd
  subspace table runs/* --format latex --transpose
  subspace table runs/* --output scores.html          a page with charts; .md, .tex, .csv and .json as well
  subspace table runs/* --plot scores.svg""",
    _arguments,
    _run,
)
