"""Find the answer in a text that a model wrote, as the published evaluators do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from subspace.data.items import Item
from subspace.data.tasks import Task
from subspace.evaluation.records import ItemRecord, make_record


def answer_record(extractor: Extractor, task: Task, item: Item, prompt_hash: str, text: str) -> ItemRecord:
    """Return the record of an item that a model answered with this text."""
    prediction, label = extractor.find(text), task.answer(item)
    correct = {"acc": extractor.same(prediction, label)}
    return make_record(item, prompt_hash, {"text": text}, prediction, label, correct)


class Extractor(Protocol):
    """Finds an answer in a text; ``str()`` says how."""

    def find(self, text: str) -> str:
        """Return the answer, or nothing."""

    def is_final(self, text: str) -> bool:
        """Return True if the answer is there and stays what it is whatever is written behind it."""

    def same(self, prediction: str, label: str) -> bool:
        """Return True if what was found is the right answer."""


def extractor(task: Task) -> Extractor:
    """Return what finds a task's answers, as the published evaluators do."""
    return LastNumber() if task.extraction == "last-number" else AnswerWords(task.answer_words)


class AnswerWords:
    """Finds the first answer word in a text, as the published evaluator does: case counts, parts of words match too."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        self.pattern = re.compile("|".join(map(re.escape, words)))
        # A word that is part of another ("answer1" of "answer10") may yet turn out to be that one.
        self.final = {word for word in words if not any(word in other for other in words if other != word)}

    def __str__(self) -> str:
        return f"first of {'|'.join(self.words)}"

    def find(self, text: str) -> str:
        """Return the first answer word, or nothing."""
        found = self.pattern.search(text)
        return found[0] if found else ""

    def is_final(self, text: str) -> bool:
        """Return True if the first answer word is there and stays what it is whatever is written behind it."""
        return self.find(text) in self.final

    def same(self, prediction: str, label: str) -> bool:
        """Return True if the words are equal."""
        return prediction == label


class LastNumber:
    """Finds the last number in a text, as the published evaluator of the math suites does: commas are taken out first.

    It is right within 0.001. It is known only when nothing more is written, so no row ends early.
    """

    TOLERANCE = 0.001

    def __str__(self) -> str:
        return f"last number, within {self.TOLERANCE}"

    def find(self, text: str) -> str:
        """Return the last number as it is written, or nothing."""
        found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
        return str(found[-1]) if found else ""

    def is_final(self, text: str) -> bool:
        """Return False: a further number may follow."""
        return False

    def same(self, prediction: str, label: str) -> bool:
        """Return True if the numbers are equal within the tolerance."""
        return bool(prediction) and abs(float(prediction) - float(label)) <= self.TOLERANCE
