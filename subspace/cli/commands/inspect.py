"""``subspace inspect``: what a run's update does to the subspaces of the frozen weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from subspace.cli.command import Command, chosen_format, deliver, format_arguments, sign_of_life
from subspace.errors import UserError

FORMS = ("terminal", "markdown", "latex", "json")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder; settings may follow, as key=value")
    parser.add_argument("--layers", action="store_true", help="a row for each site, not for each kind of layer")
    parser.add_argument("--over-steps", action="store_true", help="also the adapters of all checkpoints")
    format_arguments(parser)


def _run(options: argparse.Namespace) -> int:
    form = chosen_format(options)
    if form not in FORMS:
        raise UserError(f"an inspection is written as {', '.join(FORMS)}, not as {form}")
    settings = [word for word in options.runs if "=" in word]
    runs = [Path(word) for word in options.runs if "=" not in word]
    if not runs:
        raise UserError("no run was named. Which run's folder is to be inspected?")
    sign_of_life(str(runs[0]))
    from subspace.common.progress import show_progress
    from subspace.common.tables import print_grid, render_grids
    from subspace.diagnostics.inspect import inspect_runs, to_json
    from subspace.diagnostics.report import grids

    found = inspect_runs(runs, settings, over_steps=options.over_steps, progress=show_progress)
    tables = grids(found, layers=options.layers)
    if form == "terminal":
        for table in tables:
            print_grid(table)
    else:
        deliver(to_json(found) if form == "json" else render_grids(tables, form), options)
    return 0


COMMAND = Command(
    "inspect",
    "measure what a run's update does to the subspaces of the frozen weights, beside chance",
    """examples:
  subspace inspect runs/quickstart                 by kind of layer: size, rank, directions of W, intruders
  subspace inspect runs/quickstart --layers        every site
  subspace inspect runs/lora --over-steps          when the directions settle, from the checkpoints
  subspace inspect runs/lora runs/pissa            side by side, and the overlap of their updates
  subspace inspect runs/lora --json                every number; it is also written to RUN/inspect/""",
    _arguments,
    _run,
)
