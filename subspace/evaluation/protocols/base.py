"""What every protocol has in common, and what those have that score choices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, Self

from subspace.data.items import Item
from subspace.data.tasks import Task, render
from subspace.evaluation.choice_scoring import Choices
from subspace.evaluation.records import ItemRecord
from subspace.evaluation.results import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from subspace.data.samples import Sample
    from subspace.evaluation.config import EvaluateConfig


class Scorer(Protocol):
    """A protocol with the items of a task, ready to be scored.

    Attributes:
        name: the protocol's.
        metrics: the one that is usually reported first.
        writes: whether the model writes tokens, one by one.
        sizes: for each item how many rows it is in a batch, and how many tokens the longest of them has at most.
        truncated: how many items lost their beginning, because the model does not read as much.
    """

    name: str
    metrics: tuple[str, ...]
    writes: bool
    sizes: list[tuple[int, int]]
    truncated: int

    @property
    def fingerprint_fields(self) -> dict[str, str]:
        """What the protocol's numbers depend on besides task, items and tokenizer."""

    def shared_prefix(self, model: Any) -> AbstractContextManager[None]:
        """Read what all items begin with, once for the batches scored inside, where the model stays as it is."""

    def score(self, model: Any, batch: Sequence[int]) -> list[ItemRecord]:
        """Score the items of these numbers together; return the record of each."""


class ProtocolScorer(ABC):
    """Base of the protocols. ``version`` is raised when the same items would get other scores."""

    name: str
    version: str = "1"
    metrics: tuple[str, ...] = ("acc",)
    writes: bool
    sizes: list[tuple[int, int]]
    truncated: int

    @classmethod
    @abstractmethod
    def build(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, config: EvaluateConfig
    ) -> Self:
        """Lay out the items of a task as a configuration wants them."""

    @property
    @abstractmethod
    def template_texts(self) -> list[str]:
        """The templates that the prompts are made from."""

    @property
    @abstractmethod
    def decoding(self) -> str:
        """How an answer is got out of the model, in words."""

    @property
    def fingerprint_fields(self) -> dict[str, str]:
        """What the protocol's numbers depend on besides task, items and tokenizer."""
        return {
            "protocol": f"{self.name} {self.version}",
            "template": digest(self.template_texts),
            "decoding": self.decoding,
        }

    def shared_prefix(self, model: Any) -> AbstractContextManager[None]:
        """Read nothing ahead."""
        return nullcontext()

    @abstractmethod
    def score(self, model: Any, batch: Sequence[int]) -> list[ItemRecord]:
        """Score the items of these numbers together; return the record of each."""


class ChoiceScorer(ProtocolScorer):
    """Base of the protocols that score the choices of an item by their log-probability. Nothing is written."""

    writes = False

    def __init__(self, model: Any, choices: Sequence[Sequence[tuple[list[int], int]]]) -> None:
        """Lay out the items' choices, each as its token ids and how many of them are the context's."""
        self.choices = Choices(model, choices)
        self.truncated, self.sizes = self.choices.truncated, self.choices.sizes

    def score(self, model: Any, batch: Sequence[int]) -> list[ItemRecord]:
        """Score the items of these numbers together, in one forward pass; return the record of each."""
        found = self.choices.scores(model, batch)
        return [self.record(number, scores) for number, scores in zip(batch, found, strict=True)]

    @abstractmethod
    def record(self, number: int, scores: list[float]) -> ItemRecord:
        """Return the record of an item whose choices have these scores."""


def render_prompts(template: str, task: Task, items: Sequence[Item]) -> list[str]:
    """Return the prompt of each item: its instruction in a template of ``data/prompts.yaml``."""
    return [render(template, {"instruction": task.instruction(item), "input": ""}) for item in items]
