"""Base classes of the scoring protocols."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, Self

from subspace.evaluation.choice_scoring import Choices
from subspace.evaluation.records import ItemRecord
from subspace.evaluation.results import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from subspace.data.samples import Sample
    from subspace.evaluation.config import EvaluateConfig


class Scorer(Protocol):
    """Interface of a protocol with the encoded items of a task.

    Attributes:
        name: the protocol's name.
        metrics: names of the metrics; the first is the one that is usually reported.
        writes: whether the model generates tokens one by one.
        sizes: for each item the number of its rows in a batch, and the maximum number of tokens of the longest.
        truncated: the number of items that lost their beginning because they exceed the model's window.
    """

    name: str
    metrics: tuple[str, ...]
    writes: bool
    sizes: list[tuple[int, int]]
    truncated: int

    @property
    def fingerprint_fields(self) -> dict[str, str]:
        """Inputs that the protocol's scores depend on besides task, items and tokenizer."""

    def shared_prefix(self, model: Any) -> AbstractContextManager[None]:
        """Prefill the common prefix of all items for the batches scored inside; the model must not change there."""

    def score(self, model: Any, batch: Sequence[int]) -> list[ItemRecord]:
        """Return the record of each of the items with these numbers, scored as one batch."""


class ProtocolScorer(ABC):
    """Base class of the protocols. ``version`` is raised when scores of the same items change."""

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
        """Return a scorer of a task's items with these evaluation settings."""

    @property
    @abstractmethod
    def template_texts(self) -> list[str]:
        """The templates of the prompts."""

    @property
    @abstractmethod
    def decoding(self) -> str:
        """Description of how the model is queried for an answer, for the fingerprint."""

    @property
    def fingerprint_fields(self) -> dict[str, str]:
        """Inputs that the protocol's scores depend on besides task, items and tokenizer."""
        return {
            "protocol": f"{self.name} {self.version}",
            "template": digest(self.template_texts),
            "decoding": self.decoding,
        }

    def shared_prefix(self, model: Any) -> AbstractContextManager[None]:
        """Prefill nothing."""
        return nullcontext()

    @abstractmethod
    def score(self, model: Any, batch: Sequence[int]) -> list[ItemRecord]:
        """Return the record of each of the items with these numbers, scored as one batch."""


class ChoiceScorer(ProtocolScorer):
    """Base class of the protocols that score an item's choices by log-probability, without generation."""

    writes = False

    def __init__(self, model: Any, choices: Sequence[Sequence[tuple[list[int], int]]]) -> None:
        """Encode the items' choices, each given as its token ids and the number of context tokens."""
        self.choices = Choices(model, choices)
        self.truncated, self.sizes = self.choices.truncated, self.choices.sizes

    def score(self, model: Any, batch: Sequence[int]) -> list[ItemRecord]:
        """Return the record of each of the items with these numbers, scored by one forward pass."""
        all_scores = self.choices.scores(model, batch)
        return [self.record(number, scores) for number, scores in zip(batch, all_scores, strict=True)]

    @abstractmethod
    def record(self, number: int, scores: list[float]) -> ItemRecord:
        """Return the record of an item whose choices have these scores."""
