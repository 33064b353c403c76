"""The command ``subspace``: how it finds the verb that is asked for, and how a failure is told.

Everything heavy is imported by the verb that needs it, so that ``subspace --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from subspace import __version__
from subspace.cli.command import Command
from subspace.cli.commands import compare, data, evaluate, merge, methods, plan, prepare, table, train
from subspace.common.files import is_disk_full
from subspace.common.progress import show_notices
from subspace.distributed import launcher
from subspace.errors import RunStopped, UserError, nearest

COMMANDS = [
    prepare.VERB,
    data.VERB,
    train.VERB,
    plan.VERB,
    evaluate.VERB,
    table.VERB,
    compare.VERB,
    merge.VERB,
    methods.VERB,
]
USER_ERROR, INTERRUPTED = 2, 130


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors, and that refuses an unknown option with the nearest one."""

    def __init__(self, verb: Command) -> None:
        super().__init__(
            prog=f"subspace {verb.name}",
            description=verb.summary,
            epilog=verb.examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.verb = verb
        verb.arguments(self)

    def format_help(self) -> str:
        return super().format_help() + (f"\n{self.verb.more_help()}\n" if self.verb.more_help else "")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}. `{self.prog} --help` shows examples")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        known = self._option_string_actions
        for option in (argument.partition("=")[0] for argument in arguments if argument.startswith("-")):
            if option not in known:
                names = [name for name in known if name.startswith("--")]
                raise UserError(f"{self.prog} has no option '{option}'. {nearest(option, names)}")
        return self.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 2 for what the user can mend, 1 for a failed run, 130 for Ctrl-C.

    A training that a signal stopped ends with 75, and can be resumed.
    """
    # DeepSpeed's launcher adds --local_rank unless told not to; the environment says the same.
    given = [a for a in (sys.argv[1:] if arguments is None else arguments) if not a.startswith("--local_rank=")]
    show_notices()
    try:
        return _dispatch(given)
    except UserError as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if is_disk_full(error):
            file = getattr(error, "filename", None)
            where = f" for '{file}'" if file else ""
            return _fail(f"no space is left on the disk{where}. Free some and run the command again", USER_ERROR)
        if launcher.is_peer_failure(error):
            return _fail("another process of the run has ended, and this one cannot go on without it", 1, at_once=False)
        if launcher.should_report_error(1):
            raise
        return 1


def _fail(message: str, status: int, *, at_once: bool = True) -> int:
    if launcher.should_report_error(status, at_once=at_once):
        print(f"{'stopped' if status == RunStopped.status else 'error'}: {message}", file=sys.stderr)
    return status


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    verb, options = parse(arguments)
    return verb.run(options)


def parse(arguments: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """Find the verb and its options in the command's arguments; UserError with the nearest where there is none."""
    verbs = {verb.name: verb for verb in COMMANDS}
    if arguments[0] not in verbs:
        raise UserError(f"subspace cannot '{arguments[0]}'. {nearest(arguments[0], verbs)}")
    verb = verbs[arguments[0]]
    return verb, _Parser(verb).parse(arguments[1:])


def _overview() -> str:
    lines = [f"  {verb.name:<9} {verb.summary}" for verb in COMMANDS]
    return "\n".join(
        ["usage: subspace VERB ...", "", *lines, "", "`subspace VERB --help` shows what a verb takes, with examples."]
    )
