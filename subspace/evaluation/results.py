"""Evaluation results on disk: a line an item in ``evaluation/PROTOCOL/TASK.jsonl``, a row a task in ``results.json``.

A row states what its numbers depend on: the fingerprint fields, called *ingredients* in the file (protocol and its
version, task version, templates, items, decoding, metrics, tokenizer), and a fingerprint of them. Two numbers are
comparable if and only if their fingerprints are equal.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from subspace.common.files import write_file
from subspace.common.hashing import hash_json
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

    @property
    def fingerprint(self) -> str:
        """Checksum of the fingerprint fields, as 12 hexadecimal digits."""
        return digest(dict(self.fingerprint_fields))

    @property
    def version(self) -> str:
        """The task's version."""
        return self.fingerprint_fields["task version"]


def digest(value: Any) -> str:
    """Return a checksum of a JSON value, as 12 hexadecimal digits. The order of a mapping's keys does not matter."""
    return hash_json(value)[:12]


def accuracy(correct: Sequence[bool]) -> Score:
    """Return the share of correct items p, with its binomial standard error, sqrt(p (1 - p) / n)."""
    p = sum(correct) / len(correct)
    return Score(p, math.sqrt(p * (1 - p) / len(correct)))


def mean_score(scores: Sequence[Score]) -> Score:
    """Return the unweighted mean of k independent scores; its variance is the sum of theirs over k squared."""
    k = len(scores)
    return Score(sum(score.value for score in scores) / k, math.sqrt(sum(score.error**2 for score in scores)) / k)


def items_file(folder: Path, protocol: str, task: str) -> Path:
    """Return the path of a task's items in a run's folder."""
    return folder / "evaluation" / protocol / f"{task}.jsonl"


def write_items(file: Path, records: Iterable[ItemRecord]) -> None:
    """Write one line an item, atomically."""
    write_file(file, "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records))


def read_items(file: Path) -> list[ItemRecord]:
    """Return the records of an items file.

    Raises:
        UserError: the file cannot be read, or a line is not JSON.
    """
    try:
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}. Score the run again: subspace evaluate") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file}, line {number} is damaged: {error}. Score the run again: subspace evaluate"
            ) from None
    return records


def read_correct(file: Path, metric: str) -> list[bool]:
    """Return for each item of a file whether it is correct by a metric."""
    return [bool(record["correct"][metric]) for record in read_items(file)]


def write_results(folder: Path, results: Iterable[TaskResult]) -> None:
    """Merge results into a run's ``results.json``; rows of other protocols and tasks are kept."""
    file = folder / RESULTS
    rows = {(row.protocol, row.task): row for row in (read_results(folder) if file.exists() else [])}
    rows.update({(row.protocol, row.task): row for row in results})
    write_file(file, json.dumps([_row(rows[key], folder) for key in sorted(rows)], indent=2, ensure_ascii=False) + "\n")


def find_result(folder: Path, protocol: str, task: str) -> TaskResult | None:
    """Return a run's result for a task and protocol, or None if it or its complete items file is missing."""
    if not (folder / RESULTS).exists():
        return None
    rows = [row for row in read_results(folder) if (row.protocol, row.task) == (protocol, task)]
    try:
        complete = rows and rows[0].items and len(read_items(rows[0].items)) == rows[0].n
    except UserError:
        complete = False
    return rows[0] if complete else None


def read_results(folder: Path) -> list[TaskResult]:
    """Return the results in a run's folder.

    Raises:
        UserError: the run was not scored, or its ``results.json`` is damaged.
    """
    file = folder / RESULTS
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise TypeError("no list of rows")
        return [_result(row, folder) for row in rows]
    except FileNotFoundError:
        raise UserError(f"{folder} has no {RESULTS}: it was not scored. Run: subspace evaluate {folder}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged ({error!r}). Remove it and score again: subspace evaluate {folder}"
        ) from None


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
    result = TaskResult(**values)
    if result.fingerprint != row["fingerprint"]:
        raise ValueError(f"fingerprint of {result.protocol}/{result.task}")
    return result
