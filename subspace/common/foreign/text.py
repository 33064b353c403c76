"""The one reader of files that somebody else may have written or changed: text, JSON and lines of JSON.

A reader names the file, and what in it is wrong, in one :class:`~subspace.errors.UserError`. Nothing is read that is no
regular file (a pipe would wait for ever, a device never end), that is larger than any honest file of its kind, nested
deeper than one, or has numbers that no setting has. What stands in a file is checked against a type before it is used.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from subspace.errors import MOST_SHOWN, UserError, printable, shown

if TYPE_CHECKING:
    import pydantic  # imported where it is needed: programs that start fast read files too

_Kind = TypeVar("_Kind")

#: Bytes of a description, such as a run's settings or an adapter's; of results; and of one line of data, which may be
#: a whole file of rows.
MOST_BYTES, MOST_RESULT_BYTES, MOST_LINE = 16 << 20, 1 << 30, 1 << 30
#: Nesting of an honest file.
MOST_DEPTH = 64
#: Whole numbers lie below this; so does what they are counted with elsewhere.
MOST_NUMBER = 1 << 63

#: Signs in a text that something in it may be beyond a bound; only then each value is looked at.
_SUSPECT = re.compile(r"\d{19}|[eE]\+?0*\d{3}|\\[uU][dD]|NaN|Infinity")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading; raise OSError for one that is not there, UserError for a pipe, a device or a folder."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = os.fstat(handle).st_mode
    if not stat.S_ISREG(kind):
        os.close(handle)
        raise UserError(f"{path} is {'a folder' if stat.S_ISDIR(kind) else 'no regular file'}")
    return os.fdopen(handle, "rb")


def read_bytes(path: Path, *, most: int = MOST_BYTES) -> bytes:
    """Return a file's bytes.

    Raises:
        OSError: it cannot be opened or read.
        UserError: it is no regular file, or has more than ``most`` bytes.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path} has more than {most:,} bytes, which no file of its kind has")
    return content


def read_text(path: Path, *, most: int = MOST_BYTES) -> str:
    """Return a file's text, of at most ``most`` bytes, without a byte order mark; raise UserError if it has none."""
    try:
        return read_bytes(path, most=most).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8: byte {error.start + 1:,} cannot be one") from None


def read_json(path: Path, kind: type[_Kind] | Any, *, most: int = MOST_BYTES, finite: bool = True) -> _Kind:
    """Return the content of a JSON file of a type, with what else stands there.

    Args:
        path: the file.
        kind: the type, as an annotation; of a :class:`typing.TypedDict`, the keys that are read.
        most: bytes that it may have.
        finite: infinite numbers and NaN are faults.

    Raises:
        UserError: the file cannot be read, is not JSON, or has another type at the key that is named.
    """
    value: _Kind = checked(parse_json(read_text(path, most=most), str(path), finite=finite), kind, str(path))
    return value


def read_json_lines(path: Path, kind: type[_Kind] | Any, *, most: int = MOST_RESULT_BYTES) -> list[_Kind]:
    """Return the values of a file with one JSON value of a type a line; errors as of :func:`read_json`."""
    lines = read_text(path, most=most).removesuffix("\n").split("\n")
    return [checked(parse_json(line, where), kind, where) for line, where in _numbered(lines, path)]


def _numbered(lines: Iterable[str], path: Path) -> Iterator[tuple[str, str]]:
    return ((line, f"{path}, line {number}") for number, line in enumerate(lines, 1))


def parse_json(text: str, where: str, *, finite: bool = True) -> Any:
    """Return the value of a JSON text; ``where`` names it in errors. Of two equal keys, neither counts: an error."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 or "\n" in text else ""
        raise UserError(f"{where}{line} is not JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{where} is nested deeper than {MOST_DEPTH} levels") from None
    except ValueError as error:  # a number of thousands of digits, or a key that is there twice
        raise UserError(f"{where} cannot be understood: {printable(str(error).partition(';')[0])}") from None
    if text.count("[") + text.count("{") > MOST_DEPTH or _SUSPECT.search(text):
        check_bounds(value, where, finite=finite)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} stands there twice")
    return found


def check_bounds(value: Any, where: str, *, finite: bool = True) -> None:
    """Raise UserError for numbers, texts and nesting beyond the bounds, which names the file and the key."""

    def look(value: Any, key: str, depth: int) -> None:
        at = f"{where}: {key if len(key) < MOST_SHOWN else f'{key[:MOST_SHOWN]}...'}" if key else where
        if isinstance(value, dict | list):
            if depth >= MOST_DEPTH:
                raise UserError(f"{at} is nested deeper than {MOST_DEPTH} levels")
            for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
                look(name, key, depth)
                look(inner, f"{key}.{printable(str(name))}" if key else printable(str(name)), depth + 1)
        elif isinstance(value, str):
            _check_string(value, at)
        elif isinstance(value, float) and finite and not math.isfinite(value):
            raise UserError(f"{at} is {value}, which is no number to calculate with")
        elif isinstance(value, int) and not -MOST_NUMBER <= value < MOST_NUMBER:
            raise UserError(f"{at} is {shown(value)}, larger than any number that is meant")
        elif isinstance(value, set | tuple | bytes):
            raise UserError(f"{at} is a {type(value).__name__}, which nothing is here")

    look(value, "", 0)


def _check_string(text: str, at: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{at} holds half of a character, {shown(text)}, which is no text") from None


def refuse_controls(value: Any, where: str, key: str = "") -> None:
    """Raise UserError for a text, in nested values, with control characters other than tabs and line breaks."""
    if isinstance(value, str) and _CONTROL.search(value):
        raise UserError(f"{where}: {key or 'a text'} holds a control character: {shown(value)}")
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            refuse_controls(name, where, "a key")
            refuse_controls(inner, where, f"{key}.{name}" if key else str(name))


def checked(value: Any, kind: type[_Kind] | Any, where: str) -> _Kind:
    """Return a value that is of a type, unchanged; raise UserError that names the key at which it is not."""
    if kind is Any:
        return value  # type: ignore[no-any-return]
    import pydantic

    try:
        _validator(_hashable(kind)).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {describe_fault(error)}") from None
    except RecursionError:
        raise UserError(f"{where} is nested deeper than {MOST_DEPTH} levels") from None
    return value  # type: ignore[no-any-return]


def describe_fault(error: pydantic.ValidationError) -> str:
    """Return the first fault of a value, with its key and what stands there."""
    fault = error.errors(include_url=False)[0]
    key = printable(".".join(map(str, fault["loc"])))
    if fault["type"] == "missing":
        return f"{key} is missing"
    message = fault["msg"].replace("Input should be", "should be").replace("Value error, ", "")
    return f"{key or 'the whole'} is {shown(fault['input'])}, but {message[0].lower()}{message[1:]}"


def _hashable(kind: Any) -> Any:
    return kind  # for mypy, which takes a type variable's type for unhashable


@cache
def _validator(kind: Any) -> pydantic.TypeAdapter[Any]:
    import pydantic

    return pydantic.TypeAdapter(kind)


def limited_lines(file: IO[bytes], most: int = MOST_LINE) -> Iterator[bytes]:
    """Yield the lines of a file; raise OverflowError for one of more than ``most`` bytes, before it is in memory."""
    read: Callable[[int], bytes] = file.readline
    number = 0
    while line := read(most + 1):
        number += 1
        if len(line) > most:
            raise OverflowError(f"line {number:,} has more than {most:,} bytes")
        yield line
