"""Records of CSV and TSV, and of Arrow's tables: Parquet, Arrow and Feather files, data sets saved to disk."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any

from subspace.data.rows import BadRow
from subspace.data.sources.json_records import Records, text_lines
from subspace.errors import UserError

if TYPE_CHECKING:
    import pyarrow

SIGNS = ",;\t|"


def csv_records(stream: IO[bytes], shown: str, *, delimiter: str = "") -> Records:
    """Yield the records of a CSV file whose first line names the columns; every cell is text, as it stands there.

    Args:
        stream: the bytes, in UTF-8 or as a byte order mark says.
        shown: the file's name in errors.
        delimiter: between cells; by default that of ``SIGNS`` which the first line has most.

    Raises:
        UserError: the columns have one name twice, or a quotation never ends.
    """
    csv.field_size_limit(sys.maxsize)  # a cell may hold a document
    lines = text_lines(stream, "surrogateescape")
    head = next(lines, "")
    if not head.strip():
        return
    reader = csv.reader(_again(head, lines), delimiter=delimiter or max(SIGNS, key=head.count), strict=True)
    names = [name.strip() for name in next(reader)]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{shown}: its first line should name the columns, and '{repeated[0]}' stands there twice")
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{shown}, {place}: not CSV, and where its next row begins is unknown: {error}") from None
        if cells is None:
            return
        if cells:
            yield _csv_row(place, names, cells)


def _csv_row(place: str, names: list[str], cells: list[str]) -> tuple[str, dict[str, Any]] | BadRow:
    if len(cells) != len(names):
        found = f"{len(cells)} where the first line has {len(names)}"
        return BadRow(place, "not as many cells as columns", found)
    for name, cell in zip(names, cells, strict=True):
        if any("\udc80" <= letter <= "\udcff" for letter in cell):
            return BadRow(place, "not UTF-8", f"'{name}'")
    return place, dict(zip(names, cells, strict=True))


def _again(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    yield from lines


def tsv_records(stream: IO[bytes], shown: str) -> Records:
    """Yield the records of a file of tab-separated values, as ``csv_records``."""
    return csv_records(stream, shown, delimiter="\t")


def parquet_records(stream: IO[bytes], shown: str) -> Records:
    """Yield the records of a Parquet file."""
    from pyarrow import parquet

    with parquet.ParquetFile(_seekable(stream)) as file:
        yield from batch_records(file.schema_arrow, file.iter_batches(batch_size=1000))


def arrow_records(stream: IO[bytes], shown: str) -> Records:
    """Yield the records of an Arrow file, which may be a file or a stream by Arrow's words."""
    import pyarrow

    source = _seekable(stream)
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    if is_file:
        with pyarrow.ipc.open_file(source) as file:
            yield from batch_records(file.schema, (file.get_batch(i) for i in range(file.num_record_batches)))
    else:
        with pyarrow.ipc.open_stream(source) as batches:
            yield from batch_records(batches.schema, batches)


def _seekable(stream: IO[bytes]) -> IO[bytes]:
    """Return the stream of a file as it lies on the disk; what is unpacked while it is read, whole in memory."""
    return stream if isinstance(getattr(stream, "raw", None), io.FileIO) else io.BytesIO(stream.read())


def batch_records(schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch]) -> Records:
    """Yield the records of a table's batches, by their rows from 1."""
    import datasets

    features = datasets.Features.from_arrow_schema(schema)
    decode: Callable[[Any], Mapping[str, Any]] = dict
    if "Json(" in repr(features):  # values that no one type of a column fits: ``datasets`` stores them as JSON
        decode = features.decode_example
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield f"row {number}", dict(decode(record))
