"""Evaluation results on disk: a line an item in ``evaluation/PROTOCOL/TASK.jsonl``, a row a task in ``results.json``.

A row states what its numbers depend on: the fingerprint fields, called *ingredients* in the file (protocol and its
version, task version, templates, items, decoding, metrics, tokenizer), and a fingerprint of them. Two numbers are
comparable if and only if their fingerprints are equal.

A row also holds the number and the checksum of its items' lines, and what reads items compares them. Items are written
under the name ``TASK.jsonl.next`` first, then the row, and then they are renamed. So a process that is killed in
between leaves the old row with its items, or the new one with its, which are read under either name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple, NotRequired

from typing_extensions import TypedDict

from subspace.common.declarations import Amount, Count, Name, Positive, Share, find_fault
from subspace.common.files import fsync_path, write_file
from subspace.common.foreign.text import MOST_RESULT_BYTES, read_bytes
from subspace.common.hashing import hash_json
from subspace.common.locks import locked
from subspace.errors import UserError
from subspace.evaluation.records import ItemRecord

RESULTS = "results.json"


class Score(NamedTuple):
    """Accuracy between 0 and 1, and its standard error."""

    value: float
    error: float


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Result of scoring one task by one protocol. The first of ``metrics`` is the one that is usually reported."""

    model: str
    adapter: str
    dtype: str
    protocol: str
    task: str
    metrics: Mapping[str, Score]
    n: int
    majority: float
    truncated: int
    seconds: float
    fingerprint_fields: Mapping[str, str]
    items: Path | None = field(default=None, compare=False)
    subject: str = ""  # checksum of the scored weights; empty if none was computed
    #: The base's record: path, the hub's commit, checksums of weights and tokenizer. Of earlier versions, empty.
    base: Mapping[str, str] = field(default_factory=dict, compare=False)
    #: The task's title and suite, for tables; and the checksum of the items' lines. Of earlier versions, empty.
    title: str = field(default="", compare=False)
    suite: str = field(default="", compare=False)
    items_sha256: str = field(default="", compare=False)

    @property
    def fingerprint(self) -> str:
        """Checksum of the fingerprint fields, as 12 hexadecimal digits."""
        return digest(dict(self.fingerprint_fields))


def digest(value: Any) -> str:
    """Return a checksum of a JSON value, as 12 hexadecimal digits. The order of a mapping's keys does not matter."""
    return hash_json(value)[:12]


def accuracy(correct: Sequence[bool]) -> Score:
    """Return the share of correct items p, with its binomial standard error, sqrt(p (1 - p) / n)."""
    p = sum(correct) / len(correct)
    return Score(p, math.sqrt(p * (1 - p) / len(correct)))


def items_file(folder: Path, protocol: str, task: str) -> Path:
    """Return the path of a task's items in a run's folder."""
    return folder / "evaluation" / protocol / f"{task}.jsonl"


def write_items(file: Path, records: Iterable[ItemRecord]) -> None:
    """Write one line an item, atomically."""
    write_file(file, _lines(records))


def items_checksum(records: Iterable[ItemRecord]) -> str:
    """Return the SHA-256 of the items' lines, as hexadecimal digits."""
    return hashlib.sha256(_lines(records).encode()).hexdigest()


def _lines(records: Iterable[ItemRecord]) -> str:
    return "".join(f"{json.dumps(record, ensure_ascii=False, allow_nan=False)}\n" for record in records)


class _Item(TypedDict):
    """What is read of an item's line; ``ItemRecord`` has all of it."""

    id: str | int
    prompt: NotRequired[str]
    correct: dict[str, bool]


def read_items(file: Path) -> list[ItemRecord]:
    """Return the records of an items file.

    Raises:
        UserError: the file cannot be read, or a line is not an item.
    """
    return _parse_items(_read(file), file)


def read_verified_items(result: TaskResult) -> list[ItemRecord]:
    """Return the records of a result's items, compared with its row.

    Raises:
        UserError: they are missing, damaged, of another number, or other ones than the row was written with.
    """
    file = result.items
    if file is None:
        raise UserError(f"{result.task} has a row by {result.protocol}, but no stored items. Score the run again")
    pending = _pending(file)
    found = pending if _checksum(pending) == result.items_sha256 != _checksum(file) else file
    content = _read(found)
    records = _parse_items(content, found)
    cause = ""
    if len(records) != result.n:
        cause = f"it has {len(records):,} items, and its row {result.n:,}"
    elif result.items_sha256 not in ("", hashlib.sha256(content).hexdigest()):
        cause = "it has other items than its row was written with"
    for metric, score in result.metrics.items():
        right = [record["correct"].get(metric) for record in records]
        if cause or None in right or not math.isclose(sum(map(bool, right)) / len(right), score.value, abs_tol=1e-9):
            raise UserError(
                f"{found} and {RESULTS} do not agree: {cause or f'its items give another {metric}'}. "
                "Score the run again: subspace evaluate"
            )
    return records


def _pending(file: Path) -> Path:
    """Return the name under which items are written before their row is."""
    return file.with_name(f"{file.name}.next")


def _checksum(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _read(file: Path) -> bytes:
    try:
        return read_bytes(file, most=MOST_RESULT_BYTES)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}. Score the run again: subspace evaluate") from None


def _parse_items(content: bytes, file: Path) -> list[ItemRecord]:
    records: list[Any] = []
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file}, line {number} is damaged: {error}. Score the run again: subspace evaluate"
            ) from None
    if fault := find_fault(records, list[_Item]):
        (place, *key), reason = fault
        raise UserError(
            f"{file}, line {int(place) + 1} is damaged: {_place(key)}: {reason}. Score the run again: subspace evaluate"
        )
    return records


def _place(key: Sequence[str | int]) -> str:
    return ".".join(map(str, key)) or "the whole"


def save_result(folder: Path, result: TaskResult, records: Sequence[ItemRecord]) -> None:
    """Write a task's items and its row, such that there is always an old pair or the new one; keep the other rows.

    Several processes may do so at a time, each with tasks of its own.
    """
    assert result.items
    pending = _pending(result.items)
    with locked(folder / RESULTS):
        write_items(pending, records)
        _merge(folder, [result])
        pending.replace(result.items)
        fsync_path(result.items.parent)


def write_results(folder: Path, results: Iterable[TaskResult]) -> None:
    """Merge results into a run's ``results.json``; rows of other protocols and tasks are kept."""
    with locked(folder / RESULTS):
        _merge(folder, results)


def _merge(folder: Path, results: Iterable[TaskResult]) -> None:
    file = folder / RESULTS
    rows = {(row.protocol, row.task): row for row in (read_results(folder) if file.exists() else [])}
    rows.update({(row.protocol, row.task): row for row in results})
    listed = [_row(rows[key], folder) for key in sorted(rows)]
    write_file(file, json.dumps(listed, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def find_result(folder: Path, protocol: str, task: str) -> TaskResult | None:
    """Return a run's result for a task and protocol, or None if it is missing or its items are not those of its row."""
    if not (folder / RESULTS).exists():
        return None
    for row in read_results(folder):
        if (row.protocol, row.task) == (protocol, task):
            try:
                read_verified_items(row)
            except UserError:
                return None
            return row
    return None


class _Score(TypedDict):
    value: Share
    error: Amount


class _Row(TypedDict):
    """A row of ``results.json``, whose other keys are those of newer versions."""

    model: str
    adapter: str
    dtype: str
    protocol: Name
    task: Name
    metrics: dict[Name, _Score]
    n: Positive
    majority: Share
    truncated: Count
    seconds: Amount
    ingredients: dict[str, str]
    items: str | None
    fingerprint: str
    subject: NotRequired[str]
    base: NotRequired[dict[str, str]]
    title: NotRequired[str]
    suite: NotRequired[str]
    items_sha256: NotRequired[str]


def read_results(folder: Path) -> list[TaskResult]:
    """Return the results in a run's folder.

    Raises:
        UserError: the run was not scored, or its ``results.json`` is damaged or of a newer version.
    """
    file = folder / RESULTS
    try:
        rows = json.loads(read_bytes(file, most=MOST_RESULT_BYTES))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {RESULTS}: it was not scored. Run: subspace evaluate {folder}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, str(error)) from None
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and (unknown := row.keys() - _Row.__annotations__.keys()):
            raise UserError(
                f"{file} is of a newer version of subspace than this one, which does not know what {min(unknown)!r} "
                "in it is. Read it with that version, or score into another folder: runs=FOLDER"
            )
    if fault := find_fault(rows, list[_Row]):
        raise _damaged(folder, f"{_place(fault[0])}: {fault[1]}")
    return [_result(row, folder) for row in rows]


def _damaged(folder: Path, reason: str) -> UserError:
    return UserError(f"{folder / RESULTS} is damaged ({reason}). Remove it and score again: subspace evaluate {folder}")


_IN_FILE = {"fingerprint_fields": "ingredients"}
"""Fields that have another name in ``results.json``."""


def _row(result: TaskResult, folder: Path) -> dict[str, Any]:
    row = {_IN_FILE.get(f.name, f.name): getattr(result, f.name) for f in dataclasses.fields(result)}
    row["metrics"] = {name: {"value": score.value, "error": score.error} for name, score in result.metrics.items()}
    row["ingredients"] = dict(result.fingerprint_fields)
    row["items"] = None if result.items is None else os.path.relpath(result.items, folder)
    return {**row, "fingerprint": result.fingerprint}


def _result(row: Mapping[str, Any], folder: Path) -> TaskResult:
    names = {name: field for field, name in _IN_FILE.items()}
    values = {names.get(name, name): value for name, value in row.items() if name != "fingerprint"}
    values["metrics"] = {name: Score(score["value"], score["error"]) for name, score in row["metrics"].items()}
    values["items"] = None if row["items"] is None else folder / row["items"]
    result, name = TaskResult(**values), f"{row['protocol']}/{row['task']}"
    if not result.metrics:
        raise _damaged(folder, f"{name} has no metrics")
    if result.fingerprint != row["fingerprint"]:
        raise _damaged(folder, f"the fingerprint of {name} is not that of its ingredients")
    # A folder from somebody else names no files but its own.
    if row["items"] is not None and (PurePath(row["items"]).is_absolute() or ".." in PurePath(row["items"]).parts):
        raise _damaged(folder, f"the items of {name} are outside of the folder")
    return result
