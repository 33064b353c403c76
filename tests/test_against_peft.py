"""Methods that HF PEFT has too, with the same tensors: the same outputs and gradients, layer by layer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.inject import adapters, inject, trained_parameters
from subspace.method import Adapter, Clock
from subspace.zero import Access
from tests.tiny import tiny_llama

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", reason="the oracle is a test requirement: pip install -r tests/requirements.txt")

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[5, 9, 33, 7, 120, 64, 3, 17], [8, 8, 250, 31, 2, 90, 4, 11]])


def pair(ours: str, settings: dict[str, Any], theirs: Any) -> tuple[nn.Module, Any]:
    mine = tiny_llama()
    inject(mine, ours, settings, targets=None if ours == "prefix" else TARGETS)
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


def test_ssl_is_ia3_on_the_input() -> None:
    config = peft.IA3Config(target_modules=TARGETS, feedforward_modules=TARGETS)
    mine, other = pair("ssl", {}, config)
    compare(mine, other, copy_to(other, mine, {"d": "{site}.ia3_l.default"}))


def test_adalora_layer() -> None:
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
    mine, other = pair("adalora", {"r": 4, "alpha": 8, "orthogonality": 0.0}, config)
    other.eval()
    names = {"A": "{site}.lora_A.default", "B": "{site}.lora_B.default", "E": "{site}.lora_E.default"}
    compare(mine.eval(), other, copy_to(other, mine, names))


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
        type(group[0]).before_step(group, Clock(step, steps), Access())
        for own, their in pairs.values():
            own.data -= 0.01 * own.grad  # type: ignore[operator]
            their.data -= 0.01 * their.grad  # type: ignore[operator]
        type(group[0]).after_step(group, Clock(step, steps), Access())
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
