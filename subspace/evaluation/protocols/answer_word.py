"""Protocol ``answer-word``: the prompt of ``llm-adapters``, answered by the likeliest of the item's answers.

Nothing is written. Each answer that the model was trained to give ("the correct answer is answer3") is scored by its
log-probability after the prompt, and the likeliest counts. The answers of an item share their beginning, so this is one
row of tokens an item and one forward pass a batch, and it works under ZeRO-3. There is always an answer: a model that
does not know the form of one may do better here than where it has to write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from subspace.data.items import Item, relabel
from subspace.data.tasks import Task, prompt_template
from subspace.data.tokenization import encode_rows
from subspace.errors import UserError
from subspace.evaluation.choice_scoring import Choices
from subspace.evaluation.protocols.llm_adapters import LLMAdapters, render_prompts
from subspace.evaluation.results import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


VERSION = "1"


class AnswerWord:
    """The items of a task, ready to be scored by this protocol."""

    name = "answer-word"
    metrics: tuple[str, ...] = ("acc",)
    writes = False

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, items: Sequence[Item], prompt_name: str
    ) -> None:
        if task.extraction != "first-word":
            raise UserError(
                f"protocol {self.name} was asked for {task.name}, whose answers are no words of a short list. "
                f"Use evaluate.protocol={LLMAdapters.name}"
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
        choices = [[next(encoded) for _ in several] for several in outputs]
        self.choices = Choices(model, choices)
        self.truncated, self.sizes = self.choices.truncated, self.choices.sizes

    @property
    def ingredients(self) -> dict[str, str]:
        """What this protocol's numbers depend on besides task, items and tokenizer."""
        task = self.task
        texts = [self.template, task.instruction_template, task.answer_template, task.output_template]
        return {
            "protocol": f"{self.name} {VERSION}",
            "template": digest(texts),
            "decoding": "none: log-probabilities of the answers",
        }

    def score(self, model: nn.Module, batch: Sequence[int]) -> list[dict[str, Any]]:
        """Score the items of these numbers together, in one forward pass; return the record of each."""
        found = self.choices.scores(model, batch)
        return [self._record(number, scores) for number, scores in zip(batch, found, strict=True)]

    def _record(self, number: int, scores: list[float]) -> dict[str, Any]:
        item, words = self.items[number], self.words[number]
        prediction = words[scores.index(max(scores))]
        return {
            "id": item["id"],
            "prompt": self.hashes[number],
            "scores": scores,
            "prediction": prediction,
            "label": words[item["label"]],
            "correct": {"acc": prediction == words[item["label"]]},
        }
