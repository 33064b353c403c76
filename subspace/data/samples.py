"""Selection of the items to score."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from subspace.common.settings import split_names
from subspace.data.config import TaskSelection
from subspace.data.custom_tasks import custom_task, read_local_items, with_answer_words
from subspace.data.items import Item
from subspace.data.prepare import task_items
from subspace.data.tasks import Task, find_task, is_declaration, list_tasks
from subspace.errors import UserError


@dataclass(frozen=True)
class Sample:
    """Selected items of a task. ``majority`` is the share of the split's most frequent answer.

    ``positions`` has the index of each item in its split.
    """

    task: Task
    items: list[Item]
    majority: float
    positions: Sequence[int] = ()


def find_tasks(names: str | Sequence[str]) -> list[Task]:
    """Return the tasks that a setting names, in the order of the literature's tables, custom tasks last.

    Raises:
        UserError: there is no such task, or two files have the same name.
    """
    found: dict[str, Task] = {}
    for name in split_names(names):
        if is_declaration(name):
            task = custom_task(Path(name))
            if found.setdefault(task.name, task) != task:
                raise UserError(
                    f"{name} and a file in {found[task.name].folder} are both task {task.name!r}, so their results "
                    "would have one name. Give one of the files another name"
                )
        else:
            suite = list_tasks("commonsense" if name == "all" else name)
            found |= suite or {(task := find_task(name)).name: task}
    return sorted(found.values(), key=lambda task: task.position)


def select_samples(selection: TaskSelection) -> list[Sample]:
    """Return the selected items of every selected task."""
    return [select_sample(task, selection) for task in find_tasks(selection.tasks)]


def select_sample(task: Task, selection: TaskSelection) -> Sample:
    """Return the selected items of one task."""
    return take_sample(task, selection.split, selection.limit, selection.folder)


def take_sample(task: Task, split: str, limit: int | None, folder: str | None = None) -> Sample:
    """Return the items of a split, or ``limit`` of them: those with the smallest hashes of their ids, in their order.

    The hashes make a sample representative where the first items of a split are not, equal on every machine and for
    every protocol, and a subset of any larger sample.
    """
    items = split_items(task, split, folder)
    answers = Counter(item["label"] if len(item["choices"]) > 1 else str(item["choices"]) for item in items)
    positions: Sequence[int] = range(len(items))
    if limit is not None and limit < len(items):
        positions = choose([item["id"] for item in items], limit)
    task = with_answer_words(task, items)
    return Sample(task, [items[i] for i in positions], max(answers.values()) / answers.total(), positions)


def choose(ids: Sequence[str], limit: int) -> list[int]:
    """Return the positions, in order, of so many texts: those with the smallest hashes."""
    hashes = [hashlib.sha256(text.encode()).digest() for text in ids]
    return sorted(sorted(range(len(ids)), key=hashes.__getitem__)[:limit])


def split_items(task: Task, split: str, folder: str | None) -> list[Item]:
    """Return all items of a split, from a file or from the prepared data."""
    return read_local_items(task, split, folder) or task_items(task.name, split).to_list()
