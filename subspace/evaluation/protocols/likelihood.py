"""Part of likelihood."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import nn

from subspace.data.items import ITEM_FIELDS, Item
from subspace.data.tasks import Task
from subspace.data.tokenization import encode_pairs
from subspace.errors import UserError
from subspace.evaluation.results import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from subspace.evaluation.choice_scoring import Choices

VERSION = "1"
EXAMPLES_SEED = 1234  # the harness's


class Likelihood:
    """The items of a task, ready to be scored by this protocol."""

    name = "likelihood"
    writes = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        items: Sequence[Item],
        *,
        examples: Sequence[Sequence[Item]] = (),
        by_bytes: bool = False,
    ) -> None:
        if not task.likelihood.metrics:
            raise UserError(
                f"protocol {self.name} was asked for {task.name}, which is not declared for it. "
                "Use evaluate.protocol=llm-adapters, or add 'likelihood:' to its file"
            )
        self.task, self.items = task, items
        self.metrics: tuple[str, ...] = (*task.likelihood.metrics, *(["acc_bytes"] if by_bytes else []))
        self.num_examples = len(examples[0]) if examples else 0
        requests = [task.likelihood.requests(item) for item in items]
        if examples:
            begins = ["".join(map(self._example, several)) for several in examples]
            requests = [
                [(begin + context, choice) for context, choice in pairs]
                for begin, pairs in zip(begins, requests, strict=True)
            ]
        self.requests = requests
        self.prompts = [digest(pairs) for pairs in requests]
        encoded = iter(encode_pairs(tokenizer, [pair for pairs in requests for pair in pairs]))
        choices = [list(islice(encoded, len(pairs))) for pairs in requests]

        self.choices = Choices(model, choices)
        self.truncated, self.sizes = self.choices.truncated, self.choices.sizes

    @property
    def ingredients(self) -> dict[str, str]:
        """What this protocol's numbers depend on besides task, items and tokenizer."""
        return {
            "protocol": f"{self.name} {VERSION}",
            "template": digest([self.task.likelihood.context, self.task.likelihood.choice]),
            "decoding": "none: log-probabilities of the choices",
            **({"examples": f"{self.num_examples} of train, seed {EXAMPLES_SEED}"} if self.num_examples else {}),
        }

    def _example(self, item: Item) -> str:
        """Return an item with its right answer, to stand before a question."""
        return f"{''.join(self.task.likelihood.requests(item)[item['label']])}\n\n"

    def score(self, model: nn.Module, batch: Sequence[int]) -> list[dict[str, Any]]:
        """Score the items of these numbers together, in one forward pass; return the record of each."""
        found = self.choices.scores(model, batch)
        return [self._record(number, scores) for number, scores in zip(batch, found, strict=True)]

    def _record(self, number: int, scores: list[float]) -> dict[str, Any]:
        item = self.items[number]
        characters = self.task.likelihood.normalizers(item)
        # Without a character a choice cannot win by acc_norm: the harness divides by zero, which gives minus infinity.
        per_character = [score / n if n else -math.inf for score, n in zip(scores, characters, strict=True)]
        by_metric = {"acc": scores, "acc_norm": per_character}
        if "acc_bytes" in self.metrics:
            lengths = self.task.likelihood.normalizers(item, by_bytes=True)
            by_metric["acc_bytes"] = [score / n if n else -math.inf for score, n in zip(scores, lengths, strict=True)]
        prediction = {metric: by_metric[metric].index(max(by_metric[metric])) for metric in self.metrics}
        return {
            "id": item["id"],
            "prompt": self.prompts[number],
            "scores": scores,
            "characters": characters,
            "prediction": prediction,
            "label": item["label"],
            "correct": {metric: choice == item["label"] for metric, choice in prediction.items()},
        }


def draw_examples(
    pool: Sequence[Item], items: Sequence[Item], positions: Sequence[int], count: int, *, own_test_split: bool
) -> list[list[Item]]:
    """Return the examples that the harness, in one process, puts before these items of a split.

    Args:
        pool: the items to draw from.
        items: those that are asked.
        positions: where each of them stands in its split.
        count: how many examples each has.
        own_test_split: whether the task has a test split with labels. Where it has none, the harness draws one example
            more, leaves out what equals the item itself, and takes the first ``count``.
    """
    draw, more = random.Random(EXAMPLES_SEED), 0 if own_test_split else 1
    drawn = [draw.sample(range(len(pool)), count + more) for _ in range(max(positions) + 1)]

    def text(item: Item) -> list[Any]:
        return [item[field] for field in ITEM_FIELDS if field != "id"]

    found = []
    for item, position in zip(items, positions, strict=True):
        examples = [pool[number] for number in drawn[position]]
        found.append([one for one in examples if own_test_split or text(one) != text(item)][:count])
    return found
