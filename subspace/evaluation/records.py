"""What is kept of every scored item: one line of ``evaluation/PROTOCOL/TASK.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, cast

from subspace.data.items import Item


class ItemRecord(TypedDict):
    """How one item was scored. Which of the optional fields are there depends on the protocol.

    Attributes:
        id: the item's.
        prompt: a hash of everything that the model was given to read.
        scores: the log-probability of each choice, in nats.
        characters: how many characters each choice has.
        text: what the model wrote.
        prediction: the choice taken by each metric, counted from 0; or the answer's word or number.
        label: the right choice, or the right answer.
        correct: by each metric, whether the prediction is right.
    """

    id: str
    prompt: str
    scores: NotRequired[list[float]]
    characters: NotRequired[list[int]]
    text: NotRequired[str]
    prediction: Any  # dict[str, int] or str
    label: Any  # int or str
    correct: dict[str, bool]


class Evidence(TypedDict, total=False):
    """What a prediction rests on: those of a record's fields that are a protocol's own."""

    scores: list[float]
    characters: list[int]
    text: str


def make_record(
    item: Item,
    prompt: str,
    evidence: Evidence,
    prediction: dict[str, int] | str,
    label: int | str,
    correct: Mapping[str, bool],
) -> ItemRecord:
    """Return an item's record, its fields in the order of the file."""
    after = {"prediction": prediction, "label": label, "correct": dict(correct)}
    return cast(ItemRecord, {"id": item["id"], "prompt": prompt, **evidence, **after})
