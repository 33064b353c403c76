"""Protocol ``likelihood``: the choice with the highest log-likelihood given the context, as in lm-evaluation-harness.

``acc`` takes the choice with the highest log-probability, ``acc_norm`` that with the highest per character, and
``acc_bytes`` that with the highest per byte (lm_eval 0.4.13, api/task.py). ``choice_scoring.py`` explains the
computation, and why it is equivalent.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Self

from torch import nn

from subspace.data.contamination import Text, text_keys
from subspace.data.items import Item, item_content
from subspace.data.samples import split_items
from subspace.data.tasks import Task
from subspace.data.tokenization import encode_pairs
from subspace.errors import UserError
from subspace.evaluation.config import LIKELIHOOD, LLM_ADAPTERS
from subspace.evaluation.protocols.base import ChoiceScorer
from subspace.evaluation.protocols.prompts import ChatPrompts
from subspace.evaluation.records import Evidence, ItemRecord, make_record
from subspace.evaluation.results import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from subspace.data.samples import Sample
    from subspace.evaluation.config import EvaluateConfig

EXAMPLES_SEED = 1234  # the harness's


class Likelihood(ChoiceScorer):
    """Items of a task, encoded for the protocol ``likelihood``."""

    name = LIKELIHOOD

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        items: Sequence[Item],
        *,
        examples: Sequence[Sequence[Item]] = (),
        by_bytes: bool = False,
        chat: bool = False,
    ) -> None:
        if not task.likelihood.metrics:
            raise UserError(
                f"protocol {self.name} was asked for {task.name}, which is not declared for it. "
                f"Use evaluate.protocol={LLM_ADAPTERS}, or add 'likelihood:' to its file"
            )
        self.task, self.items = task, items
        self.metrics = tuple(dict.fromkeys((*task.likelihood.metrics, *(["acc_bytes"] if by_bytes else []))))
        self.num_examples = len(examples[0]) if examples else 0
        self.chat = ChatPrompts(tokenizer, writes=False) if chat else None
        # An assistant's turn does not begin with a space.
        requests = [task.likelihood.requests(item, "" if chat else None) for item in items]
        self.separators: list[str] = []  # where it is not a space, as of the declared tasks
        if task.likelihood.separator != " " and requests != [task.likelihood.requests(item, " ") for item in items]:
            self.separators = [task.likelihood.separator or "by the context"]
        if examples:
            prefixes = ["".join(map(self._example, shots)) for shots in examples]
            requests = [
                [(prefix + context, choice) for context, choice in pairs]
                for prefix, pairs in zip(prefixes, requests, strict=True)
            ]
        if self.chat:
            requests = [[(self.chat.text(context), choice) for context, choice in pairs] for pairs in requests]
        self.requests = requests
        self.prompts = [digest(pairs) for pairs in requests]
        flat = [pair for pairs in requests for pair in pairs]
        encoded = iter(self.chat.encode_rows(flat) if self.chat else encode_pairs(tokenizer, flat))
        super().__init__(model, [list(islice(encoded, len(pairs))) for pairs in requests])

    @classmethod
    def build(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, config: EvaluateConfig
    ) -> Self:
        """Return a scorer of a task's items with these evaluation settings."""
        examples: list[list[Item]] = []
        if config.examples:
            pool = split_items(sample.task, "train", config.data)
            has_test = sample.task.splits[config.split].official == "test"
            examples = draw_examples(
                pool, sample.items, sample.positions, config.examples, own_test_split=has_test,
                own=sample.task.folder is not None,
            )  # fmt: skip
        return cls(
            model, tokenizer, sample.task, sample.items, examples=examples, by_bytes=config.by_bytes,
            chat=config.chat_template,
        )  # fmt: skip

    @property
    def template_texts(self) -> list[str]:
        """The templates of contexts and choices."""
        return [self.task.likelihood.context, self.task.likelihood.choice, *self.separators]

    @property
    def decoding(self) -> str:
        """Description of how the model is queried for an answer, for the fingerprint."""
        return "none: log-probabilities of the choices"

    @property
    def fingerprint_fields(self) -> dict[str, str]:
        """Inputs that the protocol's scores depend on besides task, items and tokenizer."""
        examples = {"examples": f"{self.num_examples} of train, seed {EXAMPLES_SEED}"} if self.num_examples else {}
        return super().fingerprint_fields | examples | (self.chat.fingerprint_fields if self.chat else {})

    def _example(self, item: Item) -> str:
        """Return the text of an item with its right answer, as a few-shot example."""
        return f"{''.join(self.task.likelihood.requests(item)[item['label']])}\n\n"

    def record(self, number: int, scores: list[float]) -> ItemRecord:
        """Return the record of an item whose choices have these scores."""
        item = self.items[number]
        characters = self.task.likelihood.normalizers(item)
        # An empty choice cannot win by acc_norm: the harness divides by zero, which gives minus infinity.
        per_character = [score / n if n else -math.inf for score, n in zip(scores, characters, strict=True)]
        by_metric = {"acc": scores, "acc_norm": per_character}
        if "acc_bytes" in self.metrics:
            lengths = self.task.likelihood.normalizers(item, by_bytes=True)
            by_metric["acc_bytes"] = [score / n if n else -math.inf for score, n in zip(scores, lengths, strict=True)]
        prediction = {metric: by_metric[metric].index(max(by_metric[metric])) for metric in self.metrics}
        correct = {metric: choice == item["label"] for metric, choice in prediction.items()}
        evidence: Evidence = {"scores": scores, "characters": characters}
        return make_record(item, self.prompts[number], evidence, prediction, item["label"], correct)


def draw_examples(
    pool: Sequence[Item],
    items: Sequence[Item],
    positions: Sequence[int],
    count: int,
    *,
    own_test_split: bool,
    own: bool = False,
) -> list[list[Item]]:
    """Return for each item the few-shot examples that the harness, in one process, puts before it.

    Where that leaves fewer than ``count``, because the pool has an item several times, others are drawn in addition.

    Args:
        pool: the items to draw from.
        items: the items to be scored.
        positions: the index of each of them in its split.
        count: the number of examples for each item.
        own_test_split: whether the task has a test split with labels. If not, the harness draws one example more, drops
            any that equals the item itself, and takes the first ``count``.
        own: whether the files are a user's. Then an example neither is the item, whatever the order of its choices, nor
            is there twice.

    Raises:
        UserError: the pool has too few items.
    """
    draw, more = random.Random(EXAMPLES_SEED), 0 if own_test_split else 1
    # One generator for the split: the examples of an item depend on its index, not on which others are scored.
    size = min(count + more, len(pool))
    drawn = [draw.sample(range(len(pool)), size) for _ in range(max(positions) + 1)]

    def numbers(position: int) -> Iterator[int]:
        """Yield the harness's draw and then, by a generator of the item's own, the numbers of all in the pool."""
        yield from drawn[position]
        yield from random.Random(f"{EXAMPLES_SEED}-{position}").sample(range(len(pool)), len(pool))

    chosen = []
    for item, position in zip(items, positions, strict=True):
        examples: dict[int, Item] = {}
        for number in numbers(position):
            if len(examples) == count:
                break
            example = pool[number]
            if own:
                if _question_key(example) != _question_key(item):
                    examples.setdefault(_question_key(example), example)
            elif own_test_split or item_content(example) != item_content(item):
                examples.setdefault(number, example)
        if len(examples) < count:
            raise UserError(
                f"evaluate.examples={count} was asked for, but for item {item['id']} the train split has only "
                f"{len(examples)} different items besides itself"
            )
        chosen.append([*examples.values()])
    return chosen


def _question_key(item: Item) -> int:
    """Return a number that items have in common which ask for the same with the same choices, in any order."""
    return text_keys(
        Text("\n".join([item["topic"], item["context"], item["question"]]), tuple(item["choices"]))
    ).normalised
