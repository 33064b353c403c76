"""Adapters at experts' matrices, of three dimensions: each method is at each matrix what it is at a linear layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from subspace.adapters.experts.adapter import ExpertsAdapter, experts_refusal
from subspace.adapters.export import export_merged
from subspace.adapters.inject import adapters, inject, remove_adapters, trained_parameters
from subspace.adapters.merging import merge, unmerge
from subspace.adapters.multi_adapter import can_batch_adapters
from subspace.adapters.parameter_count import count_trained
from subspace.adapters.penalties import with_penalties
from subspace.adapters.registry import list_methods, resolve_method
from subspace.adapters.serialization import load_adapter, save_adapter
from subspace.adapters.targets import find_target_modules
from subspace.distributed.deepspeed_compat import keep_linear_protocol
from subspace.errors import UserError
from subspace.models.bitsandbytes_compat import weight_format
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model, open_shape, summarize_model
from subspace.planning.activation_memory import BatchShape, trace_activation_memory
from subspace.planning.static_memory import StaticMemory
from tests.helpers.tiny_models import MIXTURES, tiny

IDS = torch.tensor([[5, 9, 33, 7, 120, 64, 3, 17], [8, 8, 250, 31, 2, 90, 4, 11]])
ABLE = [name for name, cls in list_methods().items() if experts_refusal(cls) is None]
EXPERTS = r".*\.experts\.(gate_up|up|down)_proj"
#: Settings with which a method's gradients are those of its equation, and small sizes.
SETTINGS: dict[str, dict[str, Any]] = {"dora": {"simple": False}}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def settings_of(method: str) -> dict[str, Any]:
    fields = resolve_method(method)[0].Config.__dataclass_fields__
    return {key: value for key, value in {"r": 2, "p": 3}.items() if key in fields} | SETTINGS.get(method, {})


def mixture(architecture: str, implementation: str = "grouped_mm", **overrides: Any) -> Any:
    model = tiny(architecture, **overrides)
    if architecture != "llama4_text":
        model.set_experts_implementation(implementation)
    return model


def perturb(model: nn.Module) -> None:
    torch.manual_seed(3)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)


def loss_of(logits: Tensor) -> Any:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def gradient_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def by_linear_layers(adapter: ExpertsAdapter) -> tuple[Tensor, list[dict[str, nn.Parameter]]]:
    """Return the stack of weights that the method gives at one linear layer for each expert, and the tensors there."""
    weights, tensors = [], []
    for number, W in enumerate(adapter.base.matrices()):
        linear = nn.Linear(adapter.in_features, adapter.out_features, bias=False)
        one: Any = adapter.method(linear, adapter.config)
        for name, tensor in (one.own_tensors() | dict(one.named_buffers(recurse=False))).items():
            tensor.data.copy_(getattr(adapter, name)[number].detach())
        weights.append(one.weight(W.detach()))
        tensors.append(one.trained())
    stack = torch.stack(weights)
    return stack.mT if adapter.base.transposed else stack, tensors


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("method", ABLE)
def test_a_method_at_experts_is_itself_at_each_of_their_matrices(method: str, architecture: str) -> None:
    model, plain = mixture(architecture), mixture(architecture)
    inject(model, method, settings_of(method), targets=EXPERTS)
    perturb(model)
    stacks, tensors = {}, {}
    for site, adapter in adapters(model).items():
        assert isinstance(adapter, ExpertsAdapter)
        stacks[site], tensors[site] = by_linear_layers(adapter)
    expected = functional_call(plain, stacks, (IDS,), {"use_cache": False}).logits
    loss_of(expected).backward()
    found = model(IDS, use_cache=False).logits
    loss_of(found).backward()
    assert torch.allclose(found, expected, atol=2e-5 * expected.abs().max().item())
    assert (found - plain(IDS, use_cache=False).logits).abs().max() > 1e-3 * expected.abs().max()
    for site, adapter in adapters(model).items():
        for name, parameter in adapter.trained().items():
            exact = torch.stack([gradient_of(one[name]) for one in tensors[site]])
            assert torch.allclose(gradient_of(parameter), exact, atol=2e-4 * exact.abs().max().item()), (site, name)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("architecture", [name for name in MIXTURES if name != "llama4_text"])
def test_all_of_transformers_ways_to_compute_experts_give_the_same(architecture: str, method: str) -> None:
    outcomes = []
    for implementation in IMPLEMENTATIONS:
        model = mixture(architecture, implementation)
        inject(model, method, {"r": 2}, targets=EXPERTS)
        perturb(model)
        logits = model(IDS, use_cache=False).logits
        loss_of(logits).backward()
        outcomes.append((logits, [gradient_of(p) for p in trained_parameters(model).values()]))
    for logits, gradients in outcomes[1:]:
        assert torch.allclose(logits, outcomes[0][0], atol=1e-5 * logits.abs().max().item())
        for one, other in zip(gradients, outcomes[0][1], strict=True):
            assert torch.allclose(one, other, atol=1e-4 * one.abs().max().item())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("architecture", MIXTURES)
def test_before_the_first_step_the_model_is_the_frozen_one(architecture: str, implementation: str) -> None:
    model = mixture(architecture, implementation)
    before = model(IDS, use_cache=False).logits
    inject(model, "lora", targets=EXPERTS)
    after = model(IDS, use_cache=False).logits
    if implementation == "batched_mm":  # which multiplies a copy of a matrix for each row; ours takes rows together
        assert torch.allclose(after, before, atol=1e-5 * before.abs().max().item())
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_removing_and_unmerging_restore_the_parameters_themselves(architecture: str) -> None:
    model = mixture(architecture)
    before, names = dict(model.named_parameters()), list(model.state_dict())
    logits = model(IDS, use_cache=False).logits
    inject(model, "lora", {"r": 2})
    perturb(model)
    adapted = model(IDS, use_cache=False).logits
    merge(model)
    assert list(model.state_dict()) == names
    merged = model(IDS, use_cache=False).logits
    assert torch.allclose(merged, adapted, atol=2e-5 * merged.abs().max().item())
    assert not torch.allclose(merged, logits, atol=1e-2)
    unmerge(model)
    assert torch.equal(model(IDS, use_cache=False).logits, adapted)
    remove_adapters(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert torch.equal(model(IDS, use_cache=False).logits, logits)


def test_an_expert_that_no_token_was_sent_to_has_zeros_as_its_gradient() -> None:
    model = mixture("mixtral", "eager", num_hidden_layers=1)
    router = next(module for name, module in model.named_modules() if name.endswith("mlp.gate"))
    inject(model, "lora", {"r": 2}, targets=EXPERTS)
    perturb(model)
    seen: list[Tensor] = []
    router.register_forward_hook(lambda module, inputs, output: seen.append(output[-1]))
    loss_of(model(IDS[:1, :2].repeat(2, 4), use_cache=False).logits).backward()
    silent = set(range(4)) - set(seen[0].flatten().tolist())
    assert silent
    for parameter in trained_parameters(model).values():
        rows = gradient_of(parameter).flatten(1).abs().sum(1)
        assert {number for number in range(4) if not rows[number]} == silent


def test_experts_have_gradients_though_zero_3_has_replaced_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed leaves its own behind in a process, which the model's code calls with what stands for a matrix."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    gradients = []
    for linear in (torch._C._nn.linear, zero3_linear_wrap):
        monkeypatch.setattr(F, "linear", linear)
        model = mixture("mixtral", "eager")
        inject(model, "lora", {"r": 2}, targets=EXPERTS)
        keep_linear_protocol()
        perturb(model)
        loss_of(model(IDS, use_cache=False).logits).backward()
        gradients.append([gradient_of(p) for p in trained_parameters(model).values()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-4 * one.abs().max().item())


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("architecture", MIXTURES)
def test_gradients_are_the_same_where_activations_are_recomputed(architecture: str, method: str) -> None:
    gradients = []
    for recompute in (False, True):
        model = mixture(architecture).train()
        inject(model, method, {"r": 2})
        perturb(model)
        if recompute:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss_of(model(IDS, use_cache=False).logits).backward()
        gradients.append({name: gradient_of(p) for name, p in trained_parameters(model).items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("method", ["lora", "moslora", "pissa", "dora"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_an_adapter_comes_back_from_its_file(architecture: str, method: str, tmp_path: Path) -> None:
    model = mixture(architecture)
    inject(model, method, {"r": 2})
    perturb(model)
    save_adapter(model, tmp_path / "adapter")
    fresh = mixture(architecture)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


@pytest.mark.parametrize("method", [name for name in list_methods() if name not in ABLE])
def test_a_method_that_cannot_train_experts_says_so_and_leaves_them_out(method: str) -> None:
    cls = list_methods()[method]
    model = mixture("qwen3_moe")
    if cls.target_kind(cls.Config()) != "linear":
        with pytest.raises(UserError, match="matches no"):
            inject(model, method, targets=[r"experts\.down_proj"])
        return
    with pytest.raises(UserError, match=rf"method {method} cannot train experts' matrices: .* These can: .*lora"):
        inject(model, method, targets=["q_proj", r"experts\.down_proj"])
    assert not adapters(model)
    if cls.default_targets(cls.Config()) is None:
        assert not any("experts" in site for site in inject(model, method))


def test_targets_name_experts_as_they_name_linear_layers() -> None:
    model = mixture("mixtral", num_hidden_layers=1)

    def found(*targets: str) -> list[str]:
        sites = find_target_modules(model, "linear", targets or None)
        return [site.removeprefix("model.layers.0.") for site in sites]

    up, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    assert found("up_proj") == found("gate_up_proj") == found(r"experts\.gate_up_proj") == [up]
    assert found("down_proj") == [down]
    assert found(r".*experts.*") == [up, down]
    assert found()[-2:] == found("all-linear")[-2:] == [up, down]
    created = inject(model, "lora", patterns={r"experts\.down_proj": {"r": 3}})
    assert [created[f"model.layers.0.{site}"].config.r for site in (up, down)] == [16, 3]
    with pytest.raises(UserError, match="already holds an adapter"):
        inject(model, "lora", targets=["down_proj"])


def test_each_expert_of_each_layer_starts_from_values_of_its_own() -> None:
    model = mixture("qwen3_moe")
    found = inject(model, "lora", {"r": 2}, targets=r".*\.experts\.gate_up_proj").values()
    factors = torch.cat([adapter.trained()["A"].detach().flatten(1) for adapter in found])
    assert len(factors) == 8
    assert torch.cdist(factors, factors).fill_diagonal_(1).min() > 0.1


@pytest.mark.parametrize("architecture", MIXTURES)
def test_counts_and_plans_read_no_weight(architecture: str) -> None:
    model = mixture(architecture)
    counted = count_trained(model, "lora", {"r": 2})
    created = inject(model, "lora", {"r": 2})
    assert counted == count_trained(model)
    experts = [adapter for adapter in created.values() if isinstance(adapter, ExpertsAdapter)]
    assert all(
        sum(p.numel() for p in a.trained().values()) == a.num_matrices * 2 * (a.in_features + a.out_features)
        for a in experts
    )
    assert experts


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_memory_of_a_step_is_planned_without_values(method: str) -> None:
    with torch.device("meta"):
        model = mixture("qwen3_moe")
    inject(model, method, {"r": 2})
    peak = {
        tokens: trace_activation_memory(model, BatchShape(2, tokens, tokens - 1, tokens - 1)).peak
        for tokens in (16, 64)
    }
    assert peak[64] > 2 * peak[16] > 0


def test_dropout_is_on_the_input_of_the_update_and_in_training_alone() -> None:
    model = mixture("mixtral")
    inject(model, "lora", {"r": 2, "dropout": 0.5}, targets=EXPERTS)
    perturb(model)
    exact = model(IDS, use_cache=False).logits
    assert torch.equal(model(IDS, use_cache=False).logits, exact)
    assert not torch.equal(model.train()(IDS, use_cache=False).logits, exact)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_a_constraint_holds_each_expert(reduce: str) -> None:
    weight, constraint = 0.3, {"constraint": "orthogonal", "constraint_weight": 0.3, "constraint_reduce": reduce}
    model = mixture("mixtral").train()
    created = inject(model, "lora", {"r": 2, **constraint}, targets=EXPERTS)
    perturb(model)
    with_penalties(loss_of(model(IDS, use_cache=False).logits), model).backward()  # type: ignore[no-untyped-call]
    free = mixture("mixtral").train()
    inject(free, "lora", {"r": 2}, targets=EXPERTS)
    perturb(free)
    loss = loss_of(free(IDS, use_cache=False).logits)
    total = torch.zeros(())
    matrices = sum(adapter.num_matrices for adapter in created.values())
    for adapter in adapters(free).values():
        for A, B in zip(adapter.trained()["A"], adapter.trained()["B"], strict=True):
            total = total + (A @ A.T - torch.eye(2)).square().sum() + (B.T @ B - torch.eye(2)).square().sum()
    (loss + weight * total / (1 if reduce == "sum" else matrices)).backward()
    for (name, one), other in zip(trained_parameters(model).items(), trained_parameters(free).values(), strict=True):
        exact = gradient_of(other)
        assert torch.allclose(gradient_of(one), exact, atol=1e-5 * exact.abs().max().item()), name


def test_a_copied_model_has_adapters_of_its_own() -> None:
    model = mixture("mixtral")
    inject(model, "dora", {"r": 2})
    perturb(model)
    other = copy.deepcopy(model)
    before = model(IDS, use_cache=False).logits
    assert torch.equal(other(IDS, use_cache=False).logits, before)
    for parameter in trained_parameters(other).values():
        parameter.data.zero_()
    assert torch.equal(model(IDS, use_cache=False).logits, before)
    assert not torch.equal(other(IDS, use_cache=False).logits, before)


def test_models_with_adapters_at_experts_are_scored_one_after_the_other() -> None:
    model = mixture("mixtral")
    inject(model, "lora", {"r": 2})
    assert not can_batch_adapters(model)


def test_what_is_no_product_with_experts_is_an_error_and_not_the_frozen_weight() -> None:
    model = mixture("mixtral", "eager")
    inject(model, "lora", {"r": 2}, targets=EXPERTS)
    experts = model.model.layers[0].mlp.experts
    for use in (
        lambda: torch.einsum("ni,eoi->neo", torch.zeros(2, 64), experts.gate_up_proj),
        lambda: experts.gate_up_proj[0].sum(),
        lambda: torch.zeros(2, 64) @ experts.gate_up_proj[0],
        lambda: F.linear(torch.zeros(2, 64), experts.gate_up_proj[0].T),
        lambda: experts.gate_up_proj[0:2],
    ):
        with pytest.raises(UserError, match="the model's experts were asked for .* experts_implementation"):
            use()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_base_in_sixteen_bits_has_the_same_gradients_to_its_rounding(method: str) -> None:
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = mixture("qwen3_moe").to(dtype)
        inject(model, method, {"r": 2}, targets=EXPERTS)
        assert all(parameter.dtype == torch.float32 for parameter in trained_parameters(model).values())
        perturb(model)
        loss_of(model(IDS, use_cache=False).logits.float()).backward()
        gradients.append(torch.cat([gradient_of(p).flatten() for p in trained_parameters(model).values()]))
    exact, rounded = gradients
    assert F.cosine_similarity(exact, rounded, dim=0) > 0.99


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_a_merged_folder_is_an_ordinary_mixture(architecture: str, tmp_path: Path) -> None:
    model: Any = tiny(architecture, tmp_path / "base")
    inject(model, "lora", {"r": 2})
    perturb(model)
    save_adapter(model, tmp_path / "adapter")
    base = ModelConfig(path=str(tmp_path / "base"), dtype="float32", attention="eager")
    export_merged(base, tmp_path / "adapter", tmp_path / "merged")
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = model(IDS, use_cache=False).logits
    assert torch.allclose(reread(IDS, use_cache=False).logits, expected, atol=1e-4 * expected.abs().max().item())


def test_a_quantised_base_keeps_its_experts_and_says_so(tmp_path: Path) -> None:
    tiny("qwen3_moe", tmp_path)
    config = ModelConfig(path=str(tmp_path), dtype="bfloat16", quantize="nf4")
    model: Any = open_model(config)
    created = inject(model, "lora", {"r": 2})
    formats = {weight_format(adapter.base.weight) for adapter in created.values() if adapter.num_matrices > 1}
    assert formats == {"plain"}
    assert {weight_format(adapter.base.weight) for adapter in created.values()} == {"plain", "4bit"}
    loss_of(model(IDS, use_cache=False).logits.float()).backward()
    assert all(gradient_of(parameter).any() for name, parameter in trained_parameters(model).items() if ".B" in name)
    said = str(summarize_model(model, config))
    assert "linears in nf4 (not the experts, which bitsandbytes leaves in bfloat16)" in said
    planned = StaticMemory(open_shape(config), {"zero_optimization": {"stage": 0}}, 1, 8, gpu=False)
    assert "frozen weights, experts in bfloat16" in [item.name for item in planned.parts()]
