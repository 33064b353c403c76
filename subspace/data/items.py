"""The neutral item: one question of any task, whatever its source calls the fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, cast

ItemField = Literal["id", "topic", "context", "question", "choices", "label"]
ITEM_FIELDS: tuple[ItemField, ...] = ("id", "topic", "context", "question", "choices", "label")


class Item(TypedDict):
    """One question. A text that its task does not have is empty.

    ``label`` is the index of the right choice, from 0. A task without choices (the math suites) has the right answer as
    its only one.
    """

    id: str
    topic: str
    context: str
    question: str
    choices: list[str]
    label: int


def make_item(values: Mapping[str, Any]) -> Item:
    """Return the item of these values, in the order of the fields; a text that is not given is empty.

    What a task of one's own has besides stays, for its templates.
    """
    return cast(Item, {**dict.fromkeys(ITEM_FIELDS, ""), **values})


def relabel(item: Item, label: int) -> Item:
    """Return the item as if another of its choices were the right one."""
    return {**item, "label": label}


def item_content(item: Item) -> list[Any]:
    """Return all of an item but its id: equal where two items ask the same."""
    return [item[field] for field in ITEM_FIELDS if field != "id"]
