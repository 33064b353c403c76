"""Made-up items of the eight tasks in the neutral schema, with the quirks that real ones have."""

from __future__ import annotations

import random
from typing import Any

from subspace.data.items import Item, make_item
from tests.helpers.tiny_models import TEXT

WORDS = TEXT.split()
# Trailing spaces, a space before the question mark, quotation marks, letters outside ASCII, tags of WikiHow.
QUIRKS = ("", "", "", " ", "  ", ' "quoted"', " café n°5", " [title] How to", " [substeps] first")


def items(task: str, count: int, seed: int = 0) -> list[Item]:
    """Return ``count`` items of a task, always the same."""
    draw = random.Random(f"{task}{seed}")

    def text(fewest: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(fewest, most)))

    def item(number: int) -> Item:
        choices = [text(1, 8) + draw.choice(QUIRKS) for _ in range(_num_choices(task, draw))]
        made: dict[str, Any] = {
            "topic": "",
            "context": "",
            "question": text(3, 20) + draw.choice(QUIRKS),
            "choices": choices,
        }
        if task == "boolq":
            made |= {"topic": text(1, 2), "context": text(10, 60), "choices": ["false", "true"]}
        elif task == "siqa":
            made["context"] = text(5, 15)
        elif task == "hellaswag":
            last = draw.choice(["", text(1, 5)])
            made |= {"topic": text(1, 3), "context": f"{text(5, 20)} {last}".rstrip(), "question": last}
        elif task == "winogrande":
            made |= {"question": f"{text(3, 8)} _ {text(1, 8)}.", "choices": [text(1, 1), text(1, 2)]}
        return make_item({"id": f"{task}-{number}", **made, "label": draw.randrange(len(made["choices"]))})

    return [item(number) for number in range(count)]


def _num_choices(task: str, draw: random.Random) -> int:
    fixed = {"piqa": 2, "siqa": 3, "hellaswag": 4, "openbookqa": 4}
    return fixed.get(task) or draw.choice([3, 4, 4, 5])
