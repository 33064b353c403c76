"""The description of a command, and the options and outputs that several commands share."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from subspace.common.progress import signs
from subspace.common.tables import FORMATS
from subspace.distributed import launcher
from subspace.distributed.peers import STATUS_FILE
from subspace.errors import UserError, nearest, printable, shown, tell

logger = logging.getLogger("subspace")

#: The forms of an outcome by the endings of files.
ENDINGS = {".html": "html", ".md": "markdown", ".tex": "latex", ".csv": "csv", ".json": "json"}


@dataclass(frozen=True)
class Command:
    """A command of ``subspace``: its name, help texts, options and the function that runs it."""

    name: str
    summary: str
    examples: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    more_help: Callable[[], str] | None = None  # computed only for --help


def say(text: object, file: TextIO | None = None) -> None:
    """Print what may hold texts of files and models: without what would command the terminal."""
    tell(printable(str(text)), file or sys.stdout)


def sign_of_life(what: str) -> None:
    """Tell at once, before libraries load for seconds, what a command begins with, and go on telling what it is at.

    The first of its processes does so, for all.
    """
    if "torch" in sys.modules:  # a program calls it that has loaded them
        return
    launched = launcher.under_launcher()
    if launched and os.environ["RANK"] != "0":
        return
    doing = f"{what}: reading the settings and loading libraries"
    if not (launched and STATUS_FILE in os.environ):  # else the process that started it has said so
        logger.info(f"{doing} ...")
    signs.start(doing)


def json_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--json``."""
    parser.add_argument(
        "--json", action="store_true", help="print the outcome as JSON; progress goes to standard error"
    )


def count(text: str) -> int:
    """Return the positive integer that an option's text stands for; for argparse's ``type``."""
    if not (text.isdecimal() and len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number above 0 and below a billion")
    return int(text)


def launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that can run in several processes; :func:`launch_or_none` starts them."""
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--processes", type=count, metavar="N", help="number of processes; default: one per GPU, or one without a GPU"
    )
    group.add_argument("--hostfile", metavar="FILE", help="run on these hosts, reached by ssh: lines 'HOST slots=N'")
    group.add_argument("--dry-run", action="store_true", help="print the exact command instead of running it")


def launch_or_none(options: argparse.Namespace, arguments: Sequence[str]) -> int | None:
    """Start the processes that the options ask for and return their status; None if this process runs the command."""
    if launcher.under_launcher():
        launcher.check_launch()
        started = int(os.environ["WORLD_SIZE"])
        if options.processes not in (None, started):
            raise UserError(
                f"--processes {options.processes} was given to one of {started} processes that a launcher started"
            )
        if started > 1:
            launcher.check_meeting()
        return None
    if options.json:
        arguments = [*arguments, "--json"]
    launch = launcher.build_launch(arguments, options.processes, options.hostfile)
    if options.dry_run:
        say(launch if launch else shlex.join([sys.executable, "-m", "subspace", *arguments]))
        return 0
    if launch:
        logger.info(f"starting {launch.what} ...")
        signs.stop()  # the first of them goes on
    return launch.run() if launch else None


def scored_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a command that reads evaluated runs."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that `subspace evaluate` wrote results to")
    parser.add_argument("--protocol", metavar="NAME", help="scoring protocol to read; default: all that every run has")


def format_arguments(parser: argparse.ArgumentParser, what: str = "") -> None:
    """Add the options of a command whose outcome is written in several forms; :func:`chosen_format` reads them."""
    parser.add_argument("--format", metavar="FORMAT", help=f"{what}{', '.join(FORMATS)}; default: terminal")
    parser.add_argument("--markdown", action="store_true", help="short for --format markdown")
    parser.add_argument("--output", "-o", metavar="FILE", help="write to a file, in the form that its ending names")
    json_argument(parser)


def chosen_format(options: argparse.Namespace) -> str:
    """Return the form that is asked for by ``--format``, a short form of it, or the ending of the file.

    Raises:
        UserError: a form that there is none of, two at once, or a file whose ending names none.
    """
    asked = {f"--format {options.format}": options.format} if options.format else {}
    asked |= {f"--{name}": name for name in ("markdown", "json") if getattr(options, name)}
    for name, form in asked.items():
        if form not in FORMATS:
            raise UserError(f"{name} was given, but there is no such form. {nearest(form, FORMATS)}")
    if len(set(asked.values())) > 1:
        raise UserError(f"{' and '.join(asked)} were given. Give one of them")
    if "terminal" in asked.values() and options.output is not None:
        raise UserError(f"--output {options.output} was given, but a terminal's tables are only printed. Give --format")
    if asked:
        return str(next(iter(asked.values())))
    if options.output is None:
        return "terminal"
    ending = Path(options.output).suffix.lower()
    if ending not in ENDINGS:
        raise UserError(
            f"--output {options.output} was given, whose ending names no form: they are {', '.join(ENDINGS)}. Give "
            "--format as well"
        )
    return ENDINGS[ending]


def deliver(text: str, options: argparse.Namespace) -> None:
    """Print an outcome, or write it to the file that ``--output`` names."""
    if options.output is None:
        say(text.rstrip("\n"))
        return
    from subspace.common.files import write_file

    write_file(Path(options.output), text.rstrip("\n") + "\n")
    say(f"written: {options.output}", file=sys.stderr)


def settings_manual() -> str:
    """Return the help text of all settings: defaults and descriptions, and each method's own settings with defaults."""
    from subspace.adapters.registry import list_methods, resolve_method
    from subspace.common.foreign.yaml_files import format_value
    from subspace.common.settings import declared_settings
    from subspace.config import DEFAULT_METHOD, METHOD, all_settings

    lines = ["settings, in the configuration or as key=value:"]
    method = resolve_method(DEFAULT_METHOD)[0]
    for name, info in all_settings({METHOD: method}).items():
        if name.removeprefix(f"{METHOD}.") not in declared_settings(method.Config):
            values = " | ".join(info.choices) or info.type_hint
            lines += [f"  {name}={format_value(info.default)}", f"      {info.doc} ({values})"]
    lines += [
        "",
        "`method:` may be a list of such sections, each with its own targets; their keys are then method.0.r and so on",
        "",
        "each method's own settings, below `method.`; `subspace methods NAME` describes them:",
    ]
    for method in list_methods().values():
        own = [f"{name}={format_value(info.default)}" for name, info in declared_settings(method.Config).items()]
        lines.append(f"  {method.name:<12} {' '.join(own) or '(none)'}")
    return "\n".join(lines)
