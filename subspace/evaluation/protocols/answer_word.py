"""Protocol ``answer-word``: the prompt of ``llm-adapters``, answered by the most probable of the item's answers.

Nothing is generated. Each answer that the model was trained to give ("the correct answer is answer3") is scored by its
log-probability after the prompt, and the most probable counts. The answers of an item share a prefix, so this takes one
row an item and one forward pass a batch, and it works under ZeRO-3. There is always an answer: a model that has not
learnt the form of the answer may score better here than where it has to generate it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from torch import nn

from subspace.data.items import Item, relabel
from subspace.data.tasks import Task, prompt_template
from subspace.data.tokenization import encode_rows
from subspace.errors import UserError
from subspace.evaluation.config import ANSWER_WORD, LLM_ADAPTERS
from subspace.evaluation.protocols.base import ChoiceScorer, render_prompts
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
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, items: Sequence[Item], prompt_name: str
    ) -> None:
        if task.extraction != "first-word":
            raise UserError(
                f"protocol {self.name} was asked for {task.name}, whose answers are not words from a fixed list. "
                f"Use evaluate.protocol={LLM_ADAPTERS}"
            )
        self.task, self.items, self.template = task, items, prompt_template(prompt_name)
        texts = render_prompts(self.template, task, items)
        self.hashes = [digest(text) for text in texts]
        # Each item with every label in turn as the right one.
        possible = [[relabel(item, label) for label in range(len(item["choices"]))] for item in items]
        self.words = [[task.answer(item) for item in variants] for variants in possible]
        outputs = [[task.output(item) for item in variants] for variants in possible]
        pairs = [(text, output) for text, answers in zip(texts, outputs, strict=True) for output in answers]
        encoded = iter(encode_rows(tokenizer, pairs))
        super().__init__(model, [[next(encoded) for _ in answers] for answers in outputs])

    @classmethod
    def build(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, config: EvaluateConfig
    ) -> Self:
        """Return a scorer of a task's items with these evaluation settings."""
        return cls(model, tokenizer, sample.task, sample.items, config.prompt)

    @property
    def template_texts(self) -> list[str]:
        """The templates of the prompts and the answers."""
        task = self.task
        return [self.template, task.instruction_template, task.answer_template, task.output_template]

    @property
    def decoding(self) -> str:
        """Description of how the model is queried for an answer, for the fingerprint."""
        return "none: log-probabilities of the answers"

    def record(self, number: int, scores: list[float]) -> ItemRecord:
        """Return the record of an item whose answers have these scores."""
        item, words = self.items[number], self.words[number]
        prediction, label = words[scores.index(max(scores))], words[item["label"]]
        return make_record(
            item, self.hashes[number], {"scores": scores}, prediction, label, {"acc": prediction == label}
        )
