"""User-facing errors, shown in one message without a traceback, and "did you mean" hints."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can correct; the request cannot be carried out as given.

    The message restates the request, says what is wrong and names the nearest thing that works. The command line
    prints it without a traceback and exits with ``status``; in Python it is an ordinary exception.
    """

    status = 2


class RunFailed(UserError):
    """A valid run that cannot continue: a loss that is not finite, or a trained tensor that never changes."""

    status = 1


class RunStopped(UserError):
    """A run that a signal stopped early, after saving a checkpoint from which it can be resumed.

    The status is EX_TEMPFAIL of sysexits.h: repeat the command with ``--resume``.
    """

    status = 75


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint with the closest known word and the list of all: ``Did you mean 'dora'? There are: ...``."""
    names = sorted(known)
    by_fold = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(word.casefold(), by_fold, n=1, cutoff=0.6)
    hint = f"Did you mean '{by_fold[close[0]]}'? " if close else ""
    return f"{hint}There are: {', '.join(names)}"
