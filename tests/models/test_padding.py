"""Without a mask a causal model gives the same loss and gradients, and any other is found out by trying it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from subspace.adapters.inject import inject, trained_parameters
from subspace.data.collate import Batch, TokenRow, collate
from subspace.models.lm_head import SummedLoss
from subspace.models.padding import needs_padding_mask
from tests.helpers.tiny_models import ARCHITECTURES, VOCABULARY, tiny, tiny_llama

generator = torch.Generator().manual_seed(0)
ROWS = [
    TokenRow(torch.randint(2, VOCABULARY, (length,), generator=generator).tolist(), length - 4)
    for length in (40, 17, 11, 29)
]
BATCH = Batch.from_labels(collate(ROWS, pad_id=0))

#: Models whose masks or positions are not made as LLaMA's, with what their configuration needs.
OTHERS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},  # its positions are distances that the mask counts
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "gpt_neo": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                "window_size": 8},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "opt": {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 64},  # counts its positions by the mask
}  # fmt: skip


def losses_and_gradients(model: Any, trained: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the loss, and all gradients in one tensor, with the mask and without."""
    found = []
    for masks in (True, False):
        model.zero_grad()
        loss = SummedLoss(model, masks_padding=masks)(BATCH)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad.flatten() for p in trained if p.grad is not None]
        found.append((loss.detach(), torch.cat(gradients)))
    return found


def assert_equal_to_rounding(model: Any, trained: Any) -> None:
    (loss, gradients), (unmasked_loss, unmasked) = losses_and_gradients(model, trained)
    assert torch.allclose(unmasked_loss, loss, rtol=1e-6)
    assert torch.linalg.vector_norm(unmasked - gradients) < 1e-6 * torch.linalg.vector_norm(gradients)


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_mask_is_needed(architecture: str, method: str) -> None:
    model = tiny(architecture)
    inject(model, method)
    torch.manual_seed(1)
    for tensor in trained_parameters(model).values():
        nn.init.normal_(tensor, std=0.1)
    assert not needs_padding_mask(model)
    assert_equal_to_rounding(model.train(), trained_parameters(model).values())


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3_text"])
def test_no_mask_is_needed_where_rows_are_longer_than_what_a_layer_sees(architecture: str) -> None:
    model = tiny(architecture, sliding_window=8)
    assert not needs_padding_mask(model)
    assert_equal_to_rounding(model.train(), list(model.parameters()))


@pytest.mark.parametrize("architecture", OTHERS)
def test_no_mask_is_needed_by_a_causal_model_of_another_make(architecture: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, vocab_size=VOCABULARY, **OTHERS[architecture])
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert not needs_padding_mask(model)
    assert_equal_to_rounding(model.eval(), list(model.parameters()))


class CountsFromTheEnd(nn.Module):
    """A causal model that numbers a row's tokens from its last, which only the mask tells it of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama()
        self.config, self.dtype, self.device = self.inner.config, self.inner.dtype, self.inner.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = 100 + torch.arange(input_ids.shape[1]) - 3 * mask.sum(1, keepdim=True)
        given = {**inputs, "position_ids": positions * positions // 100}
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, **given)


def looks_to_the_right() -> Any:
    model = tiny_llama()
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_looks_to_the_right_keeps_its_mask(dtype: torch.dtype) -> None:
    causal: Any = tiny_llama()
    assert not needs_padding_mask(causal.to(dtype))
    assert needs_padding_mask(looks_to_the_right().to(dtype))


def test_a_model_that_counts_its_positions_by_the_mask_keeps_it() -> None:
    assert needs_padding_mask(CountsFromTheEnd())


def test_a_model_that_gives_no_numbers_keeps_its_mask() -> None:
    model = tiny_llama()
    model.model.norm.weight.data.fill_(float("nan"))
    assert needs_padding_mask(model)


@pytest.mark.parametrize("training", [True, False])
def test_trying_leaves_no_trace(training: bool) -> None:
    model = tiny_llama().train(training)
    inject(model, "lora", {"dropout": 0.5})
    model.train(training)
    state = torch.get_rng_state()
    needs_padding_mask(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
