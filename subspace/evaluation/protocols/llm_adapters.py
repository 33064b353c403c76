"""Protocol ``llm-adapters``: greedy generation from the training prompt; the first answer word generated counts.

It is the published LLM-Adapters protocol without its defects: the same prompt in training and scoring, an attention
mask, eval mode, and so an answer that does not depend on the rest of the batch. Text without an answer word is wrong.

Decoding is greedy, where the published evaluator uses a beam search with four beams, at four times the cost. A model
trained on one short form of answer is certain of every token but the one that decides, and both methods take the most
probable token there.

A row ends at its end token, after 32 tokens, or with its first answer word, since later text never counts. For the math
suites the model generates an explanation first, up to 256 tokens, and the last number counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from subspace.data.items import Item, relabel
from subspace.data.tasks import Task
from subspace.data.tokenization import common_prefix_length
from subspace.errors import UserError
from subspace.evaluation.answer_extraction import answer_record, extractor
from subspace.evaluation.config import LLM_ADAPTERS
from subspace.evaluation.greedy_decoding import SharedPrefix, decode_greedily, prefill_shared_prefix
from subspace.evaluation.protocols.base import ProtocolScorer
from subspace.evaluation.protocols.prompts import Prompts, open_prompts
from subspace.evaluation.records import ItemRecord
from subspace.evaluation.results import digest
from subspace.models.context import max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from subspace.data.samples import Sample
    from subspace.evaluation.config import EvaluateConfig


class LLMAdapters(ProtocolScorer):
    """Items of a task, encoded for the protocol ``llm-adapters``."""

    name = LLM_ADAPTERS
    writes = True

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
        self.tokenizer, self.task, self.items = tokenizer, task, items
        self.extractor = extractor(task, items)
        self.prompting = open_prompts(tokenizer, prompt_name, chat=chat, writes=True)
        texts = [self.prompting.text(task.instruction(item)) for item in items]
        self.hashes = [digest(text) for text in texts]
        self.ends = end_tokens(model, tokenizer)
        self.draft = answer_prefix_tokens(self.prompting, task, items[0]) if items else []
        self.prefix: SharedPrefix | None = None

        config: Any = model.config
        window = max_positions(config) - task.max_new_tokens
        if window < 1:
            raise UserError(
                f"{task.name} asks for answers of up to {task.max_new_tokens} tokens, but the model reads only "
                f"{max_positions(config)} at once, the question included. Make max_new_tokens of the task smaller"
            )
        encoded = [self.prompting.encode(text) for text in texts]
        self.truncated = sum(len(ids) > window for ids in encoded)
        self.prompts = [ids[-window:] for ids in encoded]
        self.sizes = [(1, len(ids) + task.max_new_tokens) for ids in self.prompts]

    @classmethod
    def build(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, config: EvaluateConfig
    ) -> Self:
        """Return a scorer of a task's items with these evaluation settings."""
        return cls(model, tokenizer, sample.task, sample.items, config.prompt, chat=config.chat_template)

    @property
    def template_texts(self) -> list[str]:
        """The templates of the prompts and the right answers."""
        return [self.prompting.template, self.task.instruction_template, self.task.answer_template]

    @property
    def decoding(self) -> str:
        """Description of how the model is queried for an answer, for the fingerprint."""
        return f"greedy, {self.task.max_new_tokens} tokens, {self.extractor}"

    @property
    def fingerprint_fields(self) -> dict[str, str]:
        """Inputs that the protocol's scores depend on besides task, items and tokenizer."""
        return super().fingerprint_fields | self.prompting.fingerprint_fields

    @contextmanager
    def shared_prefix(self, model: nn.Module) -> Iterator[None]:
        """Prefill the common prefix of all prompts for the batches scored inside; the model must not change there."""
        self.prefix = prefill_shared_prefix(model, self.prompts)
        try:
            yield
        finally:
            self.prefix = None

    def score(self, model: nn.Module, batch: Sequence[int]) -> list[ItemRecord]:
        """Return the record of each of the items with these numbers, answered as one batch."""
        prompts = [self.prompts[number] for number in batch]
        mixed = len(set(batch)) < len(batch)  # an item has a row for each of several subjects
        options: Any = {"prefix": self.prefix, "draft": self.draft, "fixed": mixed}
        written = decode_greedily(model, prompts, self._finished, self.task.max_new_tokens, **options)
        return [self._record(number, tokens) for number, tokens in zip(batch, written, strict=True)]

    def _finished(self, tokens: list[int]) -> bool:
        return tokens[-1] in self.ends or self.extractor.is_final(self._text(tokens))

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _record(self, number: int, tokens: list[int]) -> ItemRecord:
        return answer_record(self.extractor, self.task, self.items[number], self.hashes[number], self._text(tokens))


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of the tokens that end an answer, the model's and the tokenizer's."""
    declared = model.generation_config.eos_token_id
    ids = declared if isinstance(declared, list) else [declared]
    return {token for token in (*ids, tokenizer.eos_token_id) if token is not None}


def answer_prefix_tokens(prompts: Prompts, task: Task, item: Item) -> list[int]:
    """Return the common token prefix of all answers that a model is trained to give for a task."""
    if task.extraction != "first-word":
        return []
    text = prompts.text(task.instruction(item))
    answers = [task.output(relabel(item, label)) for label in range(len(item["choices"]))]
    rows = prompts.encode_rows([(text, answer) for answer in answers])
    outputs = [ids[num_prompt:] for ids, num_prompt in rows]
    return outputs[0][: common_prefix_length(outputs)]
