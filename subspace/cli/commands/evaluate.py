"""``subspace evaluate``: score models and adapters."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from subspace.cli.command import (
    Command,
    count,
    json_argument,
    launch_arguments,
    launch_or_none,
    say,
    settings_manual,
    sign_of_life,
)
from subspace.common.host_memory import manage_malloc
from subspace.distributed import launcher
from subspace.errors import UserError, shown

if TYPE_CHECKING:
    from subspace.evaluation.config import EvaluationSubject
    from subspace.evaluation.evaluate import Job
    from subspace.reporting.tables import Table


def _arguments(parser: argparse.ArgumentParser) -> None:
    what = "a run's folder; a configuration, for its base model; or a model's name or path"
    parser.add_argument("subjects", nargs="+", metavar="RUN", help=f"{what}; and settings as key=value")
    parser.add_argument(
        "--limit", type=count, metavar="N", help="score only N items of each task: short for evaluate.limit=N"
    )
    parser.add_argument(
        "--scale",
        type=_shares,
        default=(1.0,),
        metavar="A,..",
        help="score runs with shares of their updates, from 0 (the base) to 1 (default), on one load: 0,0.25,0.5,1",
    )
    launch_arguments(parser)
    json_argument(parser)


def _shares(text: str) -> tuple[float, ...]:
    """Return the shares that an option's text lists, without duplicates; for argparse's ``type``."""
    try:
        shares = tuple(dict.fromkeys(float(word) for word in text.split(",")))
    except ValueError:
        shares = ()
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no list of shares from 0 to 1, such as 0,0.25,0.5,0.75,1")
    return shares


def _run(options: argparse.Namespace) -> int:
    sign_of_life(" ".join(options.subjects[:3]))
    if launcher.under_launcher():
        launcher.init_rank_env()
    from subspace import config as config_module

    given = [*options.subjects, *([f"evaluate.limit={options.limit}"] if options.limit else [])]
    settings = [word for word in given if re.match(r"[a-z_.]+=", word)]
    subjects = [config_module.read_subject(word, settings) for word in given if word not in settings]
    if not subjects:
        raise UserError("subspace evaluate was given settings, but nothing to score: a run's folder or a model")
    scaled = [subject.at_scale(scale) for subject in subjects for scale in options.scale]
    subjects = [subject for number, subject in enumerate(scaled) if subject not in scaled[:number]]
    scales = [] if options.scale == (1.0,) else ["--scale", ",".join(f"{scale:g}" for scale in options.scale)]
    status = launch_or_none(options, ["evaluate", *given, *scales])
    if status is not None:
        return status
    launcher.init_rank_env()
    manage_malloc()

    from subspace.common.progress import show_progress
    from subspace.distributed.collectives import is_main, shutdown
    from subspace.distributed.engine import init_distributed
    from subspace.evaluation.subjects import evaluate_subjects

    init_distributed()
    evaluate_subjects(subjects, show_progress, _say_what_shows if is_main() else None)
    if is_main():
        _show_scores(subjects, options)
    shutdown()
    launcher.write_success_marker()
    return 0


def _say_what_shows(jobs: Sequence[Job]) -> None:
    """Print, before scoring starts, how large a difference between two runs these items can resolve."""
    from subspace.reporting.statistics import power_statement

    samples = {job.sample.task.name: job.sample for job in jobs}
    titles = [sample.task.title for sample in samples.values()]
    items = {
        sample.task.title if titles.count(sample.task.title) == 1 else name: len(sample.items)
        for name, sample in samples.items()
    }
    say(power_statement(items), file=sys.stderr)


def _show_scores(subjects: Sequence[EvaluationSubject], options: argparse.Namespace) -> None:
    """Print a table for each protocol: side by side what can be compared, else one for each subject."""
    from subspace.common.tables import print_grid
    from subspace.reporting.agreement import agreement
    from subspace.reporting.table_formats import write
    from subspace.reporting.tables import build_tables

    found: list[Table] = []
    for protocol in dict.fromkeys(name for s in subjects for name in s.evaluate.protocols):
        folders = [s.folder for s in subjects if protocol in s.evaluate.protocols]
        try:
            found += build_tables(folders, protocol)
        except UserError:
            found += [table for folder in folders for table in build_tables([folder], protocol)]
    if options.json:
        say(write(found, "json"))
    else:
        for table in found:
            print_grid(table.grid)
    for folder in dict.fromkeys(s.folder for s in subjects if "answer-word" in s.evaluate.protocols):
        by_task = ", ".join(f"{task} {100 * share.value:.1f} %" for task, share in agreement(folder).items())
        if by_task and not options.json:
            say(f"{folder}: answer-word gives llm-adapters' answer on {by_task}")


COMMAND = Command(
    "evaluate",
    "score a base model or adapters on the suites",
    """examples:
  subspace evaluate runs/quickstart --processes 2
  subspace evaluate smollm2-135m evaluate.tasks=boolq,piqa --limit 100
  subspace evaluate runs/quickstart evaluate.protocol=llm-adapters,answer-word
  subspace evaluate smollm2-135m runs/lora runs/dora       one load of their base for all three
  subspace evaluate launch/recipes/quickstart.yaml         the base model, scored as that run will be
  subspace evaluate runs/quickstart --scale 0,0.25,0.5,0.75,1 evaluate.retention=wikipedia
                                                           on the way from the base to the run: what it has learnt
                                                           against what it has kept""",
    _arguments,
    _run,
    settings_manual,
)
