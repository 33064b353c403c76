"""Methods that HF PEFT has too, with the same tensors: the same outputs and gradients, layer by layer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.adapters.base import Adapter, TrainProgress
from subspace.adapters.inject import adapters, inject, trained_parameters
from subspace.adapters.merging import merge
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess
from tests.helpers.tiny_models import tiny, tiny_llama

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", reason="the oracle is a test requirement: pip install -r tests/requirements.txt")

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[5, 9, 33, 7, 120, 64, 3, 17], [8, 8, 250, 31, 2, 90, 4, 11]])


def pair(
    ours: str, settings: dict[str, Any], theirs: Any, targets: list[str] | None = TARGETS
) -> tuple[nn.Module, Any]:
    mine = tiny_llama()
    inject(mine, ours, settings, targets=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.get_peft_model(tiny_llama(), theirs)
    torch.manual_seed(3)
    for parameter in trained_parameters(mine).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return mine, other


def copy_to(other: Any, mine: nn.Module, names: dict[str, str]) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Give PEFT's tensors our values; return the pairs."""
    theirs = dict(other.named_parameters())
    pairs = {}
    for site, adapter in adapters(mine).items():
        for key, template in names.items():
            target = theirs[template.format(site=f"base_model.model.{site}")]
            source = adapter.trained()[key]
            target.data = source.detach().reshape(target.shape).clone()
            pairs[f"{site}.{key}"] = (source, target)
    return pairs


def compare(mine: Any, other: Any, pairs: dict[str, tuple[nn.Parameter, nn.Parameter]]) -> None:
    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())

    own, their = mine(IDS, use_cache=False).logits, other(IDS, use_cache=False).logits
    assert torch.allclose(own, their, atol=2e-4)
    assert (own - tiny_llama()(IDS).logits).abs().max() > 0.05
    loss(own).backward()  # type: ignore[no-untyped-call]
    loss(their).backward()  # type: ignore[no-untyped-call]
    for name, (a, b) in pairs.items():
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad.reshape(a.shape), atol=1e-4 * a.grad.abs().max().item() + 1e-7), name


LORA = {"A": "{site}.lora_A.default.weight", "B": "{site}.lora_B.default.weight"}


@pytest.mark.parametrize("rslora", [False, True])
def test_lora(rslora: bool) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_rslora=rslora)
    mine, other = pair("lora", {"r": 4, "alpha": 8, "rslora": rslora}, config)
    compare(mine, other, copy_to(other, mine, LORA))


def test_dora() -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True)
    mine, other = pair("dora", {"r": 4, "alpha": 8}, config)
    compare(mine, other, copy_to(other, mine, {**LORA, "m": "{site}.lora_magnitude_vector.default.weight"}))


IA3 = {"l": "{site}.ia3_l.default"}


def test_dora_of_lengths_and_norms_from_factors() -> None:
    """The merged weight too, with the norm that PEFT computes from a dense product."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True)
    mine, other = pair("dora", {"r": 4, "alpha": 8}, config)
    copy_to(other, mine, {**LORA, "m": "{site}.lora_magnitude_vector.default.weight"})
    merge(mine)
    merged = other.merge_and_unload()
    weights = dict(merged.named_parameters())
    assert all(torch.allclose(p, weights[name], atol=1e-5) for name, p in mine.named_parameters())


def test_ia3_of_the_paper_scales_outputs() -> None:
    config = peft.IA3Config(target_modules=TARGETS, feedforward_modules=[])
    mine, other = pair("ia3", {}, config)
    compare(mine, other, copy_to(other, mine, IA3))


def test_ia3_as_it_was_published() -> None:
    config = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    mine, other = pair("ia3", {"variant": "original"}, config, targets=None)
    compare(mine, other, copy_to(other, mine, IA3))


def test_ia3_scales_the_bias_as_peft_does() -> None:
    config = peft.IA3Config(target_modules=["q_proj", "k_proj"], feedforward_modules=[])
    mine = tiny("qwen2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.get_peft_model(tiny("qwen2"), config)
    inject(mine, "ia3", targets=["q_proj", "k_proj"])
    for parameter in trained_parameters(mine).values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    copy_to(other, mine, IA3)
    assert torch.allclose(mine(IDS).logits, other(IDS).logits, atol=2e-4)
    assert (mine(IDS).logits - tiny("qwen2")(IDS).logits).abs().max() > 0.05


def test_liera_is_hira_with_the_scale_in_the_up_factor() -> None:
    mine, other = pair("liera", {"r": 4, "alpha": 8}, peft.HiraConfig(r=4, target_modules=TARGETS))
    pairs = copy_to(other, mine, {"A": "{site}.hira_A.default", "B": "{site}.hira_B.default"})
    for name, (_, theirs) in pairs.items():
        if name.endswith(".B"):
            theirs.data *= 2  # alpha / r
    own, their = mine(IDS, use_cache=False).logits, other(IDS, use_cache=False).logits
    assert torch.allclose(own, their, atol=2e-4)
    assert (own - tiny_llama()(IDS).logits).abs().max() > 0.05
    for logits in (own, their):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    for name, (a, b) in pairs.items():
        factor = 2 if name.endswith(".B") else 1
        assert torch.allclose(a.grad, factor * b.grad, atol=1e-4 * a.grad.abs().max().item()), name  # type: ignore[operator, union-attr, arg-type]


@pytest.mark.parametrize("method", ["trilora", "adalora"])
def test_triplets_are_adaloras_layer(method: str) -> None:
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=8,
        target_modules=TARGETS,
        total_step=100,
        tinit=10,
        tfinal=30,
        orth_reg_weight=0,
    )
    mine, other = pair(method, {"r": 4, "alpha": 8}, config)
    other.eval()
    names = {"A": "{site}.lora_A.default", "B": "{site}.lora_B.default", "E": "{site}.lora_E.default"}
    compare(mine.eval(), other, copy_to(other, mine, names))


def test_pissa_by_steps_of_descent() -> None:
    """PEFT replaces W by its residual; we keep W and subtract. Both must stay together while they train."""
    mine = tiny_llama()
    inject(mine, "pissa", {"r": 4}, targets=TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights="pissa")
        other = peft.get_peft_model(tiny_llama(), config)
    start = tiny_llama()(IDS).logits
    for step in range(5):
        for model in (mine, other):
            logits = model(IDS).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.data -= 0.05 * parameter.grad
                    parameter.grad = None
        assert torch.allclose(mine(IDS).logits, other(IDS).logits, atol=2e-3), step
    assert (mine(IDS).logits - start).abs().max() > 0.2


def test_pissa_starts_from_pefts_factors() -> None:
    mine = tiny_llama()
    inject(mine, "pissa", {"r": 4}, targets=["up_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["up_proj"], init_lora_weights="pissa")
        other = peft.get_peft_model(tiny_llama(), config)
    theirs = dict(other.named_parameters())
    for site, adapter in adapters(mine).items():
        A, B = (theirs[f"base_model.model.{site}.lora_{key}.default.weight"] for key in "AB")
        assert torch.allclose(adapter.trained()["B"] @ adapter.trained()["A"], B @ A, atol=1e-5)
        assert torch.allclose(B.T @ B, A @ A.T, atol=1e-5)


def test_ssl_is_ia3_on_the_input() -> None:
    config = peft.IA3Config(target_modules=TARGETS, feedforward_modules=TARGETS)
    mine, other = pair("ssl", {}, config)
    compare(mine, other, copy_to(other, mine, {"d": "{site}.ia3_l.default"}))


def test_adalora_allocates_as_peft_does() -> None:
    steps, warm_up, cool_down = 40, 0.1, 0.25
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, target_modules=TARGETS, total_step=steps, tinit=4, tfinal=10, deltaT=3
    )
    settings = {"r": 4, "target_r": 2, "alpha": 8, "warm_up": warm_up, "cool_down": cool_down, "every": 3}
    mine, other = pair("adalora", settings, config)
    names = {"A": "{site}.lora_A.default", "B": "{site}.lora_B.default", "E": "{site}.lora_E.default"}
    pairs = copy_to(other, mine, names)
    group: list[Adapter] = list(adapters(mine).values())
    allocator = other.base_model.rankallocator
    generator = torch.Generator().manual_seed(4)
    patterns = []
    for step in range(1, steps + 1):
        for own, their in pairs.values():
            own.grad = torch.randn(own.shape, generator=generator)
            their.grad = own.grad.reshape(their.shape).clone()
        type(group[0]).before_step(group, TrainProgress(step, steps), DeepSpeedOptimizerAccess())
        for own, their in pairs.values():
            own.data -= 0.01 * own.grad  # type: ignore[operator]
            their.data -= 0.01 * their.grad  # type: ignore[operator]
        type(group[0]).after_step(group, TrainProgress(step, steps), DeepSpeedOptimizerAccess())
        allocator.update_and_allocate(other.base_model, step)
        ours = [own.ne(0) for name, (own, _) in pairs.items() if name.endswith(".E")]
        theirs = [their.ne(0).flatten() for name, (_, their) in pairs.items() if name.endswith(".E")]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), f"step {step}"
        patterns.append(sum(int(p.sum()) for p in ours))
    assert patterns[0] == 40
    assert patterns[-1] == 20


def test_prefix_with_peft_positions() -> None:
    n = 5
    mine = tiny_llama()
    inject(mine, "prefix", {"n": n})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n)
        other = peft.get_peft_model(tiny_llama(), config).eval()
    # PEFT keeps one row per virtual token: keys and values of each layer in turn, heads times head dimension wide.
    rows = torch.cat(
        [t.transpose(0, 1).flatten(1) for a in adapters(mine).values() for t in a.trained().values()], dim=1
    )
    other.prompt_encoder["default"].embedding.weight.data = rows.detach()
    positions = torch.arange(n, n + IDS.shape[1]).expand_as(IDS)
    own = mine(IDS, position_ids=positions, use_cache=False).logits
    their = other(IDS, attention_mask=torch.ones_like(IDS)).logits
    assert torch.allclose(own, their, atol=2e-4)


def test_bitfit_is_beft() -> None:
    config = peft.BeftConfig(target_modules=TARGETS)
    mine, other = pair("bitfit", {}, config)
    compare(mine, other, copy_to(other, mine, {"beta": "{site}.beft_bias.default"}))


P_TUNING = {
    f"{kind[0]}{layer + 1}".replace("w", "W"): f"mlp_head.{2 * layer}.{kind}"
    for layer in range(3)
    for kind in ("weight", "bias")
}


@pytest.mark.parametrize(
    ("method", "settings", "kind", "names"),
    [
        ("prompt", {}, "PromptTuningConfig", {"P": "embedding.weight"}),
        ("p-tuning", {"hidden": 32}, "PromptEncoderConfig", {"Z": "embedding.weight", **P_TUNING}),
    ],
)
def test_prompts(method: str, settings: dict[str, Any], kind: str, names: dict[str, str]) -> None:
    n = 5
    mine = tiny_llama()
    (adapter,) = inject(mine, method, {"n": n, **settings}).values()
    more = {"encoder_hidden_size": settings["hidden"]} if settings else {}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=n, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.get_peft_model(tiny_llama(), config).eval()
    theirs = dict(other.prompt_encoder["default"].named_parameters())
    assert sum(p.numel() for p in theirs.values()) == sum(p.numel() for p in trained_parameters(mine).values())
    for key, name in names.items():
        theirs[name].data = adapter.trained()[key].detach().clone()
    mask = torch.ones_like(IDS)
    own, their = mine(IDS, attention_mask=mask, use_cache=False).logits, other(IDS, attention_mask=mask).logits[:, n:]
    assert torch.equal(own, their)
    seen = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    (own * seen).sum().backward()
    (their * seen).sum().backward()
    for key, name in names.items():
        expected = theirs[name].grad
        assert expected is not None
        assert torch.allclose(adapter.trained()[key].grad, expected, atol=1e-5 * float(expected.abs().max()))  # type: ignore[arg-type]


@pytest.mark.long
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h"])
def test_lora_at_experts_is_pefts_target_parameters(architecture: str, rslora: bool) -> None:
    """PEFT adds dW to the stack, ours multiplies by its factors: same updates, outputs and gradients."""
    names = ["up_proj" if architecture == "nemotron_h" else "gate_up_proj", "down_proj"]
    mine, frozen = tiny(architecture), tiny(architecture)
    inject(mine, "lora", {"r": 2, "alpha": 4, "rslora": rslora}, targets=[rf"experts\.{name}" for name in names])
    torch.manual_seed(3)
    for parameter in trained_parameters(mine).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    wanted = [f"experts.{name}" for name in names]
    config = peft.LoraConfig(r=2, lora_alpha=4, use_rslora=rslora, target_modules=[], target_parameters=wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other: Any = peft.get_peft_model(tiny(architecture), config)
    wrappers = {}
    for name, module in other.named_modules():
        if hasattr(module, "parameter_name"):
            holder = name.removeprefix("base_model.model.").partition(".experts")[0]
            wrappers[f"{holder}.experts.{module.parameter_name}"] = module
    assert wrappers.keys() == adapters(mine).keys()
    for site, adapter in adapters(mine).items():
        A, B = adapter.trained()["A"].detach(), adapter.trained()["B"].detach()
        wrappers[site].lora_A["default"].weight.data = A.flatten(0, 1).clone()
        wrappers[site].lora_B["default"].weight.data = B.permute(1, 2, 0).flatten(1).clone()
        merged = adapter.merged()["weight"]
        assert merged is not None
        update = merged - adapter.base.weight
        theirs = wrappers[site].get_delta_weight("default")
        assert torch.allclose(update, theirs, atol=1e-5 * theirs.abs().max().item())
    own, their = mine(IDS, use_cache=False).logits, other(IDS, use_cache=False).logits
    assert torch.allclose(own, their, atol=2e-5 * their.abs().max().item())
    assert (own - frozen(IDS, use_cache=False).logits).abs().max() > 1e-3 * their.abs().max()
    for logits in (own, their):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    for site, adapter in adapters(mine).items():
        count, wrapper = adapter.num_matrices, wrappers[site]
        A = wrapper.lora_A["default"].weight.grad.unflatten(0, (count, -1))
        B = wrapper.lora_B["default"].weight.grad.unflatten(1, (-1, count)).permute(2, 0, 1)
        for name, exact in (("A", A), ("B", B)):
            found = adapter.trained()[name].grad
            assert found is not None
            assert torch.allclose(found, exact, atol=1e-4 * exact.abs().max().item()), (site, name)
