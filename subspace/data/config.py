"""Data settings: what a run trains on, and which items it is scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from subspace.common.settings import Settings, setting


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
    prompt: str = setting("alpaca-indented", "prompt template, from data/prompts.yaml")
    max_length: int = setting(
        256, "maximum tokens of prompt and answer together; longer rows are truncated at the start", min=2
    )
    loss_on: str = setting(
        "answer", "tokens that contribute to the loss: the answer with its EOS, or all", choices=("answer", "all")
    )
    validation: int = setting(120, "number of rows held out for validation", min=0)
    limit: int | None = setting(None, "rows to train on, drawn at random; null for all", min=1)
    group_by_length: bool = setting(True, "batch rows of similar length, which reduces padding")
    packing: bool = setting(
        False, "pack rows, without attention between them, into sequences of max_length, which nearly removes padding"
    )


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
