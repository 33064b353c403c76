"""Protocol ``answer-word``: the prompt of ``llm-adapters``, answered by the likeliest of the item's answers.

Nothing is written. Each answer that the model was trained to give ("the correct answer is answer3") is scored by its
log-probability after the prompt, and the likeliest counts. The answers of an item share their beginning, so this is one
row of tokens an item and one forward pass a batch, and it works under ZeRO-3. There is always an answer: a model that
does not know the form of one may do better here than where it has to write.
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
    """The items of a task, ready to be scored by this protocol."""

    name = ANSWER_WORD

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, items: Sequence[Item], prompt_name: str
    ) -> None:
        if task.extraction != "first-word":
            raise UserError(
                f"protocol {self.name} was asked for {task.name}, whose answers are no words of a short list. "
                f"Use evaluate.protocol={LLM_ADAPTERS}"
            )
        self.task, self.items, self.template = task, items, prompt_template(prompt_name)
        texts = render_prompts(self.template, task, items)
        self.hashes = [digest(text) for text in texts]
        # The right answer in the place of every label in turn.
        possible = [[relabel(item, label) for label in range(len(item["choices"]))] for item in items]
        self.words = [[task.answer(item) for item in several] for several in possible]
        outputs = [[task.output(item) for item in several] for several in possible]
        pairs = [(text, output) for text, several in zip(texts, outputs, strict=True) for output in several]
        encoded = iter(encode_rows(tokenizer, pairs))
        super().__init__(model, [[next(encoded) for _ in several] for several in outputs])

    @classmethod
    def build(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, config: EvaluateConfig
    ) -> Self:
        """Lay out the items of a task as a configuration wants them."""
        return cls(model, tokenizer, sample.task, sample.items, config.prompt)

    @property
    def template_texts(self) -> list[str]:
        """The templates that the prompts and the answers are made from."""
        task = self.task
        return [self.template, task.instruction_template, task.answer_template, task.output_template]

    @property
    def decoding(self) -> str:
        """How an answer is got out of the model, in words."""
        return "none: log-probabilities of the answers"

    def record(self, number: int, scores: list[float]) -> ItemRecord:
        """Return the record of an item whose answers have these scores."""
        item, words = self.items[number], self.words[number]
        prediction, label = words[scores.index(max(scores))], words[item["label"]]
        return make_record(
            item, self.hashes[number], {"scores": scores}, prediction, label, {"acc": prediction == label}
        )
