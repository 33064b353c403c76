"""Usual targets, coverage and methods in decoders of today and yesterday, each tiny and with random weights."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from subspace.adapters.inject import adapters, inject, trained_parameters
from subspace.adapters.registry import list_methods
from subspace.adapters.targets import ALL_LINEAR, DEFAULT_TARGETS, coverage, find_target_modules, usual_names
from subspace.errors import UserError
from tests.helpers.tiny_models import MIXTURES

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
LLAMA, FUSED_MLP = "q_proj k_proj v_proj up_proj down_proj", "q_proj k_proj v_proj gate_up_proj down_proj"
NEOX = "query_key_value dense_h_to_4h dense_4h_to_h"
DEEPSEEK = {
    "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
EXPERTS, UP_EXPERTS = "gate_up_proj down_proj", "up_proj down_proj"
#: By transformers' model_type: what it needs besides the sizes, the linear layers that usual targets mean, the share of
#: the decoder's weights that they are, in per cent, and which of them are stacks of experts' matrices.
ARCHITECTURES: dict[str, tuple[dict[str, Any], str, int, str]] = {
    "llama": ({}, LLAMA, 67, ""),
    "mistral": ({}, LLAMA, 67, ""),
    "qwen2": ({}, LLAMA, 67, ""),
    "qwen3": ({}, LLAMA, 67, ""),
    "gemma": ({}, LLAMA, 67, ""),
    "gemma2": ({}, LLAMA, 67, ""),
    "gemma3_text": ({}, LLAMA, 67, ""),
    "olmo2": ({}, LLAMA, 67, ""),
    "cohere": ({}, LLAMA, 67, ""),
    "granite": ({}, LLAMA, 67, ""),
    "stablelm": ({}, LLAMA, 67, ""),
    "smollm3": ({}, LLAMA, 67, ""),
    "nemotron": ({}, LLAMA, 86, ""),
    "phi": ({}, "q_proj k_proj v_proj fc1 fc2", 86, ""),
    "phi3": ({}, "qkv_proj gate_up_proj down_proj", 89, ""),
    "glm4": ({}, FUSED_MLP, 89, ""),
    "gpt2": ({}, "c_attn c_fc c_proj", 92, ""),
    "gpt_bigcode": ({}, "c_attn c_fc c_proj", 90, ""),
    "starcoder2": ({}, "q_proj k_proj v_proj c_fc c_proj", 86, ""),
    "gpt_neox": ({}, NEOX, 88, ""),
    "gptj": ({"rotary_dim": 8}, "q_proj k_proj v_proj fc_in fc_out", 92, ""),
    "opt": ({"ffn_dim": 128, "word_embed_proj_dim": 64}, "q_proj k_proj v_proj fc1 fc2", 88, ""),
    "falcon": ({"head_dim": None}, NEOX, 90, ""),
    "bloom": ({}, NEOX, 92, ""),
    "lfm2": ({}, "q_proj k_proj v_proj w3 w2", 67, ""),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, FUSED_MLP, 96, EXPERTS),
    "qwen3_moe": (MOE, FUSED_MLP, 88, EXPERTS),
    "qwen2_moe": ({**MOE, "shared_expert_intermediate_size": 32}, f"{FUSED_MLP} up_proj", 85, EXPERTS),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2}, FUSED_MLP, 96, EXPERTS),
    "llama4_text": (
        {"num_local_experts": 2, "intermediate_size_mlp": 128}, f"{FUSED_MLP} up_proj", 86, EXPERTS,
    ),
    "deepseek_v3": (
        DEEPSEEK, "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj up_proj gate_up_proj down_proj", 75, EXPERTS,
    ),
    "qwen3_next": (
        {**MOE, **LINEAR, "shared_expert_intermediate_size": 32},
        f"in_proj_qkvz {FUSED_MLP} up_proj", 85, EXPERTS,
    ),
    "jamba": (
        {"num_experts": 2, "mamba_d_state": 8, "use_mamba_kernels": False, "attn_layer_period": 2,
         "attn_layer_offset": 1},
        f"{FUSED_MLP} up_proj", 64, EXPERTS,
    ),
    "glm4_moe": (
        {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        f"{FUSED_MLP} up_proj", 77, EXPERTS,
    ),
    "phimoe": ({"num_local_experts": 4, "num_experts_per_tok": 2}, FUSED_MLP, 96, EXPERTS),
    "olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, FUSED_MLP, 96, EXPERTS),
    "granitemoe": ({"num_local_experts": 4, "num_experts_per_tok": 2}, FUSED_MLP, 96, EXPERTS),
    "granitemoehybrid": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "mamba_n_heads": 4, "layer_types": ["mamba", "attention"]},
        f"{FUSED_MLP} input_linear output_linear", 90, EXPERTS,
    ),
    "nemotron_h": (MIXTURES["nemotron_h"], LLAMA, 87, UP_EXPERTS),
    "cohere2": ({}, LLAMA, 67, ""),
}  # fmt: skip
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def build(architecture: str, **changes: Any) -> PreTrainedModel:
    asked = {**SIZES, **(ARCHITECTURES[architecture][0] if architecture in ARCHITECTURES else {}), **changes}
    sizes = {key: value for key, value in asked.items() if value is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes))  # type: ignore[no-untyped-call]
    return model


def last_names(names: Any) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


@every_architecture
def test_usual_targets_are_what_the_architecture_calls_them(architecture: str) -> None:
    model, (_, names, share, experts) = build(architecture), ARCHITECTURES[architecture]
    found = inject(model, "lora", {"r": 2})
    assert last_names(found) == set(names.split())
    reach = coverage(model, "linear", list(found))
    assert round(100 * reach.reached / reach.total) == share
    assert last_names(site for site in found if ".experts." in site) == set(experts.split())
    assert not any("experts" in name and "shared" not in name for name in reach.missing)
    assert f"{share}%" in str(reach)
    model(torch.randint(3, 380, (2, 8)), labels=torch.randint(3, 380, (2, 8))).loss.backward()
    assert not [name for name, parameter in trained_parameters(model).items() if parameter.grad is None]


@every_architecture
def test_all_linear_is_every_linear_layer_but_the_head(architecture: str) -> None:
    model: Any = build(architecture)
    head = model.get_output_embeddings()
    linears, passed = [], {"jamba": "dt_proj", "granitemoehybrid": "mamba.out_proj"}.get(architecture, "no layer")
    for name, module in model.named_modules():
        plain = isinstance(module, (nn.Linear, Conv1D)) and "Router" not in type(module).__name__
        if plain and module is not head and not name.endswith(passed):
            linears.append(name)
        if name.endswith(".experts"):
            linears += [f"{name}.{key}" for key, p in module.named_parameters(recurse=False) if p.ndim == 3]
    assert list(find_target_modules(model, "linear", [ALL_LINEAR])) == linears
    assert list(find_target_modules(model, "linear", ALL_LINEAR)) == linears


@every_architecture
def test_all_linear_can_be_trained(architecture: str) -> None:
    model: Any = build(architecture).train()
    inject(model, "lora", {"r": 2}, targets=ALL_LINEAR)
    ids = torch.randint(3, 380, (2, 8))
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert not [name for name, parameter in trained_parameters(model).items() if parameter.grad is None]


def test_a_layer_that_the_models_code_passes_by_is_refused_by_name() -> None:
    with pytest.raises(
        UserError, match=r"target 'dt_proj' is a layer of a state-space mixer, model\S+mamba\.dt_proj, whose"
    ):
        inject(build("jamba"), "lora", targets=["q_proj", "dt_proj"])


@every_architecture
def test_each_usual_name_finds_its_layer(architecture: str) -> None:
    model, names = build(architecture), ARCHITECTURES[architecture][1].split()
    for target in DEFAULT_TARGETS:
        if target in names or any(target in usual_names(f"self_attn.mlp.{name}") for name in names):
            assert last_names(find_target_modules(model, "linear", [target])) <= {*names, "qkv_proj"}


@pytest.mark.long
@pytest.mark.parametrize("method", list_methods())
@every_architecture
def test_a_method_trains_or_says_why_not(architecture: str, method: str) -> None:
    model = build(architecture)
    settings = {key: 2 for key in ("r", "bottleneck", "n", "d") if key in inspect.signature(_config(method)).parameters}
    reason = ""
    try:
        inject(model, method, settings)
    except UserError as error:
        reason = str(error)
    if reason:
        assert any(word in reason for word in (method, type(model).__name__)), reason
        assert not adapters(model)
        return
    model.train()
    model(torch.randint(3, 380, (2, 8)), labels=torch.randint(3, 380, (2, 8)), use_cache=False).loss.backward()
    late = {f"{site}.{name}" for site, adapter in adapters(model).items() for name in adapter.delayed_grad_params}
    without = [name for name, p in trained_parameters(model).items() if p.grad is None and name not in late]
    assert not without


def _config(method: str) -> Any:
    return list_methods()[method].Config


@pytest.mark.parametrize("method", ["lora", "full", "houlsby", "parallel", "prefix", "bitfit"])
def test_only_the_decoder_of_a_model_that_sees_is_adapted(method: str) -> None:
    text = {key: value for key, value in SIZES.items() if key != "pad_token_id"} | {"model_type": "gemma3_text"}
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model: Any = AutoModelForImageTextToText.from_config(config)  # type: ignore[no-untyped-call]
    found = inject(model, method, {"create": True} if method == "bitfit" else {})
    assert found
    assert all("language_model" in site or site == "lm_head" for site in found)
    ids = torch.randint(3, 380, (2, 8))
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert not [name for name, parameter in trained_parameters(model).items() if parameter.grad is None]
    with pytest.raises(UserError, match="prompt does not fit Gemma3ForConditionalGeneration: it embeds text together"):
        inject(model, "prompt")


@pytest.mark.parametrize(
    ("architecture", "method", "settings", "words"),
    [
        ("mixtral", "parallel", {"site": "ffn"}, "is no block of linear layers"),
        ("qwen2_moe", "parallel", {"site": "ffn"}, "is no block of linear layers"),
        ("bloom", "parallel", {"site": "ffn"}, "is no block of linear layers"),
        ("deepseek_v3", "prefix", {}, "is no attention of LLaMA's kind"),
        ("opt", "prefix", {}, "is no attention of LLaMA's kind"),
    ],
)
def test_what_a_method_does_not_fit_is_refused_in_a_sentence(
    architecture: str, method: str, settings: dict[str, Any], words: str
) -> None:
    model = build(architecture)
    with pytest.raises(UserError, match=words):
        inject(model, method, settings)
    assert not adapters(model)
