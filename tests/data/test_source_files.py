"""Files of people's own: every kind in every compression gives the same rows, and what is broken is named."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from subspace.data.rows import BadRow, Row
from subspace.data.sources.files import KINDS, PACKED, file_records
from subspace.data.sources.find import find_source
from subspace.data.sources.shapes import Seen
from subspace.errors import UserError

# Texts that a library takes for something else: dates, numbers, missing values, lines, quotes, commas.
TEXTS = [
    "2024-05-01", "2024-05-01T10:00:00Z", "007", "1e5", "NA", "null", "None", "nan", "true", "", " ", "a,b;c\td",
    'say "so"', "two\nlines", "back\\slash", "ünïcødé 漢字 🦊", "\u2028", "\u0000x", "{}", "[1]", "=1+1",
    "'", "\r\n end",
]  # fmt: skip


def make_rows(count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of texts that are easily taken for something else."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        text, more = draw.choice(TEXTS), draw.choice(TEXTS)
        rows.append({"instruction": f"row {number}: {text}", "input": more, "output": f"{draw.choice(TEXTS)}!"})
    return rows


def as_bytes(kind: str, rows: list[dict[str, Any]]) -> bytes:
    """Return the rows as the bytes of a file of this kind."""
    if kind == ".json":
        return json.dumps(rows, indent=1).encode()
    if kind in (".jsonl", ".ndjson"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    sink, table = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(rows)
    if kind == ".parquet":
        parquet.write_table(table, sink, row_group_size=7)
    else:
        new = pyarrow.ipc.new_file if kind == ".feather" else pyarrow.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    return bytes(sink.getvalue())


def packed(suffix: str, data: bytes, name: str) -> bytes:
    """Return the data as this suffix says."""
    if suffix == ".zip":
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, data)
            archive.writestr("readme.txt", "not data")
        return sink.getvalue()
    if suffix in (".zst", ".lz4"):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, {".zst": "zstd", ".lz4": "lz4"}[suffix]) as stream:
            stream.write(data)
        return bytes(sink.getvalue())
    pack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    return pack[suffix](data) if suffix else data


@pytest.mark.parametrize("suffix", ["", *PACKED])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_compression_gives_the_same_records(kind: str, suffix: str, tmp_path: Path) -> None:
    rows = make_rows()
    for name in (f"rows{kind}{suffix}", f"ROWS{kind.upper()}{suffix.upper()}"):
        file = tmp_path / name
        file.write_bytes(packed(suffix, as_bytes(kind, rows), f"rows{kind}"))
        records = list(file_records(file))
        assert [record[1] for record in records if not isinstance(record, BadRow)] == rows
        places = [record.where if isinstance(record, BadRow) else record[0] for record in records]
        assert len(set(places)) == len(rows)
        assert all(place.startswith(str(file)) for place in places)


@pytest.mark.parametrize("suffix", ["", *PACKED])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_file_that_is_cut_is_refused_or_its_last_line_is_bad(
    kind: str, suffix: str, share: float, tmp_path: Path
) -> None:
    rows = make_rows(400)
    data = packed(suffix, as_bytes(kind, rows), f"rows{kind}")
    file = tmp_path / f"rows{kind}{suffix}"
    file.write_bytes(data[: int(len(data) * share)])
    if suffix or kind not in (".jsonl", ".ndjson", ".csv", ".tsv"):
        with pytest.raises(UserError, match=re.escape(str(file))):
            list(file_records(file))
        return
    with contextlib.suppress(UserError):  # a quotation that never ends
        records = list(file_records(file))
        # Lines before the cut are whole, as if the file ended there.
        good = [record[1] for record in records if not isinstance(record, BadRow)]
        assert len(good) < len(rows)
        assert good[:-1] == rows[: len(good) - 1]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".tsv"])
def test_a_byte_order_mark_says_the_encoding(kind: str, encoding: str, tmp_path: Path) -> None:
    rows = make_rows()
    (tmp_path / f"rows{kind}").write_bytes(as_bytes(kind, rows).decode().encode(encoding))
    assert [record[1] for record in file_records(tmp_path / f"rows{kind}")] == rows  # type: ignore[index]


ROW = {"instruction": "a", "output": "b"}
HALF = "half of a surrogate pair, which is no character"


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("text", "count", "second"),
    [
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": "b"}', 2, "line 2"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b"}]', 2, "row 2"),
        ('[\n{"instruction": "a", "output": "b"},\n\n{"instruction": "a", "output": "b"}]', 2, "row 2"),
        ('{"instruction": "a",\n "output": "b"}\n\n{"instruction": "a",\n "output": "b"}', 2, "line 4"),
        ('{"data": [\n{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b"}]}', 2, "row 2"),
        ('{"instruction": "a",\n "output": "b"}', 1, ""),
    ],
)
def test_json_and_json_lines_are_told_apart_by_what_is_in_them(
    text: str, count: int, second: str, suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"rows{suffix}"
    file.write_text(text)
    records = list(file_records(file))
    assert [record[1] for record in records] == [ROW] * count  # type: ignore[index]
    assert count == 1 or records[1][0] == f"{file}, {second}"  # type: ignore[index]


def broken_lines() -> dict[str, tuple[bytes, str]]:
    """Return lines that hold no row, each with the reason that is told."""
    return {
        "half": (b'{"instruction": "a", "outp', "not JSON"),
        "word": (b"hello", "not JSON"),
        "list": (b'["a", "b"]', "a row should be an object"),
        "number": (b"5", "a row should be an object"),
        "latin": (b'{"instruction": "\xe9", "output": "b"}', "not UTF-8"),
        "twice": (b'{"instruction": "a", "output": "b", "output": "c"}', "a key occurs twice in an object"),
        "deep": (b"[" * 100_000, "not JSON"),
        "digits": (b'{"instruction": "a", "output": ' + b"9" * 5000 + b"}", "not JSON"),
        "surrogate": (rb'{"instruction": "a", "output": "\ud83e!"}', "half of a surrogate pair, which is no character"),
        "key": (
            rb'{"instruction": "a", "output": "b", "\udead": 1}',
            "half of a surrogate pair, which is no character",
        ),
        "nothing": (b"{}", ""),
        "null": (b'{"instruction": "a", "output": null}', "no 'output'"),
    }


@pytest.mark.parametrize("seed", range(5))
def test_every_broken_line_is_named_and_no_other(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    lines, expected = [], {}
    for number in range(1, 120):
        if draw.random() < 0.3:
            line, reason = draw.choice(list(broken_lines().values()))
            expected[number] = reason
        else:
            line = json.dumps(make_rows(1, number)[0]).encode() if draw.random() < 0.9 else b"  "
        lines.append(line)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(lines))
    seen, rows = Seen(), list(find_source(str(file)).rows(Seen()))
    bad = {int(row.where.rpartition(" ")[2]): row.reason for row in rows if isinstance(row, BadRow)}
    assert bad.keys() == expected.keys()
    assert all(bad[number] == reason for number, reason in expected.items() if reason)
    list(find_source(str(file)).rows(seen))
    assert seen.rows == sum(line.strip() != b"" for line in lines) == len(rows)


def test_cells_are_counted_and_a_quote_that_never_ends_is_the_file_s(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b'question;answer\n"two\nlines";b\na;b;c\na\n\n"x";"caf\xe9"\na;b\n')
    records = list(file_records(file))
    assert [record if isinstance(record, BadRow) else record[1] for record in records] == [
        {"question": "two\nlines", "answer": "b"},
        BadRow(f"{file}, line 4", "not as many cells as columns", "3 where the first line has 2"),
        BadRow(f"{file}, line 5", "not as many cells as columns", "1 where the first line has 2"),
        BadRow(f"{file}, line 7", "not UTF-8", "'answer'"),
        {"question": "a", "answer": "b"},
    ]
    file.write_text('question,answer\na,b\n"a,b\nc,d\n')
    with pytest.raises(UserError, match=r"rows.csv, line 3: not CSV, and where its next row begins is unknown"):
        list(file_records(file))
    file.write_text("a,a\n1,2\n")
    with pytest.raises(UserError, match="'a' stands there twice"):
        list(file_records(file))


def test_a_table_s_nulls_are_absent_and_values_of_mixed_types_come_back(tmp_path: Path) -> None:
    """In a table every call of a tool has the arguments of all; and ``datasets`` keeps what fits no type as JSON."""

    def calling(*calls: dict[str, Any]) -> list[dict[str, Any]]:
        asked = {"role": "user", "content": "go"}
        functions = [{"function": {"name": "f", "arguments": call}} for call in calls]
        return [{"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [f]}]} for f in functions]

    plain: list[dict[str, Any]] = [{"city": "Rome"}, {"sum": 3}]
    mixed: list[dict[str, Any]] = [{"city": "Rome"}, {"sum": 3, "of": ["a", 1]}]
    rows, table = calling(*mixed), pyarrow.Table.from_pylist(calling(*plain))
    assert "'sum': None" in str(table.to_pylist())
    files: dict[str, Callable[[Path], object]] = {
        "plain.parquet": lambda file: parquet.write_table(table, file),
        "plain": lambda file: datasets.Dataset(table).save_to_disk(file),
        "hf.parquet": lambda file: datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(file),
        "saved": lambda file: datasets.Dataset.from_list(rows, on_mixed_types="use_json").save_to_disk(file),
        "rows.json": lambda file: file.write_text(json.dumps(rows)),
    }
    for name, write in files.items():
        write(tmp_path / name)
        found = list(find_source(str(tmp_path / name)).rows())
        assert all(isinstance(row, Row) for row in found)
        arguments = [row.messages[1]["tool_calls"][0]["function"]["arguments"] for row in found]  # type: ignore[union-attr]
        assert arguments == (plain if name.startswith("plain") else mixed), name


@pytest.mark.parametrize("name", [f"rows{kind}{packed}" for kind in KINDS for packed in ("", ".gz")] + ["rows.zip"])
def test_a_pointer_of_git_lfs_is_told_as_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n")
    with pytest.raises(UserError, match=rf"{re.escape(name)} in .* is a pointer of Git LFS.*git lfs pull"):
        list(file_records(tmp_path / name))
