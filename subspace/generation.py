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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from subspace.declarations import Item, Task, prompt, render
from subspace.distributed import sum_over_ranks
from subspace.encoding import encode_prompt
from subspace.results import digest
from subspace.zero import passes_together

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

    def score(self, model: nn.Module, batch: Sequence[int]) -> list[dict[str, Any]]:
        """Let the model answer the items of these numbers together; return the record of each."""
        prompts = [self.prompts[number] for number in batch]
        mixed = len(set(batch)) < len(batch)  # an item has a row for each of several subjects
        written = decode_greedily(model, prompts, self._finished, self.task.max_new_tokens, drop=not mixed)
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


def decode_greedily(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    finished: Callable[[list[int]], bool],
    max_new_tokens: int,
    *,
    drop: bool = True,
) -> list[list[int]]:
    """Return what the model writes after each prompt. The prompts are one batch, padded on the left.

    Under ZeRO-3 every process makes as many passes as the one that has most to write.

    Args:
        model: the model.
        prompts: token ids.
        finished: tells by what a row has written, the last token included, whether to go on with it.
        max_new_tokens: where a row ends at the latest.
        drop: whether rows that are finished leave the batch. Where they are several subjects', all stay to the end.
    """
    device = next(model.parameters()).device
    length = max(map(len, prompts))
    padding = [length - len(prompt) for prompt in prompts]
    inputs = torch.tensor(
        [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)], device=device
    )
    mask = torch.tensor([[0] * pad + [1] * (length - pad) for pad in padding], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache: Any = None
    written: list[list[int]] = [[] for _ in prompts]
    rows, over = list(range(len(prompts))), set[int]()
    together = passes_together(model)

    for _ in range(max_new_tokens):
        out = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        tokens = out.logits[:, -1].argmax(-1)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row not in over:
                written[row].append(token)
                if finished(written[row]):
                    over.add(row)

        going_on = [i for i, row in enumerate(rows) if row not in over]
        left = len(going_on) if not together else int(sum_over_ranks(torch.tensor(len(going_on), device=device)))
        if not left:
            break
        if drop and 0 < len(going_on) < len(rows):
            rows = [rows[i] for i in going_on]
            kept = torch.tensor(going_on, device=device)
            tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
            cache.batch_select_indices(kept)
        inputs = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return written
