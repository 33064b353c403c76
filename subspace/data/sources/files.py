"""Records of a data file, each with its place: JSON, JSON lines, CSV, TSV, Parquet and Arrow, compressed or not.

JSON and CSV are parsed by the standard library and not by ``datasets``: a record keeps exactly the keys and values
that it has. One table of all records gives each the keys of all (a tool's arguments too), takes dates, numbers and
"NA" for something else than text, and knows no lines. Parquet and Arrow are tables already.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from subspace.common.download import refuse_lfs_pointer
from subspace.common.foreign.text import open_regular
from subspace.data.rows import BadRow
from subspace.data.sources.json_records import Records, json_records
from subspace.data.sources.tables import arrow_records, csv_records, parquet_records, tsv_records
from subspace.errors import UserError

_READERS: dict[str, Callable[[IO[bytes], str], Records]] = {
    ".json": json_records,
    ".jsonl": partial(json_records, lines=True),
    ".ndjson": partial(json_records, lines=True),
    ".csv": csv_records,
    ".tsv": tsv_records,
    ".parquet": parquet_records,
    ".arrow": arrow_records,
    ".feather": arrow_records,
}
KINDS = tuple(_READERS)
TABLES = (".parquet", ".arrow", ".feather")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
WHAT_IS_READ = (
    f"Files of these kinds are read, in upper or lower case: {', '.join(KINDS)}; also packed as {', '.join(PACKED)}; "
    "folders of them; data sets that were saved to disk; and data sets of the hub, as org/name"
)


class FileKind(NamedTuple):
    """Kind of a file: one of ``KINDS``, or nothing for an archive; and its compression by ``PACKED``, or nothing."""

    kind: str
    packed: str


def file_kind(name: str) -> FileKind | None:
    """Return the kind of a file by its name, whatever its case; None if it is not read."""
    name = name.casefold()
    packed = PurePosixPath(name).suffix
    packed = packed if packed in PACKED else ""
    kind = PurePosixPath(name.removesuffix(packed)).suffix
    if packed == ".zip":
        return FileKind("", packed)
    return FileKind(kind, packed) if kind in KINDS else None


def file_records(path: Path, shown: str = "", *, nulls: bool = False) -> Iterator[tuple[str, dict[str, Any]] | BadRow]:
    """Yield the records of a file in their order, each with its place, as ``rows.jsonl, line 3``.

    A line that holds no record is a ``BadRow``.

    Args:
        path: the file.
        shown: its name, by which its kind is known and which places and errors name; by default its path.
        nulls: of a table, keep the keys that are null in a record; otherwise they are absent, as in JSON.

    Raises:
        UserError: its kind is not read; it is not there; or it is damaged, so that rows cannot be told apart.
    """
    shown = shown or str(path)
    found = file_kind(shown)
    if found is None:
        raise UserError(f"{shown} is no data file of a kind that is read. {WHAT_IS_READ}")
    with _damage(shown), open_regular(path) as file:
        refuse_lfs_pointer(path)
        if found.packed == ".zip":
            yield from _zipped(file, shown, nulls=nulls)
        else:
            with _unpacked(file, path, found.packed) as stream:
                yield from _placed(stream, shown, found.kind, nulls=nulls)


def _placed(stream: IO[bytes], shown: str, kind: str, *, nulls: bool) -> Iterator[tuple[str, dict[str, Any]] | BadRow]:
    """Yield the records of a stream, with the file's name before each place."""
    strip = kind in TABLES and not nulls
    for record in _READERS[kind](stream, shown):
        if isinstance(record, BadRow):
            yield BadRow(f"{shown}, {record.where}", record.reason, record.detail)
        elif isinstance(record[1], dict):
            yield f"{shown}, {record[0]}", without_nulls(record[1]) if strip else record[1]
        else:
            yield BadRow(f"{shown}, {record[0]}", "a row should be an object", f"not {type(record[1]).__name__}")


@contextmanager
def _damage(shown: str) -> Iterator[None]:
    """Turn what libraries raise over a damaged file into a UserError."""
    import pyarrow

    broken = (
        *(OSError, EOFError, UnicodeDecodeError, NotImplementedError, OverflowError, csv.Error),
        *(zlib.error, lzma.LZMAError, zipfile.BadZipFile, pyarrow.ArrowException),
    )
    try:
        yield
    except broken as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:160] or type(error).__name__
        raise UserError(f"{shown} is damaged, cut, or not of the kind that its name says: {reason}") from None


def _unpacked(file: IO[bytes], path: Path, packed: str) -> IO[bytes]:
    """Return the unpacked bytes of a file."""
    if packed in (".zst", ".lz4"):
        import pyarrow

        names = {".zst": "zstd", ".lz4": "lz4"}
        return io.BufferedReader(pyarrow.input_stream(str(path), compression=names[packed]))
    openers: dict[str, Callable[[IO[bytes]], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return io.BufferedReader(openers[packed](file)) if packed else file


def _zipped(file: IO[bytes], shown: str, *, nulls: bool) -> Iterator[tuple[str, dict[str, Any]] | BadRow]:
    """Yield the records of the data files in an archive."""
    with zipfile.ZipFile(file) as archive:
        kinds = {name: file_kind(name) for name in sorted(archive.namelist())}
        members = {
            name: kind.kind
            for name, kind in kinds.items()
            if kind and not kind.packed and not PurePosixPath(name).name.startswith(".")
        }
        if not members:
            raise UserError(f"{shown} holds no data file. {WHAT_IS_READ}")
        for name, kind in members.items():
            inside = f"{shown}, {name}"
            with archive.open(name) as member:
                stream: Any = io.BufferedReader(member)
                yield from _placed(stream, inside, kind, nulls=nulls)


def without_nulls(value: Any) -> Any:
    """Return a value without its keys that are null: in a table, every record has the keys of all."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value
