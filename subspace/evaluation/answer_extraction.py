"""Extraction of the answer from generated text, as in the published evaluators."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Protocol

from subspace.data.items import Item
from subspace.data.tasks import Task
from subspace.errors import UserError
from subspace.evaluation.records import ItemRecord, make_record


def answer_record(extractor: Extractor, task: Task, item: Item, prompt_hash: str, text: str) -> ItemRecord:
    """Return the record of an item for which the model generated ``text``."""
    prediction, label = extractor.find(text), task.answer(item)
    correct = {"acc": extractor.same(prediction, label)}
    return make_record(item, prompt_hash, {"text": text}, prediction, label, correct)


class Extractor(Protocol):
    """Interface of an answer extractor; ``str()`` describes it for the fingerprint."""

    def find(self, text: str) -> str:
        """Return the answer, or an empty string."""

    def is_final(self, text: str) -> bool:
        """Return True if the answer is present and no further text can change it."""

    def may_find(self, label: str) -> bool:
        """Return True if some text has this right answer."""

    def same(self, prediction: str, label: str) -> bool:
        """Return True if the prediction is the right answer."""


def extractor(task: Task, items: Sequence[Item]) -> Extractor:
    """Return the extractor that the published evaluators use for a task.

    Raises:
        UserError: an item's right answer is none that could be found.
    """
    found: Extractor = LastNumber() if task.extraction == "last-number" else AnswerWords(task.answer_words)
    for item in items:
        label = task.answer(item)
        if not found.may_find(label):
            raise UserError(
                f"{task.name}, item {item['id']}: its answer {label!r} can never be found in what a model writes, "
                f"which is searched for the {found}. In the task's file, 'answer' and 'answer_words' (or 'extraction') "
                "should fit, and answer_words may be left out for up to 50 different answers; or score it by likelihood"
            )
    return found


class AnswerWords:
    """Extractor of the first answer word, as published: case-sensitive, and parts of longer words match too."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        # Of words that begin alike the longest: "answer1" is part of "answer10".
        self.pattern = re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")
        # A word that is part of another ("answer1" of "answer10") may still grow into it.
        self.final = {word for word in words if not any(word in other for other in words if other != word)}

    def __str__(self) -> str:
        return f"first of {'|'.join(self.words)}"

    def find(self, text: str) -> str:
        """Return the first answer word, or an empty string."""
        match = self.pattern.search(text)
        return match[0] if match else ""

    def is_final(self, text: str) -> bool:
        """Return True if an answer word is present and no further text can change which is the first."""
        return self.find(text) in self.final

    def may_find(self, label: str) -> bool:
        """Return True if the right answer is one of the words."""
        return bool(label) and label in self.words

    def same(self, prediction: str, label: str) -> bool:
        """Return True if the words are equal."""
        return prediction == label


class LastNumber:
    """Extractor of the last number, as in the published evaluator of the math suites: commas are removed first.

    It is right within 0.001. It is known only when generation ends, so no row ends early.
    """

    TOLERANCE = 0.001

    def __str__(self) -> str:
        return f"last number, within {self.TOLERANCE}"

    def find(self, text: str) -> str:
        """Return the last number as it is written, or an empty string."""
        numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
        return str(numbers[-1]) if numbers else ""

    def is_final(self, text: str) -> bool:
        """Return False: a further number may follow."""
        return False

    def may_find(self, label: str) -> bool:
        """Return True if the right answer is a number."""
        try:
            return math.isfinite(float(label.replace(",", "")))
        except ValueError:
            return False

    def same(self, prediction: str, label: str) -> bool:
        """Return True if the numbers are equal within the tolerance."""
        return bool(prediction) and abs(float(prediction) - float(label.replace(",", ""))) <= self.TOLERANCE
