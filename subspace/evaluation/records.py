"""Records of scored items: one line each in ``evaluation/PROTOCOL/TASK.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, cast

from subspace.data.items import Item


class ItemRecord(TypedDict):
    """Result of scoring one item. Which of the optional fields are present depends on the protocol.

    Attributes:
        id: the item's identifier.
        prompt: a hash of the whole input of the model.
        scores: the log-probability of each choice, in nats.
        characters: the number of characters of each choice.
        text: the text that the model generated.
        prediction: for each metric the index of the predicted choice, from 0; or the predicted word or number.
        label: the index of the right choice, or the right answer.
        correct: for each metric, whether the prediction is right.
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
    """Fields of a record that only some protocols have, from which the prediction follows."""

    scores: list[float]
    characters: list[int]
    text: str


class PassageRecord(TypedDict):
    """Result of measuring a text; ``base_bits`` are those of the base model, None where that itself was measured."""

    id: str
    bytes: int
    tokens: int
    bits: float
    base_bits: float | None


def make_record(
    item: Item,
    prompt: str,
    evidence: Evidence,
    prediction: dict[str, int] | str,
    label: int | str,
    correct: Mapping[str, bool],
) -> ItemRecord:
    """Return an item's record, with its fields in the order of the file."""
    outcome = {"prediction": prediction, "label": label, "correct": dict(correct)}
    return cast(ItemRecord, {"id": item["id"], "prompt": prompt, **evidence, **outcome})
