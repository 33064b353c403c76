"""Protocol ``llm-adapters``: the model answers the prompt it was trained with; the first answer word it writes counts.

It is the published LLM-Adapters protocol without its defects: one prompt in training and in scoring, an attention mask,
eval mode, and so an answer that does not depend on what else is in the batch. Text without an answer word is wrong.

Decoding is greedy, where the published evaluator searches with four beams. That costs four times as much, and a model
that was trained on one short form of answer is sure of every token but the one that decides, and that one is the
likeliest either way.

A row ends at its end token, after 32 tokens, or with its first answer word, since what follows that never counts. The
math suites have an explanation written first, up to 256 tokens; there the last number counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from subspace.declarations import Item, Task, prompt, render
from subspace.decoding import Beginning, decode_greedily, read_beginning
from subspace.encoding import encode_prompt, encode_rows, num_alike
from subspace.results import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = "1"


def asked(template: str, task: Task, items: Sequence[Item]) -> list[str]:
    """Return the prompt of each item: its instruction in a template of ``data/prompts.yaml``."""
    return [render(template, {"instruction": task.instruction(item), "input": ""}) for item in items]


class Generation:
    """The items of a task, ready to be scored by this protocol."""

    name = "llm-adapters"
    metrics: tuple[str, ...] = ("acc",)
    writes = True

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, items: Sequence[Item], prompt_name: str
    ) -> None:
        self.tokenizer, self.task, self.items = tokenizer, task, items
        self.extractor = extractor(task)
        self.template = prompt(prompt_name)
        texts = asked(self.template, task, items)
        self.hashes = [digest(text) for text in texts]
        self.ends = end_tokens(model, tokenizer)
        self.draft = drafted(tokenizer, task, self.template, items[0]) if items else []
        self.beginning: Beginning | None = None

        config: Any = model.config
        window = config.max_position_embeddings - task.max_new_tokens
        encoded = [encode_prompt(tokenizer, text) for text in texts]
        self.truncated = sum(len(ids) > window for ids in encoded)
        self.prompts = [ids[-window:] for ids in encoded]
        # For each item how many rows it is in a batch, and how many tokens it comes to at most.
        self.sizes = [(1, len(ids) + task.max_new_tokens) for ids in self.prompts]

    @property
    def ingredients(self) -> dict[str, str]:
        """What this protocol's numbers depend on besides task, items and tokenizer."""
        return {
            "protocol": f"{self.name} {VERSION}",
            "template": digest([self.template, self.task.instruction_template, self.task.answer_template]),
            "decoding": f"greedy, {self.task.max_new_tokens} tokens, {self.extractor}",
        }

    @contextmanager
    def beginning_read(self, model: nn.Module) -> Iterator[None]:
        """Read what all prompts begin with, once for all batches scored inside, where the model stays as it is."""
        self.beginning = read_beginning(model, self.prompts)
        try:
            yield
        finally:
            self.beginning = None

    def score(self, model: nn.Module, batch: Sequence[int]) -> list[dict[str, Any]]:
        """Let the model answer the items of these numbers together; return the record of each."""
        prompts = [self.prompts[number] for number in batch]
        mixed = len(set(batch)) < len(batch)  # an item has a row for each of several subjects
        how: Any = {"beginning": self.beginning, "draft": self.draft, "fixed": mixed}
        written = decode_greedily(model, prompts, self._finished, self.task.max_new_tokens, **how)
        return [self._record(number, tokens) for number, tokens in zip(batch, written, strict=True)]

    def _finished(self, tokens: list[int]) -> bool:
        return tokens[-1] in self.ends or self.extractor.settled(self._text(tokens))

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _record(self, number: int, tokens: list[int]) -> dict[str, Any]:
        return answer_record(self.extractor, self.task, self.items[number], self.hashes[number], self._text(tokens))


def answer_record(extractor: Extractor, task: Task, item: Item, prompt_hash: str, text: str) -> dict[str, Any]:
    """Return the record of an item that a model answered with this text."""
    prediction, label = extractor.find(text), task.answer(item)
    return {
        "id": item["id"],
        "prompt": prompt_hash,
        "text": text,
        "prediction": prediction,
        "label": label,
        "correct": {"acc": extractor.same(prediction, label)},
    }


class Extractor(Protocol):
    """Finds an answer in a text; ``str()`` says how."""

    def find(self, text: str) -> str:
        """Return the answer, or nothing."""

    def settled(self, text: str) -> bool:
        """Tell whether the answer is there and stays what it is whatever is written behind it."""

    def same(self, prediction: str, label: str) -> bool:
        """Tell whether what was found is the right answer."""


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

    def settled(self, text: str) -> bool:
        """Tell whether the first answer word is there and stays what it is whatever is written behind it."""
        return self.find(text) in self.final

    def same(self, prediction: str, label: str) -> bool:
        """Tell whether the words are equal."""
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

    def settled(self, text: str) -> bool:
        """Tell that a further number may follow."""
        return False

    def same(self, prediction: str, label: str) -> bool:
        """Tell whether the numbers are equal within the tolerance."""
        return bool(prediction) and abs(float(prediction) - float(label)) <= self.TOLERANCE


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end an answer: the model's and the tokenizer's."""
    declared = model.generation_config.eos_token_id
    several = declared if isinstance(declared, list) else [declared]
    return {token for token in (*several, tokenizer.eos_token_id) if token is not None}


def drafted(tokenizer: PreTrainedTokenizerBase, task: Task, template: str, item: Item) -> list[int]:
    """Return the tokens that every answer a model was trained to give to a task begins with."""
    if task.extraction != "first-word":
        return []
    text = asked(template, task, [item])[0]
    answers = [task.output({**item, "label": label}) for label in range(len(item["choices"]))]
    rows = encode_rows(tokenizer, [(text, answer) for answer in answers])
    begun = [ids[num_prompt:] for ids, num_prompt in rows]
    return begun[0][: num_alike(begun)]
