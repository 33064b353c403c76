"""User-facing errors, shown in one message without a traceback, and "did you mean" hints."""

from __future__ import annotations

import difflib
import reprlib
import unicodedata
from collections.abc import Iterable

#: Characters of a value in a message.
MOST_SHOWN = 100
#: Characters that turn the direction of writing.
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
#: Names that a hint lists; of more, the nearest.
MOST_NAMES, NEAREST = 12, 5


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


def nearest(word: str, known: Iterable[str], command: str = "") -> str:
    """Return a hint with the closest known word and the others: ``Did you mean 'dora'? There are: ...``.

    Args:
        word: what was given.
        known: what there is. Of more than a dozen, the nearest few are named, and how many there are.
        command: what lists them all, such as ``subspace methods``.
    """
    names = sorted(known)
    if not names:
        return "There is none"
    by_fold = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(word.casefold(), by_fold, n=NEAREST, cutoff=0.6)
    hint = f"Did you mean '{by_fold[close[0]]}'? " if close else ""
    if len(names) <= MOST_NAMES:
        return f"{hint}There are: {', '.join(names)}"
    more = difflib.get_close_matches(word.casefold(), by_fold, n=NEAREST, cutoff=0.0) if word else []
    near = ", ".join(by_fold[name] for name in more) or ", ".join(names[:NEAREST])
    return f"{hint}There are {len(names)}, {'the nearest ' if more else ''}{near}" + (
        f"; `{command}` lists all" if command else ", ..."
    )


def printable(text: str) -> str:
    r"""Return a text in which characters that command a terminal, or turn the direction of writing, are written out.

    Line breaks and tabs stay. ``\x1b[2J`` becomes those six characters.
    """
    if text.isprintable():
        return text
    if "\r\n" in text:
        return "\r\n".join(map(printable, text.split("\r\n")))
    return "".join(
        character
        if character in "\n\t"
        or not (character in _TURNING or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"))
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


class _Short(reprlib.Repr):
    def repr_str(self, text: str, level: int) -> str:
        return repr(text if len(text) <= self.maxstring else f"{text[: self.maxstring - 3]}...")

    def repr_int(self, number: int, level: int) -> str:
        # Python refuses to write numbers of more digits than this out.
        return (
            repr(number) if abs(number) < 10**40 else f"a number of {number.bit_length() * 30103 // 100000 + 1} digits"
        )


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = MOST_SHOWN
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 6


def shown(value: object) -> str:
    """Return a value as Python writes it, cut to what a message has room for."""
    return _SHORT.repr(value)
