"""Records of JSON and of JSON lines, told apart by what a file holds: people give both either suffix."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from subspace.common.foreign.text import limited_lines
from subspace.data.rows import BadRow
from subspace.errors import UserError

Records = Iterator[tuple[str, Any] | BadRow]
"""Places, such as ``line 3``, and records; or what stands there instead."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SPACE = re.compile(r"[ \t\r\n]*")


def encoding_of(stream: IO[bytes]) -> str:
    """Return the encoding that a stream's byte order mark says, UTF-8 without one, and pass over the mark."""
    head = stream.peek(4)[:4]  # type: ignore[attr-defined]
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            stream.read(len(mark))
            return encoding
    return "utf-8"


def text_lines(stream: IO[bytes], errors: str) -> Iterator[str]:
    """Yield the lines of a stream, in UTF-8 or as its byte order mark says, as they end there."""
    encoding = encoding_of(stream)
    if encoding == "utf-8":
        yield from (line.decode(errors=errors) for line in limited_lines(stream))
    else:  # a line's end has no byte of its own
        yield from io.StringIO(stream.read().decode(encoding, errors), newline="\n")


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the number and bytes, in UTF-8, of each line that is not blank."""
    encoding = encoding_of(stream)
    lines: Any = limited_lines(stream)
    if encoding != "utf-8":
        lines = io.BytesIO(stream.read().decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass"))
    for number, line in enumerate(lines, start=1):
        if not line.isspace():
            yield number, line


class _Twice(dict[str, Any]):
    """An object of which one key occurred twice: ``key``."""

    key = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    twice = _Twice(found)
    twice.key = next(name for name in names if names.count(name) > 1)
    return twice


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _repeated(value: Any) -> str | None:
    """Return a key that occurs twice in an object somewhere in the value: only the last of both can be seen."""
    if isinstance(value, _Twice):
        return value.key
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((key for key in map(_repeated, inner) if key is not None), None)


def _checked(place: str, value: Any) -> tuple[str, Any] | BadRow:
    key = _repeated(value)
    return (place, value) if key is None else BadRow(place, "a key occurs twice in an object", f"'{key}'")


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is none, or has a key twice.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if (key := _repeated(value)) is not None:
        raise ValueError(f"'{key}' occurs twice")
    return value


def _line(number: int, line: bytes) -> tuple[str, Any] | BadRow:
    place = f"line {number}"
    try:
        return _checked(place, _DECODER.decode(line.decode()))
    except UnicodeDecodeError as error:
        return BadRow(place, "not UTF-8", f"byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRow(place, "not JSON", f"{error.msg}, column {error.colno}")
    except RecursionError:
        return BadRow(place, "not JSON", "nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        return BadRow(place, "not JSON", str(error)[:80])


def json_records(stream: IO[bytes], shown: str, *, lines: bool = False) -> Records:
    """Yield the records of a list of rows, of one object a line, or of objects one after the other.

    Args:
        stream: the bytes, in UTF-8 or as a byte order mark says.
        shown: the file's name in errors.
        lines: the file's name says that it has one object a line.

    Raises:
        UserError: what is no list of rows and no lines is damaged.
    """
    numbered = _lines(stream)
    head = [line for _, line in zip(range(2), numbered, strict=False)]
    alone = [_line(*line) for line in head]
    if not head:
        return
    is_object = isinstance(alone[0], tuple) and isinstance(alone[0][1], dict)
    one_line = len(head) == 1 and not isinstance(alone[0], BadRow)
    by_lines = is_object or (lines and not one_line and not isinstance(alone[0], BadRow))
    rest = numbered
    if not by_lines:
        head += numbered
        alone, rest = [], iter(head)
        by_lines = lines and not one_line and not _begins_with_value(head)
    if by_lines:
        yield from alone
        yield from (_line(*line) for line in rest)
    else:
        yield from _values(head, shown)


def _begins_with_value(lines: list[tuple[int, bytes]]) -> bool:
    """Return True if the first line begins a value that a later line ends, and is no broken row by itself."""
    try:
        _DECODER.raw_decode(b"".join(line for _, line in lines).decode(errors="replace"))
    except (ValueError, RecursionError):
        return False
    return True


def _values(lines: list[tuple[int, bytes]], shown: str) -> Records:
    """Yield the records of the values in a text of several lines."""
    data = b"".join(line for _, line in lines)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        number = lines[data.count(b"\n", 0, error.start)][0]
        raise UserError(f"{shown}, line {number}: not UTF-8: byte {error.start}") from None
    values = []
    at = row = 0  # characters and lines that are read
    while at < len(text):
        number = lines[min(row, len(lines) - 1)][0]
        try:
            value, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            number = lines[min(error.lineno, len(lines)) - 1][0]
            raise UserError(f"{shown}, line {number}: not JSON: {error.msg}, column {error.colno}") from None
        except (RecursionError, ValueError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:80]
            raise UserError(f"{shown}, line {number}: not JSON: {reason}") from None
        values.append((f"line {number}", value))
        end = _SPACE.match(text, end).end()  # type: ignore[union-attr]
        row += text.count("\n", at, end)
        at = end
    if len(values) == 1:
        yield from _one_value(values[0][1], shown)
    else:
        yield from (_checked(place, value) for place, value in values)


def _one_value(value: Any, shown: str) -> Records:
    """Yield the rows of a list, or of the one list that an object holds, as ``{"data": [...]}``."""
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
        # One conversation, written over several lines, is a row itself.
        if len(value) == 1 and lists and not {"role", "from"} & lists[0][0].keys():
            value = lists[0]
        else:
            yield _checked("row 1", value)
            return
    if not isinstance(value, list):
        raise UserError(f"{shown} should be a list of rows, not {type(value).__name__}")
    yield from (_checked(f"row {number}", record) for number, record in enumerate(value, start=1))
