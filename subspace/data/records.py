"""Training texts of tasks: pairs of prompt and answer from their prepared items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from subspace.common.foreign.limits import one_timer
from subspace.common.foreign.templates import render
from subspace.data.prepare import task_checksum, task_items
from subspace.data.tasks import find_task

Texts = list[tuple[str, str]]


@dataclass(frozen=True)
class TextRows:
    """Rows that are read on demand. ``fingerprint_inputs`` are all inputs that determine their texts."""

    name: str
    fingerprint_inputs: tuple[str, ...]
    read: Callable[[], Texts]


def task_rows(name: str, split: str, prompt: str) -> TextRows | None:
    """Return a task's rows, or None if its source does not have the split. ``prompt`` is a template."""
    checksum, declared = task_checksum(name, split), find_task(name)
    if checksum is None:
        return None

    def read() -> Texts:
        with one_timer():
            return [
                (render(prompt, {"instruction": declared.instruction(item), "input": ""}), declared.output(item))
                for item in task_items(name, split).to_list()
            ]

    texts = (declared.instruction_template, declared.answer_template, declared.output_template)
    return TextRows(f"{name}/{split}", (checksum, prompt, *texts), read)
