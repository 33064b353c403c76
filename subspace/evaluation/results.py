"""What a scoring leaves behind: a line an item in ``evaluation/PROTOCOL/TASK.jsonl``, a row a task in ``results.json``.

A row says what its numbers mean: the fingerprint fields, called *ingredients* in the file (protocol and its version,
task version, templates, items, decoding, metrics, tokenizer), and a fingerprint of them. Two numbers can be compared
exactly when their fingerprints are equal.
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
    """A share of items, between 0 and 1, and its standard error."""

    value: float
    error: float


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task scored by one protocol. ``metrics`` has the metric that is usually reported first."""

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
    subject: str = ""  # a checksum of the weights that were scored; nothing where it was not taken

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that are equal where the fingerprint fields are."""
        return digest(dict(self.fingerprint_fields))

    @property
    def version(self) -> str:
        """The task's version."""
        return self.fingerprint_fields["task version"]


def digest(value: Any) -> str:
    """Return twelve hexadecimal digits of a value that JSON can hold. The order of a mapping's keys does not matter."""
    return hash_json(value)[:12]


def accuracy(correct: Sequence[bool]) -> Score:
    """Return the share of items that are right, with its binomial standard error, sqrt(p (1 - p) / n)."""
    p = sum(correct) / len(correct)
    return Score(p, math.sqrt(p * (1 - p) / len(correct)))


def mean_score(scores: Sequence[Score]) -> Score:
    """Return the unweighted mean of independent scores: its variance is the sum of theirs over k squared."""
    k = len(scores)
    return Score(sum(score.value for score in scores) / k, math.sqrt(sum(score.error**2 for score in scores)) / k)


def items_file(folder: Path, protocol: str, task: str) -> Path:
    """Return where a run's folder keeps a task's items."""
    return folder / "evaluation" / protocol / f"{task}.jsonl"


def write_items(file: Path, records: Iterable[ItemRecord]) -> None:
    """Write one line an item; the file is there whole or not at all."""
    write_file(file, "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records))


def read_items(file: Path) -> list[ItemRecord]:
    """Read the items back."""
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
    """Return for each item of a file whether it was right by a metric."""
    return [bool(record["correct"][metric]) for record in read_items(file)]


def write_results(folder: Path, results: Iterable[TaskResult]) -> None:
    """Put results into a run's ``results.json``. What it holds of other protocols and tasks stays."""
    file = folder / RESULTS
    kept = {(row.protocol, row.task): row for row in (read_results(folder) if file.exists() else [])}
    kept.update({(row.protocol, row.task): row for row in results})
    write_file(file, json.dumps([_row(kept[key], folder) for key in sorted(kept)], indent=2, ensure_ascii=False) + "\n")


def find_result(folder: Path, protocol: str, task: str) -> TaskResult | None:
    """Return the result that a run's folder holds of a task and protocol, if its items are there too, and whole."""
    if not (folder / RESULTS).exists():
        return None
    found = [row for row in read_results(folder) if (row.protocol, row.task) == (protocol, task)]
    try:
        whole = found and found[0].items and len(read_items(found[0].items)) == found[0].n
    except UserError:
        whole = False
    return found[0] if whole else None


def read_results(folder: Path) -> list[TaskResult]:
    """Read a run's results."""
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
"""Fields that ``results.json`` calls otherwise."""


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
