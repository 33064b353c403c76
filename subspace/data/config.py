"""Part of config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from subspace.common.settings import Settings, setting

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """What a run trains on, and how it is read."""

    mixture: str = setting(
        "commonsense", "a mixture, a task, tasks with rows or weights, or a file; see data/README.md"
    )
    prompt: str = setting("alpaca-indented", "the text round instruction and answer, from data/prompts.yaml")
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
