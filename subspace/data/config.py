"""Settings of the data: what a run trains on, and which items it is scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from subspace.common.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """What a run trains on, and how it is read."""

    mixture: str = setting(
        "commonsense", "a mixture, a task, tasks with rows or weights, or a file; see data/README.md"
    )
    prompt: str = setting("alpaca-indented", "the prompt template, from data/prompts.yaml")
    max_length: int = setting(256, "tokens, prompt and answer together; a longer row loses its beginning", min=2)
    loss_on: str = setting(
        "answer", "the tokens that carry loss: the answer and its end, or all", choices=("answer", "all")
    )
    validation: int = setting(120, "rows held out", min=0)
    limit: int | None = setting(None, "rows to train on, drawn at random; null for all", min=1)
    group_by_length: bool = setting(True, "fill a step with rows of like length, which pads less")
    packing: bool = setting(
        False, "put rows one after another, blind to each other, into sequences of max_length, which pads hardly at all"
    )


@dataclass(frozen=True)
class TaskSelection:
    """Which items are scored: ``limit`` of a split of each task, or all.

    ``tasks`` is ``all``, a suite's name, tasks' names, or YAML files of one's own, one or several (with commas).
    ``folder`` is where published files lie, for the tasks that are read from there.
    """

    tasks: str | Sequence[str] = "all"
    split: str = "test"
    limit: int | None = None
    folder: str | None = None
