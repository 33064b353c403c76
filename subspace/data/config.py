"""Data settings: what a run trains on, and which items it is scored on."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from subspace.common.settings import MOST_COUNT, Settings, setting
from subspace.errors import UserError

PROMPT = "alpaca-indented"
TASK_LENGTH = 256  # tokens


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Settings of the training data."""

    mixture: str = setting(
        "commonsense",
        "a mixture, a task, a file, a folder or a data set on the hub, or several with rows or weights; see "
        "data/README.md",
    )
    columns: dict[str, str | None] = setting(
        {}, "columns of a file by their names here, as {instruction: question, output: reply}; null leaves a key out"
    )
    bad_rows: str = setting(
        "refuse",
        "rows of a file that cannot be trained on: refuse to start, or drop them; both tell how many, and why",
        choices=("refuse", "drop"),
    )
    prompt: str | None = setting(
        None,
        "prompt template, from data/prompts.yaml; null: rows of a file by the tokenizer's chat template where it has "
        "one, all others by alpaca-indented",
    )
    max_length: int | None = setting(
        None,
        "maximum tokens of a row; null: 256 for tasks, whose longer rows are truncated at the start, and for rows of a "
        "file, which are never truncated, that of the longest, up to the model's positions",
        min=2,
        max=1 << 24,
    )
    too_long: str = setting(
        "drop",
        "rows of a file that are longer than max_length or the model's positions: drop them, or refuse to start",
        choices=("drop", "refuse"),
    )
    loss_on: str = setting(
        "answers",
        "tokens that contribute to the loss: all answers of a row with their ends, the last answer, or all tokens",
        choices=("answers", "last-answer", "all"),
        former_values={"answer": "answers"},
    )
    chat_template: str | None = setting(
        None, "Jinja file that writes the rows of a file in place of the tokenizer's chat template"
    )
    date: str = setting("2025-01-01", "what a chat template that writes the date writes, in all rows of all days")
    validation: int | None = setting(
        None,
        "number of rows held out for validation; null for 120, at most a tenth, where train.validate_every, "
        "train.patience or train.save_final=best makes one due, else none",
        min=0,
        max=MOST_COUNT,
    )
    limit: int | None = setting(None, "rows to train on, drawn at random; null for all", min=1, max=MOST_COUNT)
    group_by_length: bool = setting(True, "batch rows of similar length, which reduces padding")
    packing: bool = setting(
        False, "pack rows, without attention between them, into sequences of max_length, which nearly removes padding"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError:
            raise UserError(f"data.date is {self.date!r}, which is no date like 2025-01-31") from None

    @property
    def prompt_name(self) -> str:
        """The prompt template of rows that no chat template writes."""
        return self.prompt or PROMPT

    def of_tasks(self) -> Self:
        """Return the settings with the values that null stands for where all rows are tasks'."""
        return replace(self, prompt=self.prompt_name, max_length=self.max_length or TASK_LENGTH)


@dataclass(frozen=True)
class TaskSelection:
    """A selection of items to score: ``limit`` of a split of each task, or all.

    ``tasks`` is ``all``, or one or several (comma-separated) suites, tasks or custom YAML files. ``folder`` has the
    published test files, for tasks that are read from there.
    """

    tasks: str | Sequence[str] = "all"
    split: str = "test"
    limit: int | None = None
    folder: str | None = None
