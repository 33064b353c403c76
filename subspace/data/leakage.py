"""Overlap between a run's training rows and the items to score: a notice when training starts, an error when scoring.

The commonsense suites with their own mixtures are left out: their overlap is known and small. An item overlaps if its
question equals a training row's, compared by letters and digits. Parts of a mixture that the data's source lacks, as
the wheel lacks some splits, were not trained on and are not looked into.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from subspace.data.config import TaskSelection
from subspace.data.contamination import Text, text_keys
from subspace.data.prepare import task_checksum, task_items
from subspace.data.rows import Row
from subspace.data.samples import Sample, find_tasks, select_sample
from subspace.data.tasks import Task, find_mixture
from subspace.errors import UserError

MAX_OVERLAP = 0.01
"""Maximum share of a suite's items in the training rows; above it the score is meaningless."""


Columns = Mapping[str, str | None]


class TrainedTexts:
    """The texts of mixtures' rows, by their keys; read once for all runs of a command."""

    def __init__(self) -> None:
        self._known: dict[str, set[int]] = {}

    def keys(self, mixture: str, columns: Columns) -> set[int]:
        """Return the keys of a mixture's texts."""
        asked = repr((mixture, columns))
        if asked not in self._known:
            keys = set(map(_key, _questions(mixture, columns)))
            keys.discard(_key(""))  # of questions without a word, which equal each other and are not the same
            self._known[asked] = keys
        return self._known[asked]


def find_overlap(
    mixture: str, samples: Iterable[Sample], columns: Columns | None = None, texts: TrainedTexts | None = None
) -> dict[str, tuple[int, int]]:
    """Return for each task with overlap the number of its items in the mixture's rows, and of all its items."""
    own = bool(mixture) and any(part.data for part in find_mixture(mixture).parts)
    compared = [sample for sample in samples if _is_compared(sample.task, own=own)]
    trained = (texts or TrainedTexts()).keys(mixture, columns or {}) if compared and mixture else set()
    overlap = {}
    for sample in compared:
        asked = [{_key(sample.task.instruction(item)), _key(item["question"])} for item in sample.items]
        if seen := sum(not trained.isdisjoint(texts) for texts in asked):
            overlap[sample.task.name] = seen, len(asked)
    return overlap


def overlap_notices(
    mixture: str, selection: TaskSelection, columns: Columns | None = None, texts: TrainedTexts | None = None
) -> list[str]:
    """Return a notice for each selected task that has items in the rows of the mixture.

    A suite whose items are not on this machine is skipped: it is checked again when it is scored.
    """
    samples = []
    own = any(part.data for part in find_mixture(mixture).parts)
    for task in find_tasks(selection.tasks):
        if _is_compared(task, own=own):
            with contextlib.suppress(UserError):
                samples.append(select_sample(task, selection))
    return [
        f"{mixture} holds {seen} of {of} items of {name}"
        + (", too many for its score to mean anything: it will be refused" if seen > MAX_OVERLAP * of else "")
        for name, (seen, of) in find_overlap(mixture, samples, columns, texts).items()
    ]


def _is_compared(task: Task, *, own: bool) -> bool:
    return own or task.folder is not None or task.suite != "commonsense"


def _questions(mixture: str, columns: Columns) -> Iterator[str]:
    """Yield the texts of a mixture's rows that may be a test item's question."""
    for part in {part.name: part for part in find_mixture(mixture).parts}.values():
        if part.task:
            if task_checksum(part.task, part.split) is not None:
                yield from task_items(part.task, part.split)["question"]
            continue
        for row in part.source(columns).rows():
            if isinstance(row, Row):
                yield from _row_texts(row)


def _row_texts(row: Row) -> Iterator[str]:
    if row.text is not None:
        yield row.text
    if row.instruction is not None:
        yield row.instruction["instruction"]
    yield from (turn["content"] for turn in row.messages if isinstance(turn.get("content"), str))


def _key(text: str) -> int:
    return text_keys(Text(text)).question
