"""``subspace compare``: paired tests between runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from subspace.cli.command import Command, json_argument, say, scored_arguments
from subspace.errors import UserError


def _arguments(parser: argparse.ArgumentParser) -> None:
    scored_arguments(parser)
    parser.add_argument("--published", action="store_true", help="compare each run with the scores of its `published:`")
    parser.add_argument("--items", action="store_true", help="list the items that only one of two got right")
    parser.add_argument("--markdown", action="store_true", help="for a document")
    json_argument(parser)


def _run(options: argparse.Namespace) -> int:
    from subspace.common.tables import print_grid
    from subspace.reporting.comparison import compare_runs

    folders = [Path(run) for run in options.runs]
    if options.published:
        return _show_published(folders, options)
    found = compare_runs(folders, options.protocol)
    if options.json:
        say(json.dumps([one.as_dict() for one in found], indent=2))
        return 0
    for one in found:
        for grid in (one.grid, one.flipped) if options.items else (one.grid,):
            say(f"{grid.markdown()}\n") if options.markdown else print_grid(grid)
        say(one.verdict)
    return 0


def _show_published(folders: list[Path], options: argparse.Namespace) -> int:
    from subspace.common.tables import print_grid
    from subspace.reporting.published import compare_with_published

    if options.items:
        raise UserError("--items lists what flipped between two runs; published scores come without items")
    found = compare_with_published(folders, options.protocol)
    if options.json:
        say(json.dumps([one.as_dict() for one in found], indent=2))
        return 0
    for one in found:
        say(f"{one.grid.markdown()}\n") if options.markdown else print_grid(one.grid)
    return 0


COMMAND = Command(
    "compare",
    "compare runs: paired significance tests, confidence intervals, and the items that flipped",
    """examples:
  subspace compare runs/lora runs/dora
  subspace compare runs/lora runs/dora runs/pissa          each with the first, corrected for multiple tests
  subspace compare runs/lora runs/dora --items
  subspace compare runs/llama-7b-dora-r32 --published      with the literature's scores""",
    _arguments,
    _run,
)
