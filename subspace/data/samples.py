"""Which items of which tasks are scored."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from subspace.common.settings import split_names
from subspace.data.config import TaskSelection
from subspace.data.custom_tasks import custom_task, read_local_items
from subspace.data.items import Item
from subspace.data.prepare import task_items
from subspace.data.tasks import Task, find_task, list_tasks


@dataclass(frozen=True)
class Sample:
    """The items of a task that are scored. ``majority`` is the share of the split's most frequent answer.

    ``positions`` is where each item stands in its split.
    """

    task: Task
    items: list[Item]
    majority: float
    positions: Sequence[int] = ()


def find_tasks(names: str | Sequence[str]) -> list[Task]:
    """Return the tasks that a setting names, in the order of the literature's tables, one's own last."""
    found: list[Task] = []
    for name in split_names(names):
        if name.endswith((".yaml", ".yml")):
            found.append(custom_task(Path(name)))
        else:
            suite = list_tasks("commonsense" if name == "all" else name)
            found += suite.values() or [find_task(name)]
    return sorted({task.name: task for task in found}.values(), key=lambda task: task.position)


def select_samples(selection: TaskSelection) -> list[Sample]:
    """Return the items of every task that a scoring selects."""
    return [select_sample(task, selection) for task in find_tasks(selection.tasks)]


def select_sample(task: Task, selection: TaskSelection) -> Sample:
    """Return the items of one task as a scoring selects them."""
    return take_sample(task, selection.split, selection.limit, selection.folder)


def take_sample(task: Task, split: str, limit: int | None, folder: str | None = None) -> Sample:
    """Return the items of a split, or ``limit`` of them: those with the smallest hashes of their ids, in their order.

    Hashes, because the first items of a split need not be like the others; and so a smaller sample is part of a larger
    one, on every machine, for every protocol.
    """
    items = split_items(task, split, folder)
    answers = Counter(item["label"] if len(item["choices"]) > 1 else str(item["choices"]) for item in items)
    positions: Sequence[int] = range(len(items))
    if limit is not None and limit < len(items):
        hashes = [hashlib.sha256(item["id"].encode()).digest() for item in items]
        positions = sorted(sorted(positions, key=hashes.__getitem__)[:limit])
    return Sample(task, [items[i] for i in positions], max(answers.values()) / answers.total(), positions)


def split_items(task: Task, split: str, folder: str | None) -> list[Item]:
    """Return the items of a split, prepared ones or a file's."""
    return read_local_items(task, split, folder) or task_items(task.name, split).to_list()
