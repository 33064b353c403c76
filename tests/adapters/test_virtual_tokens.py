"""Virtual tokens where attention sees a part of the text: a text is read in a batch as it is read alone.

Alone is the papers' way, by hand: embed the text, put the vectors in front, and let the frozen model read on. The
windows are shorter than the texts, and padding takes as much room as they do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from subspace.adapters.inject import adapters, inject, remove_adapters, trained_parameters
from subspace.evaluation.choice_scoring import Choices
from subspace.evaluation.greedy_decoding import decode_greedily, prefill_shared_prefix
from subspace.models.context import attention_window
from tests.helpers.tiny_models import SIZES

WINDOW, N = 6, 4
#: By transformers' model_type, what it needs besides the sizes; and one in which every token sees the whole text.
SEES_LITTLE: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "gpt_oss": {"sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
    "llama4_text": {
        "attention_chunk_size": WINDOW,
        "num_local_experts": 2,
        "intermediate_size_mlp": 128,
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "llama": {},
}
SEES_LITTLE["mistral eager"] = {**SEES_LITTLE["mistral"], "attn_implementation": "eager"}
TEXTS = [[5, 9, 33, 7, 120, 64, 3, 17, 211], [8, 8, 250], [5, 9, 2, 90, 4, 11, 18, 77, 300, 41, 42, 43, 44, 45], [61]]


def build(architecture: str) -> Any:
    kind, more = architecture.split()[0], dict(SEES_LITTLE[architecture])
    how = {"attn_implementation": more.pop("attn_implementation")} if "attn_implementation" in more else {}
    config = AutoConfig.for_model(kind, **{**SIZES, "pad_token_id": 0, **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, **how).eval()  # type: ignore[no-untyped-call]


def adapted(architecture: str, method: str, **settings: Any) -> Any:
    model = build(architecture)
    inject(model, method, {"n": N, **settings})
    generator = torch.Generator().manual_seed(1)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def alone(model: Any, ids: list[int]) -> Tensor:
    """Return the logits of one text, ``(tokens, vocabulary)``."""
    text = torch.tensor([ids])
    if adapters(model).keys() != {"model.embed_tokens"}:
        return model(text, use_cache=False).logits[0]  # type: ignore[no-any-return]
    (adapter,) = adapters(model).values()
    plain = copy.deepcopy(model)
    remove_adapters(plain)
    embedded = torch.cat([adapter.vectors()[None], plain.get_input_embeddings()(text)], dim=1)  # type: ignore[operator]
    return plain(inputs_embeds=embedded, use_cache=False).logits[0, N:]  # type: ignore[no-any-return]


def written_alone(model: Any, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(alone(model, ids)[-1].argmax())]
    return ids[-count:]


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Return all texts as one batch, and its mask."""
    length = max(map(len, TEXTS)) + 3
    rows, masks = [], []
    for text in TEXTS:
        fill, ones = [7] * (length - len(text)), [1] * len(text)
        rows.append(fill + text if side == "left" else text + fill)
        masks.append([0] * len(fill) + ones if side == "left" else ones + [0] * len(fill))
    return torch.tensor(rows), torch.tensor(masks)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["prompt", "p-tuning", "prefix"])
@pytest.mark.parametrize("architecture", SEES_LITTLE)
def test_a_text_is_read_in_a_batch_as_alone(architecture: str, method: str, side: str) -> None:
    model = adapted(architecture, method)
    ids, mask = padded(side)
    logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False).logits
    for text, row, seen in zip(TEXTS, logits, mask.bool(), strict=True):
        assert torch.allclose(row[seen], alone(model, text), atol=1e-4)


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
@pytest.mark.parametrize("architecture", SEES_LITTLE)
def test_a_batch_is_answered_as_its_rows_are(architecture: str, method: str) -> None:
    """With what its rows have in common read once, and with drafts that are right, half right and wrong."""
    model = adapted(architecture, method) if method != "lora" else build(architecture)
    prompts = [[5, 9, 33, *text] for text in TEXTS]
    expected = [written_alone(model, prompt, 6) for prompt in prompts]
    beginning = prefill_shared_prefix(model, prompts)
    for draft in ([], expected[0][:3], [*expected[0][:2], 1, 2]):
        written = decode_greedily(model, prompts, lambda _: False, 6, prefix=beginning, draft=draft)
        assert written == expected


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("architecture", SEES_LITTLE)
def test_choices_are_scored_as_alone(architecture: str, method: str) -> None:
    model = adapted(architecture, method)
    items = [[(context + choice, len(context)) for choice in ([3, 4], [7], [9, 9, 9])] for context in TEXTS]
    short = [([11, 12, 13, end], 3) for end in (4, 5)]  # shorter than the window, longer with the vectors
    found = [*Choices(model, items).scores(model, range(len(items))), *Choices(model, [short]).scores(model, [0])]
    for item, scores in zip([*items, short], found, strict=True):
        for (ids, context), score in zip(item, scores, strict=True):
            told = alone(model, ids).log_softmax(-1)
            expected = sum(float(told[i - 1, ids[i]]) for i in range(context, len(ids)))
            assert score == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", SEES_LITTLE)
def test_vectors_are_trained_in_a_batch_as_by_its_texts_alone(architecture: str, side: str) -> None:
    model = adapted(architecture, "prompt")
    (vectors,) = trained_parameters(model).values()
    ids, mask = padded(side)
    with torch.enable_grad():
        logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        (batched,) = torch.autograd.grad(logits[mask.bool()].logsumexp(-1).sum(), vectors)
        total = torch.stack([alone(model, text).logsumexp(-1).sum() for text in TEXTS]).sum()
    assert batched.abs().max() > 0
    # The copies of the model in `alone` have vectors of their own: each text by itself through the adapter instead.
    with torch.enable_grad():
        losses = [model(torch.tensor([text])).logits.logsumexp(-1).sum() for text in TEXTS]
        (apart,) = torch.autograd.grad(torch.stack(losses).sum(), vectors)
    assert torch.allclose(batched, apart, atol=1e-4 * float(apart.abs().max()))
    assert torch.allclose(torch.stack(losses).sum(), total, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text", "gpt_oss", "llama"])
def test_transformers_own_generation_sees_the_vectors_too(architecture: str) -> None:
    model = adapted(architecture, "prompt")
    ids, mask = padded("left")
    written = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert written[:, -5:].tolist() == [written_alone(model, text, 5) for text in TEXTS]


def test_the_window_is_that_of_the_text_model() -> None:
    assert attention_window(build("mistral").config) == WINDOW
    assert attention_window(build("llama4_text").config) == WINDOW
    assert attention_window(build("llama").config) is None
    both = AutoConfig.for_model("gemma3", text_config={"model_type": "gemma3_text", **SIZES, "sliding_window": 9})
    assert attention_window(both) == 9
