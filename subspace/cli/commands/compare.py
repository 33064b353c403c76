"""``subspace compare``: whether runs differ."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from subspace.cli.command import Command, json_argument, scored_arguments


def _arguments(parser: argparse.ArgumentParser) -> None:
    scored_arguments(parser)
    parser.add_argument("--items", action="store_true", help="list the items that only one of two got right")
    parser.add_argument("--markdown", action="store_true", help="for a document")
    json_argument(parser)


def _run(options: argparse.Namespace) -> int:
    from subspace.common.tables import print_grid
    from subspace.reporting.comparison import compare_runs

    found = compare_runs([Path(run) for run in options.runs], options.protocol)
    if options.json:
        print(json.dumps([one.as_dict() for one in found], indent=2))
        return 0
    for one in found:
        for grid in (one.grid, one.flipped) if options.items else (one.grid,):
            print(f"{grid.markdown()}\n") if options.markdown else print_grid(grid)
        print(one.verdict)
    return 0


COMMAND = Command(
    "compare",
    "tell whether runs differ: paired tests, intervals, and the items that flipped",
    """examples:
  subspace compare runs/lora runs/dora
  subspace compare runs/lora runs/dora runs/pissa          each with the first, corrected for their number
  subspace compare runs/lora runs/dora --items""",
    _arguments,
    _run,
)
