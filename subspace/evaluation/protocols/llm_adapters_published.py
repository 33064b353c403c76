"""Protocol ``llm-adapters-published``: the published evaluator, with each of its defects as a switch.

Beam search with four beams and 32 new tokens; temperature and top-p are set but have no effect. The answer is the first
answer word of the text between the first and the second "### Response:". The protocol is slow, and exists to reproduce
published numbers from published checkpoints; ``llm-adapters`` is the same protocol without the defects.

Source: AGI-Edgerunners/LLM-Adapters, commonsense_evaluate.py and evaluate.py. NVlabs/DoRA and
Chongjie-Si/Subspace-Tuning run the former with the change that ``last_response`` names, on weights merged in float16
(here: ``subspace merge --dtype float16``, and score that folder). All of them run it one prompt at a time, where
``no_attention_mask`` and ``pad_is_zero`` have no effect, so these are off by default. Batching here never changes the
results: the padding of the published evaluator's batches is added to each prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from subspace.common.random_state import seeded
from subspace.data.items import Item
from subspace.data.tasks import Task, prompt_template
from subspace.distributed.zero import requires_synchronized_forward
from subspace.evaluation.answer_extraction import answer_record, extractor
from subspace.evaluation.config import DEFAULT_DEFECTS, LLM_ADAPTERS_PUBLISHED
from subspace.evaluation.finite import NonFiniteOutput
from subspace.evaluation.protocols.base import ProtocolScorer
from subspace.evaluation.protocols.llm_adapters import end_tokens
from subspace.evaluation.protocols.prompts import TemplatePrompts
from subspace.evaluation.records import ItemRecord
from subspace.evaluation.results import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from subspace.data.samples import Sample
    from subspace.evaluation.config import EvaluateConfig

NUM_BEAMS = 4
MARKER = "### Response:"


class LLMAdaptersPublished(ProtocolScorer):
    """Items of a task, encoded for the protocol ``llm-adapters-published``."""

    name = LLM_ADAPTERS_PUBLISHED
    writes = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        items: Sequence[Item],
        defects: Sequence[str] = DEFAULT_DEFECTS,
        *,
        batch: int = 1,
    ) -> None:
        self.tokenizer, self.task, self.items, self.defects = tokenizer, task, items, sorted(defects)
        self.extractor = extractor(task, items)
        unequal = "unequal_prompts" in defects
        self.template = prompt_template("alpaca-indented-scoring" if unequal else "alpaca-indented")
        prompts = TemplatePrompts(tokenizer, self.template)
        self.texts = [prompts.text(task.instruction(item)) for item in items]
        self.hashes = [digest(text) for text in self.texts]
        # The published evaluator encodes the text with its trailing white space.
        encode: Any = tokenizer
        self.prompts: list[list[int]] = [
            encode(text)["input_ids"] if unequal else prompts.encode(text) for text in self.texts
        ]
        self.pad = 0 if "pad_is_zero" in defects else tokenizer.pad_token_id or 0
        self.batch = batch if "no_attention_mask" in defects else 1
        # The other prompts of a published batch affect a prompt only by its padding, which is attended to.
        for first in range(0, len(items), self.batch):
            longest = max(map(len, self.prompts[first : first + self.batch]))
            for number in range(first, min(first + self.batch, len(items))):
                self.prompts[number] = [self.pad] * (longest - len(self.prompts[number])) + self.prompts[number]
        self.ends = sorted(end_tokens(model, tokenizer))
        self.truncated = 0
        # One row a beam.
        self.sizes = [(NUM_BEAMS, len(ids) + task.max_new_tokens) for ids in self.prompts]

    @classmethod
    def build(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, config: EvaluateConfig
    ) -> Self:
        """Return a scorer of a task's items with these evaluation settings."""
        return cls(model, tokenizer, sample.task, sample.items, config.defect_names, batch=config.published_batch)

    @property
    def template_texts(self) -> list[str]:
        """The templates of the prompts and the right answers."""
        return [self.template, self.task.instruction_template, self.task.answer_template]

    @property
    def decoding(self) -> str:
        """Description of how the model is queried for an answer, for the fingerprint."""
        search = f"{NUM_BEAMS} beams, {self.task.max_new_tokens} tokens, {self.extractor}"
        return f"{search}; defects: {', '.join(self.defects) or 'none'}; batches of {self.batch}"

    def score(self, model: Any, batch: Sequence[int]) -> list[ItemRecord]:
        """Return the record of each of the items with these numbers, answered as one batch."""
        prompts = [self.prompts[number] for number in batch]
        length = max(map(len, prompts))
        device = next(model.parameters()).device
        inputs = torch.tensor([[self.pad] * (length - len(ids)) + ids for ids in prompts], device=device)
        mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        settings = type(model.generation_config)(
            num_beams=NUM_BEAMS,
            do_sample=False,
            max_new_tokens=self.task.max_new_tokens,
            pad_token_id=self.pad,
            eos_token_id=self.ends,
        )
        with _dropout(model, [self.hashes[number] for number in batch], active="dropout_active" in self.defects):
            written = model.generate(
                inputs,
                attention_mask=mask,
                generation_config=settings,
                synced_gpus=requires_synchronized_forward(model),
                logits_processor=[_require_finite],
            )
        return [self._record(number, row[length:].tolist()) for number, row in zip(batch, written, strict=True)]

    def _record(self, number: int, tokens: list[int]) -> ItemRecord:
        # The decoded text includes the prompt, so a marker in an instruction counts too, as published.
        text = str(self.tokenizer.decode([*self.prompts[number], *tokens], skip_special_tokens=True))
        parts = text.split(MARKER)
        answer = parts[-1 if "last_response" in self.defects else 1].strip()
        return answer_record(self.extractor, self.task, self.items[number], self.hashes[number], answer)


def _require_finite(_: Tensor, scores: Tensor) -> Tensor:
    """Raise NonFiniteOutput if the log-probabilities ``(items * beams, vocabulary)`` after a row are not finite."""
    broken = (~scores.amax(-1).isfinite()).nonzero()
    if len(broken):
        raise NonFiniteOutput(int(broken[0]) // NUM_BEAMS)
    return scores


@contextmanager
def _dropout(model: nn.Module, seed: Sequence[str], *, active: bool) -> Iterator[None]:
    """If active, put the model into training mode with a seed from the prompts, so that scores are reproducible."""
    if not active:
        yield
        return
    prompts = hashlib.sha256("".join(seed).encode()).digest()
    with seeded(int.from_bytes(prompts[:8], "little"), next(model.parameters()).device):
        model.train()
        try:
            yield
        finally:
            model.eval()
