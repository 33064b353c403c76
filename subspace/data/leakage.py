"""Whether a run is trained on items that it is scored on: a notice when training starts, an error when it is scored.

The commonsense suites and their own mixtures are left out: what those share is known, and little. An item is seen if
its question, letters and digits compared, is a training row's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from subspace.data.config import TaskSelection
from subspace.data.contamination import Text, text_keys
from subspace.data.prepare import task_items
from subspace.data.records import FILES, records
from subspace.data.samples import Sample, find_tasks, select_sample
from subspace.data.tasks import Task, find_mixture
from subspace.errors import UserError

MAX_OVERLAP = 0.01
"""What share of a suite's items a run may have been trained on before its score says nothing."""


def find_overlap(mixture: str, samples: Iterable[Sample]) -> dict[str, tuple[int, int]]:
    """Return, by task, how many of its items are in a mixture's rows, and of how many; only where some are."""
    compared = [sample for sample in samples if _is_compared(sample.task, mixture)]
    trained = set(map(_key, _questions(mixture))) if compared and mixture else set()
    found = {}
    for sample in compared:
        asked = [{_key(sample.task.instruction(item)), _key(item["question"])} for item in sample.items]
        if seen := sum(not trained.isdisjoint(texts) for texts in asked):
            found[sample.task.name] = seen, len(asked)
    return found


def overlap_notices(mixture: str, selection: TaskSelection) -> list[str]:
    """Return a notice for each task of a run's scoring that has items in the rows that it is about to be trained on.

    A suite whose items are not on this machine is passed over: it is looked at again when it is scored.
    """
    samples = []
    for task in find_tasks(selection.tasks):
        if _is_compared(task, mixture):
            with contextlib.suppress(UserError):
                samples.append(select_sample(task, selection))
    return [
        f"{mixture} holds {seen} of {of} items of {name}"
        + (", too many for its score to mean anything: it will be refused" if seen > MAX_OVERLAP * of else "")
        for name, (seen, of) in find_overlap(mixture, samples).items()
    ]


def _is_compared(task: Task, mixture: str) -> bool:
    return mixture.endswith(FILES) or task.suite != "commonsense"


def _questions(mixture: str) -> Iterator[str]:
    if mixture.endswith(FILES):
        for _, record in records(Path(mixture)):
            turns = record.get("messages") or [{"content": record.get("instruction", "")}]
            yield from (str(turn["content"]) for turn in turns)
        return
    for task, split in {(part.task, part.split) for part in find_mixture(mixture).parts}:
        yield from task_items(task, split)["question"]


def _key(text: str) -> int:
    return text_keys(Text(text)).question
