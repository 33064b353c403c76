"""``subspace study``: compare methods by an equal search, fresh seeds and one scoring."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace.cli.command import Command, chosen_format, count, deliver, format_arguments, say
from subspace.errors import RunStopped, UserError, nearest

if TYPE_CHECKING:
    from subspace.study.config import Study
    from subspace.study.grid import Grid

CLAIMS = "claims"
#: Runs of a study that share a pass at most: beyond it little is gained, and memory grows.
TOGETHER = 8


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", metavar="ACTION", help=f"{', '.join((*ACTIONS, CLAIMS))}: the cost; all due; the table; CLAIMS.md"
    )
    parser.add_argument("study", metavar="FILE", help="YAML file of the study, as launch/studies/quick.yaml")
    plan = parser.add_argument_group("plan")
    plan.add_argument("--power", type=float, default=0.8, metavar="P", help="of finding a difference; default: 0.8")
    plan.add_argument(
        "--difference", type=float, metavar="POINTS", help="solve for the seeds that find this difference in accuracy"
    )
    run = parser.add_argument_group("run")
    run.add_argument("--only", metavar="METHODS", help="train these methods only, as lora,ssb; the others stay due")
    run.add_argument("--minutes", type=float, metavar="N", help="begin no run after so many minutes")
    run.add_argument("--processes", type=count, metavar="N", help="processes of each run; see `subspace train`")
    run.add_argument(
        "--together",
        type=count,
        metavar="N",
        default=TOGETHER,
        help=f"train so many runs in one pass at most, default {TOGETHER}; 1: one after another",
    )
    run.add_argument(
        "--parallel",
        type=count,
        metavar="N",
        default=1,
        help="run so many commands at a time, each on GPUs of its own, or its share of the cores; default: 1",
    )
    run.add_argument("--resume", action="store_true", help="go on, as it does in any case")
    run.add_argument("--dry-run", action="store_true", help="print the commands that are due instead of running them")
    format_arguments(parser, "of the report: ")


def _run(options: argparse.Namespace) -> int:
    if options.action not in (*ACTIONS, CLAIMS):
        raise UserError(f"subspace study {options.action} is unknown. {nearest(options.action, (*ACTIONS, CLAIMS))}")
    chosen_format(options)  # refuses before anything runs
    if options.action == CLAIMS:
        return _claims(options)
    from subspace.study.config import read_study

    return ACTIONS[options.action](read_study(options.study), options)


def _plan(study: Study, options: argparse.Namespace) -> int:
    from subspace.common.progress import show_progress
    from subspace.common.tables import print_grid
    from subspace.study.preview import preview
    from subspace.study.record import open_grid

    if (form := chosen_format(options)) not in ("terminal", "json"):
        raise UserError(f"study plan was asked for {form}, but it is printed for a terminal or as json. Give --json")
    found = preview(open_grid(study, show_progress), power=options.power, difference=options.difference)
    if form == "json":
        deliver(json.dumps(found.as_dict(), indent=2), options)
        return 0
    print_grid(found.table)
    print("\n".join(found.lines()))
    return 0


def _execute(study: Study, options: argparse.Namespace) -> int:
    from subspace.common.locks import in_use
    from subspace.common.progress import show_progress
    from subspace.study.execute import Executor, next_cells
    from subspace.study.processes import Commands
    from subspace.study.record import open_grid

    only = [name.strip() for name in (options.only or "").split(",") if name.strip()]
    commands = Commands(options.parallel, options.processes)
    grid = open_grid(study, show_progress, write=not options.dry_run)
    together = _fitting(grid, options)
    executor = Executor(grid, commands, only, options.minutes, together, options.parallel, commands.stop)
    if options.dry_run:
        from subspace.study.cells import read_search

        for cell, until in next_cells(grid, read_search(grid)[0], only):
            print(shlex.join([sys.executable, "-m", "subspace", *cell.train_arguments(until), *commands.more]))
        return 0
    with in_use(grid.folder), _stopping():
        done = executor.execute()
    return _report(study, options) if done else 0


def _fitting(grid: Grid, options: argparse.Namespace) -> int:
    """Return how many runs are to share a pass: as many as asked for, if they fit into memory."""
    from subspace.config import read_config
    from subspace.distributed.device import on_gpu
    from subspace.planning.plan import room_for_runs

    if options.together == 1 or options.dry_run:
        return 1
    example = read_config(grid.base, [*grid.overrides, *grid.contender(grid.reference).overrides()])
    sharing = 1 if on_gpu() else options.parallel  # each GPU has memory of its own
    return max(1, min(int(options.together), room_for_runs(example) // sharing))


def _report(study: Study, options: argparse.Namespace) -> int:
    from subspace.common.tables import print_grid
    from subspace.study.files import FILES, write_report
    from subspace.study.record import open_grid
    from subspace.study.report import as_dict, report_grid
    from subspace.study.results import read_results

    result, form = read_results(open_grid(study)), chosen_format(options)
    files = write_report(result)
    if form == "terminal":
        print_grid(report_grid(result))
    elif form == "json":
        deliver(json.dumps(as_dict(result), indent=2), options)
    else:
        deliver((result.grid.folder / FILES[form]).read_text(encoding="utf-8"), options)
    say(f"written: {', '.join(str(file) for file in files)}", file=sys.stderr)
    return 0


def _claims(options: argparse.Namespace) -> int:
    from subspace.common.tables import csv_text, print_grid
    from subspace.study.claims import write_claims

    form = chosen_format(options)
    if form == "html":
        raise UserError("subspace study claims writes no HTML. Give --format markdown, latex, csv or json")
    file, table = write_claims(Path(options.study))
    rows = [dict(zip(table.head, row, strict=True)) for row in table.rows]
    if form == "terminal":
        print_grid(table)
    else:
        written: dict[str, Callable[[], str]] = {
            "markdown": table.markdown,
            "latex": table.latex,
            "csv": lambda: csv_text(rows),
            "json": lambda: json.dumps(rows, indent=2, ensure_ascii=False),
        }
        deliver(written[form](), options)
    say(f"written: {file}", file=sys.stderr)
    return 0


@contextmanager
def _stopping() -> Iterator[None]:
    """End at SIGTERM and SIGUSR1 with the status of a run that was stopped; the training in progress is told so."""

    def stop(number: int, frame: Any) -> None:
        raise RunStopped("by a signal. The same command goes on")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


ACTIONS: dict[str, Callable[[Study, argparse.Namespace], int]] = {"plan": _plan, "run": _execute, "report": _report}

COMMAND = Command(
    "study",
    "compare methods fairly: equal budgets, an equal search, fresh seeds, one table",
    """examples:
  subspace study plan launch/studies/quick.yaml            the grid, its cost, and what it can show
  subspace study plan launch/studies/methods.yaml --power 0.8 --difference 0.5
  subspace study run launch/studies/quick.yaml             killed at any moment, the same command goes on
  subspace study run launch/studies/methods.yaml --only lora,ssb --minutes 120
  subspace study run launch/studies/methods.yaml --parallel 8     eight trainings at a time, each on a GPU of its own
  subspace study report launch/studies/quick.yaml          the table, and a page with charts: report.html
  subspace study report launch/studies/quick.yaml --output table.tex
  subspace study claims launch/studies/claims.yaml         what the studies run here say of published claims""",
    _arguments,
    _run,
)
