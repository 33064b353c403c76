"""The neutral item: one question of any task, independent of its source's field names."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, cast

ItemField = Literal["id", "topic", "context", "question", "choices", "label"]
ITEM_FIELDS: tuple[ItemField, ...] = ("id", "topic", "context", "question", "choices", "label")


class Item(TypedDict):
    """One question. Texts that its task does not have are empty.

    ``label`` is the index of the right choice, from 0. In a task without choices (the math suites) the right answer is
    the only choice.
    """

    id: str
    topic: str
    context: str
    question: str
    choices: list[str]
    label: int


def make_item(values: Mapping[str, Any]) -> Item:
    """Return an item with these values, in the order of the fields; missing texts are empty.

    Further fields, which a custom task may have, are kept for its templates.
    """
    return cast(Item, {**dict.fromkeys(ITEM_FIELDS, ""), **values})


def relabel(item: Item, label: int) -> Item:
    """Return a copy of the item with ``label`` as the right choice."""
    return {**item, "label": label}


def item_content(item: Item) -> list[Any]:
    """Return all fields of an item but its id: equal for duplicates."""
    return [item[field] for field in ITEM_FIELDS if field != "id"]


def _is_wide(character: str) -> bool:
    """Return True for a character of a script that is written without spaces, and for its punctuation."""
    if not character or unicodedata.east_asian_width(character) not in ("W", "F"):
        return (
            unicodedata.name(character, "").startswith(("THAI ", "LAO ", "KHMER ", "MYANMAR ")) if character else False
        )
    return not unicodedata.name(character, "").startswith("HANGUL ")


def usual_separator(context: str, text: str) -> str:
    """Return what stands between a context and the text that follows it: a space, or nothing where none is written."""
    if not context or context[-1].isspace() or not text:
        return ""
    ends = [next((c for c in letters if c.isalnum()), "") for letters in (reversed(context), text)]
    return "" if _is_wide(context[-1]) or all(map(_is_wide, ends)) else " "
