"""The attention that training in bfloat16 takes on a CPU: as exact as torch's, whatever is masked and shared."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from subspace.adapters.inject import inject
from subspace.errors import UserError
from subspace.kernels import attention
from subspace.kernels.attention import row_blocked_attention
from subspace.models.config import ModelConfig
from subspace.models.lm_head import summed_loss
from subspace.models.loading import open_model
from tests.helpers.tiny_models import tiny_llama

ROWS, HEADS, TOKENS, WIDTH = 5, 6, 24, 16


class Module:
    """What transformers' attentions ask of theirs."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        self.num_key_value_groups = groups


def tensors(key_heads: int, keys: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(TOKENS, HEADS), (keys, key_heads), (keys, key_heads), (TOKENS, HEADS)]
    return [torch.randn(ROWS, tokens, heads, WIDTH).transpose(1, 2) for tokens, heads in shapes]


def masks(keys: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    causal = torch.ones(TOKENS, keys, dtype=torch.bool).tril(keys - TOKENS)
    padded = causal & (torch.arange(keys) < torch.tensor([keys, 9, 20, 13, 17])[:, None, None])
    added = torch.randn(ROWS, HEADS, TOKENS, keys).masked_fill(~padded[:, None], torch.finfo(torch.float32).min)
    return {"causal": causal[None, None], "padded": padded[:, None], "added": added}


def results(of: Any, given: list[Tensor], mask: Tensor | None, groups: int, **more: Any) -> list[Tensor]:
    *inputs, seen = (tensor.clone() for tensor in given)
    for tensor in inputs:
        tensor.requires_grad_()
    out, weights = of(Module(groups), *inputs, mask, **more)
    assert weights is None
    return [out.detach(), *torch.autograd.grad(out, inputs, seen.transpose(1, 2))]


def ours(*given: Any, **more: Any) -> Any:
    def otherwise(*_: Any, **__: Any) -> Any:
        raise AssertionError("the other attention was taken")

    return row_blocked_attention(otherwise, *given, **more)


def apart(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize(
    ("mask", "keys"), [("none", TOKENS), *itertools.product(["causal", "padded", "added"], [TOKENS, TOKENS + 7])]
)
def test_it_is_torchs(monkeypatch: pytest.MonkeyPatch, key_heads: int, mask: str, keys: int) -> None:
    def of(attention: Any, dtype: torch.dtype) -> list[Tensor]:
        seen = masks(keys).get(mask)
        seen = seen.to(dtype) if seen is not None and seen.is_floating_point() else seen
        given = [tensor.to(dtype) for tensor in tensors(key_heads, keys)]
        return results(attention, given, seen, HEADS // key_heads, scaling=0.3)

    monkeypatch.setattr(attention, "MAX_SCORES", 2 * HEADS * TOKENS * keys)  # two rows, two, and one
    exact = of(sdpa_attention_forward, torch.float64)
    assert apart(of(ours, torch.float32), exact) < 1e-6
    assert apart(of(ours, torch.bfloat16), exact) < 1.5 * apart(of(sdpa_attention_forward, torch.bfloat16), exact)


def test_what_sees_nothing_gives_no_trouble() -> None:
    """A row of padding on the left sees no key at all."""
    given, seen = tensors(2, TOKENS), masks(TOKENS)["causal"]
    seen = seen & (torch.arange(TOKENS) >= 5)
    found = results(ours, given, seen, 3)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found)


@pytest.mark.parametrize(
    "more", [{"dropout": 0.1}, {"position_bias": torch.zeros(1, HEADS, TOKENS, TOKENS)}, {"softcap": 30.0}]
)
def test_what_it_does_not_know_goes_to_the_other(more: dict[str, Any]) -> None:
    query, key, value, _ = tensors(2, TOKENS)
    known: dict[str, Any] = {}

    def otherwise(*_: Any, **told: Any) -> Any:
        known.update(told)
        return query, None

    assert row_blocked_attention(otherwise, Module(3), query.requires_grad_(), key, value, None, **more) == (
        query,
        None,
    )
    assert {**known, **more} == known


def test_without_gradients_it_is_the_other() -> None:
    query, key, value, _ = tensors(2, TOKENS)
    expected, _ = sdpa_attention_forward(Module(3), query, key, value, None)  # type: ignore[arg-type]
    found, _ = row_blocked_attention(sdpa_attention_forward, Module(3), query, key, value, None)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_in_bfloat16_trains_with_it(tmp_path: Path, checkpointing: bool) -> None:
    tiny_llama().save_pretrained(tmp_path)
    ids, found = torch.arange(2, 62).view(3, 20), {}
    mask = (torch.arange(20) < torch.tensor([20, 11, 16])[:, None]).long()
    for dtype in ("float32", "bfloat16"):
        config = ModelConfig(path=str(tmp_path), dtype=dtype, gradient_checkpointing=checkpointing)
        model: Any = open_model(config)
        assert (model.config._attn_implementation == attention.ATTENTION_NAME) == (dtype == "bfloat16")
        inject(model, "lora", {"r": 4})
        model.train()
        loss = summed_loss(model, {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask > 0, -100)})
        loss.backward()  # type: ignore[no-untyped-call]
        norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
        found[dtype] = loss.item(), norms
    assert found["bfloat16"][0] == pytest.approx(found["float32"][0], rel=0.01)
    assert torch.allclose(found["bfloat16"][1], found["float32"][1], rtol=0.1, atol=0.1)


def test_gemma_2_still_says_what_it_can(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    few: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    small = Gemma2Config(vocab_size=64, hidden_size=16, intermediate_size=16, **few)
    Gemma2ForCausalLM(small).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="attention: eager"):
        open_model(ModelConfig(path=str(tmp_path), dtype="bfloat16"))
