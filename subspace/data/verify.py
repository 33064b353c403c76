"""Verification of a task's rows against its declaration: row counts, label counts, and every byte of their text.

The text is verified by rebuilding the published LLM-Adapters files from the neutral rows: a git blob id is a checksum
of a file's content, so an equal id means an equal file, without having that file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from subspace.data.items import Item
from subspace.data.tasks import PublishedFile, Task
from subspace.errors import UserError

Rows = Sequence[Item]


@dataclass(frozen=True)
class SplitVerification:
    """Result of verifying a prepared split.

    ``proved`` is None if there is nothing to compare with. ``expected`` is False if the text differs from the published
    file although its source does not declare a difference.
    """

    rows: int
    sha256: str
    proved: bool | None = None
    expected: bool = True
    note: str = "no published file to compare with"


def verify_splits(task: Task, splits: Mapping[str, Rows], source: str) -> dict[str, SplitVerification]:
    """Return the verification of each split, by its counts and by the published file that contains it.

    Raises:
        UserError: the counts differ from the declared ones. A text that differs is reported, not refused.
    """
    facts = {split: SplitVerification(*_count(task, split, rows, source)) for split, rows in splits.items()}
    for name, published in task.published.items():
        verdict = _prove(task, splits, source, name, published)
        for split in facts.keys() & {part.split for part in published.parts}:
            facts[split] = replace(facts[split], **verdict)
    return facts


def published_file(task: Task, items: Iterable[Item]) -> bytes:
    """Return the content of a file in which LLM-Adapters would publish these items."""
    records = [
        {"instruction": task.instruction(item), "input": "", "output": task.output(item), "answer": task.answer(item)}
        for item in items
    ]
    return json.dumps(records, indent=4).encode("ascii")


def git_blob_id(content: bytes) -> str:
    """Return the git blob id of a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _count(task: Task, split: str, rows: Rows, source: str) -> tuple[int, str]:
    declared = task.splits[split]
    if len(rows) != declared.rows:
        raise UserError(f"{task.name}/{split} has {len(rows):,} rows in {source} where {declared.rows:,} are declared")
    if bad := next((row for row in rows if not 0 <= row["label"] < len(row["choices"])), None):
        raise UserError(
            f"{task.name}/{split}, row {bad['id']}: label {bad['label']} of {len(bad['choices'])} choices in {source}"
        )
    counted = Counter(row["label"] for row in rows)
    labels = tuple(counted[label] for label in range(max(counted, default=-1) + 1))
    if declared.labels and labels != declared.labels:
        raise UserError(f"{task.name}/{split} has the labels {labels} in {source} where {declared.labels} are declared")
    return len(rows), hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def _prove(task: Task, splits: Mapping[str, Rows], source: str, name: str, published: PublishedFile) -> dict[str, Any]:
    if absent := {part.split for part in published.parts} - splits.keys():
        rows = sum(part.first or task.splits[part.split].rows for part in published.parts)
        lacking = sum(task.splits[split].rows for split in absent)
        note = f"{lacking:,} ({', '.join(absent)}) of the {rows:,} rows of {name} are not in {source}"
        return {"proved": False, "note": note}

    content = published_file(task, (item for part in published.parts for item in splits[part.split][: part.first]))
    if git_blob_id(content) == published.blob:
        return {"proved": True, "note": f"{name} {published.blob[:12]}"}
    pypi = [task.splits[part.split].pypi for part in published.parts]
    lacks = dict.fromkeys(wheel.lacks for wheel in pypi if source == "pypi" and wheel and wheel.lacks)
    return {"proved": False, "expected": bool(lacks), "note": "; ".join(lacks) or f"differs from the published {name}"}
