"""Entry point of the command line: parse arguments, run a command, report failures.

Heavy libraries are imported only by the commands that need them, so that ``subspace --help`` is fast.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from subspace import __version__
from subspace.cli.command import Command
from subspace.cli.commands import (
    compare,
    data,
    doctor,
    evaluate,
    export,
    import_adapter,
    inspect,
    merge,
    methods,
    plan,
    prepare,
    recipes,
    study,
    table,
    train,
)
from subspace.common.progress import show_notices, signs
from subspace.common.synonyms import setting_elsewhere
from subspace.distributed import launcher, peers
from subspace.errors import RunStopped, UserError, file_trouble, nearest, printable, tell

COMMANDS = [
    prepare.COMMAND,
    recipes.COMMAND,
    data.COMMAND,
    train.COMMAND,
    plan.COMMAND,
    doctor.COMMAND,
    evaluate.COMMAND,
    table.COMMAND,
    compare.COMMAND,
    study.COMMAND,
    merge.COMMAND,
    export.COMMAND,
    import_adapter.COMMAND,
    inspect.COMMAND,
    methods.COMMAND,
]
USER_ERROR, INTERRUPTED = 2, 130
MOST_MESSAGE = 4000  # characters


class _Parser(argparse.ArgumentParser):
    """Argument parser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}. `{self.prog} --help` shows examples")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 2 for a user error, 1 for a failed run, 130 for Ctrl-C.

    A training run that a signal stopped ends with 75 and can be resumed.
    """
    # DeepSpeed's launcher adds --local_rank by default; LOCAL_RANK in the environment has the same value.
    given = [a for a in (sys.argv[1:] if arguments is None else arguments) if not a.startswith("--local_rank=")]
    show_notices()
    try:
        return _dispatch(given)
    except UserError as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if trouble := file_trouble(error):
            return _fail(str(trouble), USER_ERROR)
        if launcher.is_peer_failure(error):
            return _fail("another process of the run has ended, and this one cannot continue alone", 1, at_once=False)
        if launcher.should_report_error(1):
            raise
        return peers.reported_status() or 1
    finally:
        signs.stop()


def _fail(message: str, status: int, *, at_once: bool = True) -> int:
    if launcher.should_report_error(status, at_once=at_once):
        told = printable(message)
        if len(told) > MOST_MESSAGE:
            told = f"{told[: MOST_MESSAGE // 2]} ... {told[-MOST_MESSAGE // 2 :]}"
        tell(f"{'stopped' if status == RunStopped.status else 'error'}: {told}")
        return status
    # Of a run that was stopped, a process may notice only that another one is gone.
    return peers.reported_status() or status


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    command, options = parse(arguments)
    return command.run(options)


def parse(arguments: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """Return the command and its parsed options; raise UserError with the nearest name for an unknown one."""
    commands = {command.name: command for command in COMMANDS}
    name, *rest = arguments
    if name not in commands:
        raise UserError(f"unknown command '{name}'. {nearest(name, commands)}")
    command = commands[name]
    with_manual = command.more_help if {"-h", "--help"} & set(rest) else None
    parser = _Parser(
        prog=f"subspace {name}",
        description=command.summary,
        epilog=f"{command.examples}\n\n{with_manual()}" if with_manual else command.examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.arguments(parser)
    lines = re.findall(r"^  (-.*?)(?:\s{2,}|$)", parser.format_help(), re.MULTILINE)
    known = [name.split()[0] for line in lines for name in line.split(", ")]
    for option in (argument.partition("=")[0] for argument in rest if argument.startswith("-")):
        if option not in known:
            called = setting_elsewhere(option)
            hint = f"Here it is {called}" if called else nearest(option, known)
            raise UserError(f"{parser.prog} has no option '{option}'. {hint}")
    return command, parser.parse_intermixed_args(rest)


def _overview() -> str:
    lines = [f"  {command.name:<9} {command.summary}" for command in COMMANDS]
    end = "`subspace COMMAND --help` shows a command's options, with examples."
    return "\n".join(["usage: subspace COMMAND ...", "", *lines, "", end])
