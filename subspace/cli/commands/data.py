"""``subspace data``: statistics of a run's training and test data."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from subspace.cli.command import Command, count, json_argument, say, settings_manual, sign_of_life
from subspace.errors import UserError

if TYPE_CHECKING:
    from subspace.common.tables import Grid


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", metavar="CONFIG", help="a run's configuration; or a mixture, a task, a file, a folder or org/name"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings instead of the file's")
    parser.add_argument(
        "--ngram", type=count, default=13, metavar="N", help="consecutive words that count as a match; default: 13"
    )
    parser.add_argument("--items", action="store_true", help="list the test items that are in the training text")
    parser.add_argument("--markdown", action="store_true", help="for a document")
    json_argument(parser)


def _run(options: argparse.Namespace) -> int:
    sign_of_life(options.data)
    from subspace.common.progress import show_progress
    from subspace.common.tables import print_grid
    from subspace.config import read_data_config
    from subspace.evaluation.config import EvaluateConfig
    from subspace.reporting.row_report import report_rows

    config = read_data_config(options.data, options.settings)
    own = report_rows(config.data)

    def show(grid: Grid) -> None:
        say(f"{grid.markdown()}\n") if options.markdown else print_grid(grid)

    if own.sources and not options.json:
        show(own.grid)
    if own.refused:
        if options.json:
            say(json.dumps({"sources": own.as_dict()}, indent=2))
        return UserError.status

    from subspace.models.loading import model_limits, open_tokenizer
    from subspace.reporting.data_report import build_report
    from subspace.resolve import data_settings

    # Suites of the literature say nothing about a file of one's own, unless they are asked for.
    asked = config.evaluate.tasks != EvaluateConfig().tasks or any("evaluate.tasks" in s for s in options.settings)
    found = build_report(
        data_settings(config),
        config.evaluate,
        "@".join(filter(None, (config.model.path, config.model.revision))),
        open_tokenizer(config.model),
        seed=config.train.seed,
        ngram=options.ngram,
        compare=asked or not own.sources,
        limits=model_limits(config.model),
        progress=show_progress,
    )
    if options.json:
        say(json.dumps({**found.as_dict(), "sources": own.as_dict()}, indent=2))
        return 0
    for grid in [*found.grids, found.items] if options.items else found.grids:
        show(grid)
    if found.example:
        say(found.example)
    return 0


COMMAND = Command(
    "data",
    "report on a run's training and test data: rows, bad rows, duplicates, truncation, contamination",
    """examples:
  subspace data commonsense
  subspace data launch/recipes/quickstart.yaml data.max_length=400
  subspace data boolq,piqa:500 evaluate.tasks=boolq,piqa --items
  subspace data mine.jsonl
  subspace data mine.csv 'data.columns={instruction: question, output: reply}' data.bad_rows=drop
  subspace data 'shards/*.jsonl.gz,org/name:config@revision[train]*0.5'
  subspace data mine.jsonl evaluate.tasks=boolq --ngram 8 --json""",
    _arguments,
    _run,
    settings_manual,
)
