"""User-facing errors, shown in one message without a traceback, "did you mean" hints, and what file systems refuse."""

from __future__ import annotations

import difflib
import errno
import os
import re
import reprlib
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TextIO

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


def tell(line: str, file: TextIO | None = None) -> None:
    """Write a line at once, on standard error unless another file is given.

    ``print`` writes the end of a line by itself where nothing is buffered, so that lines of two processes mix.
    """
    file = sys.stderr if file is None else file
    file.write(f"{line}\n")
    file.flush()


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


class FileTrouble(NamedTuple):
    """What a file system refused: the error's number, the reason and what helps in words, and the file, where known."""

    number: int
    reason: str
    cure: str
    file: str = ""

    def __str__(self) -> str:
        where = f"'{self.file}': " if self.file else ""
        return f"{where}{self.reason}. {self.cure}"


#: What errors of file systems mean, and what helps.
_TROUBLE = {
    errno.ENOSPC: ("no space is left on the disk", "Free some, or write to another disk"),
    errno.EDQUOT: ("your quota on that disk is used up", "Free some space, or write to another disk"),
    errno.EFBIG: ("the system allows no file of that size", "See 'ulimit -f', or write to another disk"),
    errno.EROFS: ("the disk may only be read", "Write to a folder of another disk"),
    errno.EACCES: ("permission is denied", "Give a folder of your own, or have its owner permit it"),
    errno.EPERM: ("permission is denied", "Give a folder of your own, or have its owner permit it"),
    errno.ENAMETOOLONG: ("the name is too long for the file system", "Give a shorter one"),
    errno.EMFILE: ("this process has as many files open as it may have", "Raise the limit: 'ulimit -n 4096'"),
    errno.ENFILE: ("as many files are open on this machine as there may be", "End other programs"),
    errno.EIO: ("input or output failed", "Is the disk sound?"),
    errno.ESTALE: ("the network file system has lost it", "Run the command again"),
    errno.ELOOP: ("it is a symbolic link, which is not followed there", "Remove the link"),
    errno.ENOENT: ("no such file or folder", "Give another one"),
    errno.EEXIST: ("it is there already", "Remove it, or give another one"),
    errno.ENOTDIR: ("a part of the path is no folder", "Give another one"),
    errno.EISDIR: ("it is a folder, where a file is needed", "Give another one"),
    errno.ENOTEMPTY: ("the folder is not empty", "Give another one"),
    errno.ENOLCK: ("the file system gives no locks", "Use a folder on another disk"),
}


def file_trouble(error: BaseException) -> FileTrouble | None:
    """Return what a file system refused, if that is what an error says; None for any other error.

    Libraries written in Rust wrap the system's error in one of their own, of which only the text and the number in it
    are left; pip's message has the text alone.
    """
    number, file = getattr(error, "errno", None), getattr(error, "filename", None)
    if isinstance(error, ConnectionError | TimeoutError):
        return None  # of a network
    if number is None or not isinstance(error, OSError):
        file = None
        found = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))
        number = int(found[1] or found[2]) if found else None
        if number is None and os.strerror(errno.ENOSPC) in str(error):
            number = errno.ENOSPC
    if number not in _TROUBLE:
        if isinstance(error, OSError) and isinstance(file, str | bytes | os.PathLike) and error.strerror:
            return FileTrouble(number or 0, str(error.strerror), "Give another file", os.fsdecode(file))
        return None
    reason, cure = _TROUBLE[number]
    if isinstance(error, OSError) and error.strerror not in (None, os.strerror(number)):
        reason = error.strerror
    where = os.fsdecode(file) if isinstance(file, str | bytes | os.PathLike) else ""
    if number == errno.ENOSPC and where and _no_inodes(where):
        reason, cure = "the disk takes no further file: its inodes are used up", "Remove files, or use another disk"
    return FileTrouble(number, reason, cure, where)


def _no_inodes(file: str) -> bool:
    path = Path(file)
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        space = os.statvfs(path)
    except OSError:
        return False
    return bool(space.f_files) and space.f_favail == 0
