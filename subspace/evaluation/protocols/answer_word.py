"""Protocol ``answer-word``: the prompt of ``llm-adapters``, answered by the most probable of the item's answers.

Nothing is generated. Each answer that the model was trained to give ("the correct answer is answer3") is scored by its
log-probability after the prompt, and the most probable counts. The answers of an item share a prefix, so this takes one
row an item and one forward pass a batch, and it works under ZeRO-3. There is always an answer: a model that has not
learnt the form of the answer may score better here than where it has to generate it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from torch import nn

from subspace.data.items import Item, relabel
from subspace.data.tasks import Task
from subspace.errors import UserError
from subspace.evaluation.config import ANSWER_WORD, LLM_ADAPTERS
from subspace.evaluation.protocols.base import ChoiceScorer
from subspace.evaluation.protocols.prompts import open_prompts
from subspace.evaluation.records import ItemRecord, make_record
from subspace.evaluation.results import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from subspace.data.samples import Sample
    from subspace.evaluation.config import EvaluateConfig


class AnswerWord(ChoiceScorer):
    """Items of a task, encoded for the protocol ``answer-word``."""

    name = ANSWER_WORD

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        items: Sequence[Item],
        prompt_name: str,
        *,
        chat: bool = False,
    ) -> None:
        if task.extraction != "first-word":
            raise UserError(
                f"protocol {self.name} was asked for {task.name}, whose answers are not words from a fixed list. "
                f"Use evaluate.protocol={LLM_ADAPTERS}"
            )
        self.task, self.items, self.prompting = (
            task,
            items,
            open_prompts(tokenizer, prompt_name, chat=chat, writes=False),
        )
        texts = [self.prompting.text(task.instruction(item)) for item in items]
        self.hashes = [digest(text) for text in texts]
        # Each item with every label in turn as the right one.
        possible = [[relabel(item, label) for label in range(len(item["choices"]))] for item in items]
        self.words = [[task.answer(item) for item in variants] for variants in possible]
        outputs = [[task.output(item) for item in variants] for variants in possible]
        pairs = [(text, output) for text, answers in zip(texts, outputs, strict=True) for output in answers]
        encoded = iter(self.prompting.encode_rows(pairs))
        choices = [[next(encoded) for _ in answers] for answers in outputs]
        # "answer1" is the beginning of "answer10", and would be the more probable one always: there their ends count.
        self.ended = [tokenizer.eos_token_id is not None and _is_one_a_beginning(rows) for rows in choices]
        for rows, ended in zip(choices, self.ended, strict=True):
            if ended:
                rows[:] = [([*ids, int(tokenizer.eos_token_id)], start) for ids, start in rows]
        super().__init__(model, choices)

    @classmethod
    def build(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, config: EvaluateConfig
    ) -> Self:
        """Return a scorer of a task's items with these evaluation settings."""
        return cls(model, tokenizer, sample.task, sample.items, config.prompt, chat=config.chat_template)

    @property
    def template_texts(self) -> list[str]:
        """The templates of the prompts and the answers."""
        task = self.task
        return [self.prompting.template, task.instruction_template, task.answer_template, task.output_template]

    @property
    def decoding(self) -> str:
        """Description of how the model is queried for an answer, for the fingerprint."""
        ends = ", with their ends where one begins another" if any(self.ended) else ""
        return f"none: log-probabilities of the answers{ends}"

    @property
    def fingerprint_fields(self) -> dict[str, str]:
        """Inputs that the protocol's scores depend on besides task, items and tokenizer."""
        return super().fingerprint_fields | self.prompting.fingerprint_fields

    def record(self, number: int, scores: list[float]) -> ItemRecord:
        """Return the record of an item whose answers have these scores."""
        item, words = self.items[number], self.words[number]
        prediction, label = words[scores.index(max(scores))], words[item["label"]]
        return make_record(
            item, self.hashes[number], {"scores": scores}, prediction, label, {"acc": prediction == label}
        )


def _is_one_a_beginning(rows: Sequence[tuple[list[int], int]]) -> bool:
    """Return True if an answer's ids are the beginning of another answer's."""
    answers = [tuple(ids[start:]) for ids, start in rows]
    return any(long[: len(short)] == short for short, long in itertools.permutations(set(answers), 2))
