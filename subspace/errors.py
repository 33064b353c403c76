"""The errors that are told in one message without a traceback, and the words that help to mend them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A request that cannot be met as it stands.

    The message restates the request, says what is wrong and names the nearest thing that works. The command line
    prints it without a traceback and ends with its status; from Python it is an ordinary exception.
    """

    status = 2


class RunFailed(UserError):
    """A run that was sound as a request, and could not go on: a loss not finite, a tensor that does not move."""

    status = 1


class RunStopped(UserError):
    """A run that ended before its time because it was asked to, with a checkpoint from which it can go on.

    The status is EX_TEMPFAIL of sysexits.h: the same command, with ``--resume``, is worth another try.
    """

    status = 75


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known word was probably meant, and which there are: ``Did you mean 'dora'? There are: ...``."""
    names = sorted(known)
    by_fold = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(word.casefold(), by_fold, n=1, cutoff=0.6)
    hint = f"Did you mean '{by_fold[close[0]]}'? " if close else ""
    return f"{hint}There are: {', '.join(names)}"
