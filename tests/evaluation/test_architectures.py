"""Answers and scores of a batch are those of each text alone, in decoders of every kind, each tiny and random."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from subspace.evaluation.choice_scoring import Choices
from subspace.evaluation.greedy_decoding import decode_greedily, prefill_shared_prefix
from tests.adapters.test_architectures import ARCHITECTURES, build

NEW = 7
#: Where attention or positions change with a text's length: so that some texts are longer, some shorter.
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 14, "max_position_embeddings": 64}
LONG_ROPE = {**ROPE, "rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{architecture: (architecture, {}) for architecture in ARCHITECTURES},
    **{
        f"{architecture}, window": (architecture, {"sliding_window": 9})
        for architecture in ("mistral", "mixtral", "phi3", "gemma2", "gemma3_text", "gpt_oss", "starcoder2", "cohere2")
    },
    "qwen2, window": ("qwen2", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}),
    "llama4_text, chunks": ("llama4_text", {"attention_chunk_size": 9}),
    "lfm2, convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "llama, longrope": ("llama", {"rope_parameters": LONG_ROPE, "max_position_embeddings": 64}),
}  # fmt: skip


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> Any:
    architecture, changes = VARIANTS[request.param]
    return build(architecture, **changes).train(False)


def texts(draw: random.Random, count: int, shortest: int, longest: int, shared: int) -> list[list[int]]:
    beginning = [draw.randrange(3, 380) for _ in range(shared)]
    return [beginning + [draw.randrange(3, 380) for _ in range(draw.randint(shortest, longest))] for _ in range(count)]


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> list[int]:
    """Return the likeliest tokens after a prompt, each found by reading the whole text alone, without a cache."""
    text = list(prompt)
    for _ in range(NEW):
        text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(prompt) :]


@torch.no_grad()
def test_a_batch_is_decoded_as_each_prompt_alone(model: Any) -> None:
    draw = random.Random(0)
    prompts = texts(draw, 4, 1, 20, shared=4)
    alone = [greedy(model, prompt) for prompt in prompts]
    # One row's first tokens as the draft, so that it is accepted in part, and rejected in the others.
    prefix = prefill_shared_prefix(model, prompts)
    for draft in ([], alone[1][:3]):
        together = decode_greedily(model, prompts, lambda tokens: False, NEW, prefix=prefix, draft=draft)
        assert together == alone


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_batches_of_any_shape_are_decoded_as_each_prompt_alone(model: Any, seed: int) -> None:
    """Of random numbers of texts, lengths, shared beginnings and drafts, cut into batches at random."""
    draw = random.Random(seed)
    for _ in range(3):
        shared, shortest, spread = draw.randint(0, 15), draw.randint(1, 8), draw.randint(0, 25)
        prompts = texts(draw, draw.randint(1, 7), shortest, shortest + spread, shared)
        alone = [greedy(model, prompt) for prompt in prompts]
        prefix = prefill_shared_prefix(model, prompts) if draw.random() < 0.7 else None
        draft = [*draw.choice(alone)[: draw.randint(0, 6)], *texts(draw, 1, 0, 2, 0)[0]]
        order = draw.sample(range(len(prompts)), len(prompts))
        size = draw.randint(1, len(prompts))
        for first in range(0, len(prompts), size):
            batch = order[first : first + size]
            together = decode_greedily(
                model, [prompts[i] for i in batch], lambda tokens: False, NEW, prefix=prefix, draft=draft
            )
            assert together == [alone[i] for i in batch], (shared, shortest, spread, batch, draft)


@torch.no_grad()
def test_choices_are_scored_together_as_each_alone(model: Any) -> None:
    compare_choices(model, random.Random(1))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_choices_of_any_shape_are_scored_together_as_each_alone(model: Any, seed: int) -> None:
    draw = random.Random(seed)
    compare_choices(model, draw, draw.randint(1, 5), draw.randint(2, 30), draw.randint(1, 12), draw.randint(0, 5))


def compare_choices(
    model: Any, draw: random.Random, count: int = 3, context_length: int = 20, choice_length: int = 6, shared: int = 1
) -> None:
    items = []
    for _ in range(count):
        context = texts(draw, 1, 2, context_length, shared=0)[0]
        items.append([(context + choice, len(context)) for choice in texts(draw, 3, 1, choice_length, shared)])
    choices = Choices(model, items)
    together = choices.scores(model, range(count))
    for item, scores in zip(items, together, strict=True):
        for (ids, num_context), score in zip(item, scores, strict=True):
            logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0].log_softmax(-1)
            alone = sum(float(logits[at - 1, ids[at]]) for at in range(num_context, len(ids)))
            assert score == pytest.approx(alone, abs=2e-4)
