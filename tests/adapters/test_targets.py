"""Where adapters can go: which modules of which architecture a target means."""

from __future__ import annotations

import re

import pytest
from torch import nn

from subspace.adapters.inject import adapters, inject
from subspace.adapters.targets import DEFAULT_TARGETS, find_target_modules
from subspace.errors import UserError
from tests.helpers.tiny_models import ARCHITECTURES, tiny, tiny_llama

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "up_proj": "gate_up_proj"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_targets_in_every_architecture(architecture: str) -> None:
    model = tiny(architecture)
    expected = {FUSED.get(target, target) if architecture == "phi3" else target for target in DEFAULT_TARGETS}
    found = find_target_modules(model, "linear")
    assert {name.rpartition(".")[2] for name in found} == expected
    assert len(found) == 2 * len(expected)  # two layers
    assert all(model.get_submodule(name) is module and isinstance(module, nn.Linear) for name, module in found.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("attention", ["model.layers.0.self_attn", "model.layers.1.self_attn"]),
        ("embedding", ["model.embed_tokens"]),
        (
            "sublayer",
            [f"model.layers.{layer}.{end}" for layer in (0, 1) for end in ("self_attn.o_proj", "mlp.down_proj")],
        ),
    ],
)
def test_other_kinds_in_every_architecture(architecture: str, kind: str, expected: list[str]) -> None:
    assert list(find_target_modules(tiny(architecture), kind)) == expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("self_attn.q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (r"layers\.1\..*(q|k)_proj", ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]),
        (
            r"0\.self_attn\.q_proj|1\.mlp\.down_proj",
            ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"],
        ),
        (re.escape("model.layers.0.mlp.up_proj"), ["model.layers.0.mlp.up_proj"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_a_target_is_a_name_or_its_end(target: str, expected: list[str]) -> None:
    assert list(find_target_modules(tiny_llama(), "linear", [target])) == expected


@pytest.mark.parametrize("target", [".*", r".*(proj|head)", r"[a-z_.0-9]+"])
def test_the_head_must_be_named(target: str) -> None:
    found = find_target_modules(tiny_llama(), "linear", [target])
    assert len(found) == 14
    assert "lm_head" not in found


def test_sites_come_once_and_in_the_models_order() -> None:
    model = tiny_llama()
    found = find_target_modules(model, "linear", ["down_proj", "q_proj", ".*_proj", "q_proj"])
    order = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert list(found) == order


@pytest.mark.parametrize("target", ["k_proj", "self_attn.v_proj", r"layers\.\d\.self_attn\.(q|v)_proj", "qkv_proj"])
def test_a_projection_finds_the_linear_that_fuses_it(target: str) -> None:
    found = find_target_modules(tiny("phi3"), "linear", [target])
    assert list(found) == ["model.layers.0.self_attn.qkv_proj", "model.layers.1.self_attn.qkv_proj"]


def test_other_kinds_take_targets_too() -> None:
    found = find_target_modules(tiny_llama(), "sublayer", [r"mlp\.down_proj"])
    assert list(found) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (
            ["q_porj"],
            ["'q_porj' matches no linear of LlamaForCausalLM", "Did you mean 'q_proj'?", "down_proj", "lm_head"],
        ),
        (["q_proj", "c_attn"], ["'c_attn' matches no linear"]),
        (["proj"], ["'proj' matches no linear"]),
        (["q_proj("], ["'q_proj(' is no regular expression", "q_proj, k_proj"]),
        (["q)|(v"], ["is no regular expression"]),
        ([], ["targets is empty", "q_proj"]),
    ],
)
def test_bad_targets_are_answered(targets: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        find_target_modules(tiny_llama(), "linear", targets)
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_holds_an_adapter_is_no_site() -> None:
    model = tiny_llama()
    inject(model, "lora", targets=["q_proj"])
    with pytest.raises(UserError, match="'q_proj' already holds an adapter"):
        find_target_modules(model, "linear", ["q_proj"])
    assert len(find_target_modules(model, "linear", ["k_proj", "down_proj"])) == 4


@pytest.mark.parametrize(
    ("first", "method", "target", "words"),
    [
        ("q_proj", "dora", ".*_proj", "'.*_proj' matches 14 sites, of which 2 already hold an adapter, first"),
        ("q_proj", "dora", "all-linear", "'all-linear' matches 14 sites, of which 2 already hold an adapter, first"),
        (r"layers\.0\.self_attn\.q_proj", "ia3", "q_proj", "'q_proj' matches 2 sites, of which 1 already hold"),
        ("o_proj", "houlsby", ".*", "'.*' matches 4 sites, of which 2 already hold .* free are down_proj"),
    ],
)
def test_a_target_that_another_method_holds_in_part_is_refused(
    first: str, method: str, target: str, words: str
) -> None:
    model = tiny_llama()
    found = inject(model, "lora", targets=[first])
    with pytest.raises(UserError, match=words):
        inject(model, method, targets=[target])
    assert set(adapters(model)) == set(found)


def test_the_head_is_held_by_another_method_without_harm() -> None:
    model = tiny_llama()
    inject(model, "lora", targets=["lm_head"])
    assert len(inject(model, "dora", targets=["all-linear"])) == 14


def test_a_model_of_another_make_has_llamas_names() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    assert list(find_target_modules(model, "linear", ["q_proj"])) == ["q_proj"]
