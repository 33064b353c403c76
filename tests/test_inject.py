"""Which sites get an adapter, and that nothing else of the model changes."""

from __future__ import annotations

import pytest
import torch

from subspace.errors import UserError
from subspace.inject import adapters, inject, trained_parameters
from tests.tiny import tiny_llama


def test_default_targets() -> None:
    model = tiny_llama()
    sites = {name.rpartition(".")[2] for name in inject(model, "lora")}
    assert sites == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert len(adapters(model)) == 10


def test_only_adapters_are_trained() -> None:
    model = tiny_llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    inject(model, "lora", targets=["q_proj"])
    assert set(trained_parameters(model)) == {f"model.layers.{i}.self_attn.q_proj.{t}" for i in (0, 1) for t in "AB"}
    after = {name.replace(".base.", "."): p for name, p in model.named_parameters() if not p.requires_grad}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(UserError, match="'q_porj' matches no linear of LlamaForCausalLM. Did you mean 'q_proj'"):
        inject(tiny_llama(), "lora", targets=["q_porj"])


def test_on_the_meta_device_nothing_is_allocated() -> None:
    model = tiny_llama()
    model.to("meta")  # type: ignore[arg-type]
    inject(model, "dora")
    assert all(p.device.type == "meta" for p in model.parameters())
