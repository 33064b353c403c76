"""Overlap between test items and training text, by definitions that are printed with the counts.

The number of test items "in the training data" means nothing without a definition. What is compared is the text of an
item that training shows: its question, with its topic and context where the prompt has them, and its choices, without
the words of the template. All texts are hashed to 64 bits, and training text is read once, in chunks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from subspace.common.hashing import hash_texts
from subspace.data.items import Item, make_item
from subspace.data.tasks import Task

NGRAM = 13
KINDS = ("exact", "normalised", "question", "n-gram")

_FIELDS: tuple[Literal["topic", "context", "question"], ...] = ("topic", "context", "question")
_SIGNS = {"+": "plus", "-": "minus", "*": "times", "/": "over"}
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication modulo 2^64 is invertible
_WORDS_KEPT = 1_000_000


def definitions(ngram: int = NGRAM) -> dict[str, str]:
    """Return the definition of each kind of match."""
    return {
        "exact": "question and choices, in their order, are a training row's, character for character",
        "normalised": "the same by letters and digits in lower case, whatever the order of the choices; tags as "
        "[title] left out",
        "question": "the question alone is a training row's, normalised; the choices may differ",
        "n-gram": f"any {ngram} words in a row, normalised, of question and choices occur in a row's",
        "too short": f"items of fewer than {ngram} words, which cannot have an n-gram match",
    }


class Text(NamedTuple):
    """Compared text of an item or a row."""

    question: str
    choices: tuple[str, ...] = ()


def question_text(task: Task) -> Callable[[Item], Text]:
    """Return a function from an item to the text of it that the task's training prompt shows."""
    # Rendering an item whose texts are markers shows which of them the prompt contains.
    texts = {"topic": "<topic>", "context": "<context>", "question": "<question>"}
    marked = make_item({**texts, "choices": ["<choice>"] * 26, "label": 0})
    prompt = task.instruction(marked)
    fields, choices = [name for name in _FIELDS if marked[name] in prompt], "<choice>" in prompt

    def text(item: Item) -> Text:
        return Text("\n".join(item[name] for name in fields), tuple(item["choices"]) if choices else ())

    return text


class TextKeys(NamedTuple):
    """Hashes of a text, one for each definition: equal if two texts match by it."""

    exact: int
    normalised: int
    question: int


def text_keys(text: Text) -> TextKeys:
    """Return a text's hashes."""
    question = _squeezed(text.question)
    choices = sorted(map(_squeezed, text.choices))
    return TextKeys(hash_texts(text.question, *text.choices), hash_texts(question, *choices), hash_texts(question))


class Matcher:
    """Search for items in training text: ``found[kind][i]`` names the first row that matches item i."""

    def __init__(self, items: Sequence[Text], ngram: int = NGRAM, prompts: Sequence[Text] | None = None) -> None:
        """Index the items. ``prompts`` are their whole prompts, if training rows are known by their prompts only."""
        self.ngram = ngram
        self.found: dict[str, dict[int, str]] = {kind: {} for kind in KINDS}
        self._words: dict[str, int] = {}
        self._keys: dict[str, dict[int, list[int]]] = {kind: {} for kind in KINDS[:3]}
        for number, text in enumerate(prompts or items):
            for kind, key in text_keys(text)._asdict().items():
                self._keys[kind].setdefault(key, []).append(number)
        grams, owners = self._grams(items)
        self.too_short = set(range(len(items))) - set(owners.tolist())
        order = np.argsort(grams, kind="stable")
        self._sorted, self._owners = grams[order], owners[order]

    def read(self, rows: Sequence[Text], names: Sequence[str]) -> list[TextKeys]:
        """Search these rows for the items; return the hashes of the rows."""
        hashes = [text_keys(row) for row in rows]
        for key, name in zip(hashes, names, strict=True):
            for kind, value in key._asdict().items():
                for item in self._keys[kind].get(value, ()):
                    self.found[kind].setdefault(item, name)
        grams, owners = self._grams(rows)
        begin, end = (np.searchsorted(self._sorted, grams, side) for side in ("left", "right"))
        for at in np.flatnonzero(end > begin):
            for item in self._owners[begin[at] : end[at]].tolist():
                self.found["n-gram"].setdefault(item, names[owners[at]])
        return hashes

    def _grams(self, texts: Sequence[Text]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
        """Return the hashes of all n-grams, and the index of the text that each belongs to."""
        if len(self._words) > _WORDS_KEPT:
            self._words.clear()
        counts, codes = [], []
        for text in texts:
            words = _words(" ".join([text.question, *text.choices]))
            codes += [self._words.get(word) or self._words.setdefault(word, hash_texts(word)) for word in words]
            counts.append(len(words))
        code = np.array(codes, dtype=np.uint64)
        owner = np.repeat(np.arange(len(texts), dtype=np.int32), counts)
        size = max(0, len(code) - self.ngram + 1)
        grams = np.zeros(size, dtype=np.uint64)
        for k in range(self.ngram):  # Horner's rule modulo 2^64, for all n-grams at once
            grams = grams * _BASE + code[k : k + size]
        within = owner[:size] == owner[self.ngram - 1 : self.ngram - 1 + size]
        return grams[within], owner[:size][within]


def count_duplicates(hashes: Iterable[int]) -> int:
    """Return the number of duplicates."""
    seen: set[int] = set()
    count = 0
    for value in hashes:
        count += value in seen
        seen.add(value)
    return count


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", re.sub(r"\[\w+\]", " ", text.lower()))


def _squeezed(text: str) -> str:
    # "58 * 160" and "58 - 160" are different questions; between other words a sign is punctuation.
    return "".join(_words(re.sub(r"(?<=\d) ([-+*/]) (?=-?\d)", lambda sign: f" {_SIGNS[sign[1]]} ", text)))
