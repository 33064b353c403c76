"""Which sites get an adapter, and that nothing else of the model changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from subspace.adapters.base import TrainProgress
from subspace.adapters.inject import adapter_groups, adapters, inject, trained_parameters
from subspace.adapters.serialization import load_adapter, save_adapter
from subspace.errors import UserError
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess
from tests.helpers.tiny_models import tiny_llama


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


def test_settings_by_site() -> None:
    model = tiny_llama()
    created = inject(model, "lora", {"r": 4}, patterns={r"layers\.1\..*": {"r": 2, "alpha": 4.0}, "up_proj": {"r": 3}})
    ranks = {name: adapter.config.r for name, adapter in created.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 4
    assert ranks["model.layers.1.self_attn.q_proj"] == 2
    assert ranks["model.layers.0.mlp.up_proj"] == ranks["model.layers.1.mlp.up_proj"] == 3  # the last that matches
    assert created["model.layers.1.self_attn.q_proj"].scale == 2.0
    assert len(adapter_groups(model)) == 1  # one schedule, one penalty


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"layers.7": {"r": 2}}, "the pattern 'layers.7' matches none of the 10 sites"),
        ({"q_proj": {"rank": 2}}, "the pattern 'q_proj' sets 'rank'"),
    ],
)
def test_patterns_that_cannot_be_meant(patterns: dict[str, dict[str, int]], message: str) -> None:
    model = tiny_llama()
    with pytest.raises(UserError, match=message):
        inject(model, "lora", patterns=patterns)
    assert not adapters(model)


def test_a_schedule_over_unequal_ranks() -> None:
    model = tiny_llama()
    created = list(inject(model, "adalora", {"r": 6, "target_r": 2}, patterns={"q_proj": {"r": 3}}).values())
    for adapter in created:
        for parameter in adapter.trained().values():
            parameter.data = torch.ones_like(parameter)
            parameter.grad = torch.rand_like(parameter)
    type(created[0]).before_step(created, TrainProgress(2, 4), DeepSpeedOptimizerAccess())
    type(created[0]).after_step(created, TrainProgress(4, 4), DeepSpeedOptimizerAccess())
    left = sum(int(adapter.trained()["E"].count_nonzero()) for adapter in created)
    assert left == 2 * len(created)


def test_alias_stands_for_settings() -> None:
    created = inject(tiny_llama(), "RSLoRA", {"r": 4, "alpha": 4.0})
    assert {adapter.scale for adapter in created.values()} == {2.0}


@pytest.mark.parametrize("order", [("prefix", "lora"), ("lora", "prefix"), ("prompt", "dora")])
def test_methods_at_different_sites_go_together_in_any_order(order: tuple[str, str], tmp_path: Path) -> None:
    model = tiny_llama()
    sizes = [len(inject(model, method)) for method in order]
    assert sizes[order.index("lora") if "lora" in order else 1] == 10
    torch.manual_seed(1)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ids = torch.tensor([[5, 9, 33, 7]])
    save_adapter(model, tmp_path / "adapter")
    other = tiny_llama()
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert not torch.allclose(other(ids).logits, tiny_llama()(ids).logits, atol=0.1)


@pytest.mark.parametrize(("first", "second"), [("lora", "houlsby"), ("pfeiffer", "houlsby"), ("houlsby", "lora")])
def test_a_method_is_not_placed_on_the_half_of_its_sites_that_is_free(first: str, second: str) -> None:
    model = tiny_llama()
    found = set(inject(model, first))
    with pytest.raises(UserError, match="of the usual sites already hold an adapter, first model.layers.0"):
        inject(model, second)
    assert set(adapters(model)) == found
    inject(model, second, targets=["o_proj" if second == "houlsby" else "q_proj"])


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [("lora-dash", "launch", 9), ("adalora", "every", 3), ("flexlora", "moves", 1), ("parallel", "site", "ffn")],
)
def test_a_pattern_cannot_set_what_has_one_value_for_all_layers(method: str, name: str, value: Any) -> None:
    model = tiny_llama()
    with pytest.raises(UserError, match=f"sets {name}, which has one value for all layers. Set method.{name}"):
        inject(model, method, patterns={r"layers\.0\..*": {name: value}})
    assert not adapters(model)


def test_hira_has_no_scale() -> None:
    assert {adapter.scale for adapter in inject(tiny_llama(), "hira").values()} == {1.0}
