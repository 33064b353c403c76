"""Properties that every registered method has. A method is tested by existing: the register is the list of cases."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from subspace.adapters.base import ROLES, SITES, Adapter, LinearAdapter, TrainProgress
from subspace.adapters.inject import adapter_groups, adapters, inject, parameter_roles, trained_parameters
from subspace.adapters.penalties import with_penalties
from subspace.adapters.registry import list_methods, resolve_method
from subspace.errors import UserError
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess
from tests.helpers.tiny_models import EARLY_SCHEDULES, tiny, tiny_llama

METHODS = list_methods()
LINEAR = [name for name, cls in METHODS.items() if issubclass(cls, LinearAdapter) and cls.mergeable]
#: Settings with which each fits a layer of 6 to 5.
SMALL = {name: {"r": 3} for name in ("pissa", "milora", "spectral")} | {"lora-dash": {"d": 3}}
IDS = torch.tensor([[5, 9, 33, 7, 120, 64, 3, 17], [8, 8, 250, 31, 2, 90, 4, 11]])


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> type[Adapter]:
    return METHODS[request.param]


@pytest.fixture(params=LINEAR)
def linear_method(request: pytest.FixtureRequest) -> type[Adapter]:
    return METHODS[request.param]


def adapted(
    method: type[Adapter], architecture: str = "llama", dtype: torch.dtype = torch.float64, **settings: Any
) -> PreTrainedModel:
    model = tiny(architecture)
    model.to(dtype)  # type: ignore[arg-type]
    inject(model, method.name, {**EARLY_SCHEDULES.get(method.name, {}), **settings}, seed=3)
    for adapter in adapters(model).values():
        for tensor in (*adapter.own_tensors().values(), *adapter.buffers(recurse=False)):
            tensor.data = tensor.data.to(dtype)
    return model


def launch(model: nn.Module) -> None:
    """Bring schedules to where every tensor moves."""
    for group in adapter_groups(model):
        if group[0].delayed_grad_params:
            type(group[0]).after_step(group, TrainProgress(group[0].config.launch, 30), DeepSpeedOptimizerAccess())


def perturb(model: nn.Module, scale: float = 0.1) -> None:
    torch.manual_seed(11)
    for parameter in trained_parameters(model).values():
        parameter.data += scale * torch.randn_like(parameter)


def logits(model: PreTrainedModel, **arguments: Any) -> Tensor:
    return model(IDS, use_cache=False, **arguments).logits  # type: ignore[no-any-return]


def loss(model: PreTrainedModel) -> Tensor:
    return with_penalties(F.cross_entropy(logits(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()), model)


def one(method: type[Adapter], n_in: int = 6, n_out: int = 5, bias: bool = True) -> tuple[LinearAdapter, nn.Linear]:
    torch.manual_seed(5)
    base = nn.Linear(n_in, n_out, bias=bias)
    adapter = method(base, method.Config(**SMALL.get(method.name, {})))
    assert isinstance(adapter, LinearAdapter)
    with torch.no_grad():
        adapter.init_from_weight(base.weight)
    base.double(), adapter.double()
    launch(adapter)
    for parameter in adapter.trained().values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return adapter, base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_the_frozen_model(method: type[Adapter], dtype: torch.dtype) -> None:
    if not method.identity_at_init:
        pytest.skip(f"{method.name} declares that it does not")
    frozen = logits(tiny_llama().to(dtype)).float()  # type: ignore[arg-type]
    model = tiny_llama().to(dtype)  # type: ignore[arg-type]
    inject(model, method.name, EARLY_SCHEDULES.get(method.name, {}))
    launch(model)
    rounding = method.identity_tolerance * (1 if dtype == torch.float32 else 1000)
    assert (logits(model).float() - frozen).abs().max() <= rounding * frozen.abs().max()


def test_changes_the_model_when_it_moves(method: type[Adapter]) -> None:
    model = adapted(method)
    before = logits(model)
    perturb(model)
    assert (logits(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_equation(linear_method: type[Adapter], bias: bool) -> None:
    adapter, base = one(linear_method, bias=bias)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    expected = F.linear(x, adapter.weight(base.weight.detach()), adapter.bias(adapter.base_bias()))
    assert torch.allclose(adapter(x), expected, atol=1e-10)
    assert not torch.allclose(adapter(x), base(x), atol=1e-3)


def test_forward_has_the_equations_gradients(linear_method: type[Adapter]) -> None:
    simple = {"simple": False} if "simple" in {f.name for f in dataclasses.fields(linear_method.Config)} else {}
    adapter, base = one(linear_method)
    adapter.config = dataclasses.replace(adapter.config, **simple)
    x, seen = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    trained = list(adapter.trained().values())
    cheap = torch.autograd.grad((adapter.eval()(x) * seen).sum(), trained)
    dense = torch.autograd.grad(
        (F.linear(x, adapter.weight(base.weight), adapter.bias(base.bias)) * seen).sum(), trained
    )
    for fast, slow in zip(cheap, dense, strict=True):
        assert torch.allclose(fast, slow, atol=1e-9)


def test_trains_every_tensor_that_it_declares_and_no_other(method: type[Adapter]) -> None:
    model = adapted(method)
    perturb(model)
    launch(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    model.train()
    loss(model).backward()  # type: ignore[no-untyped-call]
    declared = {f"{site}.{name}" for site, adapter in adapters(model).items() for name in adapter.trained()}
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert declared == moved
    assert all(torch.equal(frozen[name], p) for name, p in model.named_parameters() if not p.requires_grad)


def test_trains_as_many_numbers_as_it_says(method: type[Adapter]) -> None:
    for adapter in adapters(adapted(method)).values():
        scope = dict(vars(adapter.config))
        if hasattr(adapter, "in_features"):
            scope.update(n_in=adapter.in_features, n_out=adapter.out_features)
        elif method.site == "module":
            scope.update(n_values=sum(p.numel() for p in adapter.original_params.values()))
        else:
            scope.update(n_kv=adapter.num_kv_heads * adapter.head_dim, heads=adapter.num_heads)  # type: ignore[operator]
        counted = sum(p.numel() for p in adapter.trained().values()) - adapter.idle_params()
        assert counted == eval(method.num_params, {}, scope)


def test_every_trained_tensor_has_a_role(method: type[Adapter]) -> None:
    model = adapted(method)
    assert parameter_roles(model).keys() == trained_parameters(model).keys()
    assert set(parameter_roles(model).values()) <= ROLES.keys()
    assert method.site in SITES


def test_merging_keeps_the_function(linear_method: type[Adapter]) -> None:
    adapter, base = one(linear_method)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = adapter.eval()(x)
    merged = nn.Linear(6, 5).double()
    merged.weight.data, merged.bias.data = adapter.weight(base.weight.data), adapter.bias(base.bias.data)  # type: ignore[assignment]
    assert torch.allclose(merged(x), expected, atol=1e-10)


def test_learns(method: type[Adapter]) -> None:
    model = adapted(method, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(list(trained_parameters(model).values()), lr=0.01)
    losses: list[float] = []
    for step in range(30):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()  # type: ignore[no-untyped-call]
        for group in adapter_groups(model):
            type(group[0]).before_step(group, TrainProgress(step + 1, 30), DeepSpeedOptimizerAccess())
        optimizer.step()
        for group in adapter_groups(model):
            type(group[0]).after_step(group, TrainProgress(step + 1, 30), DeepSpeedOptimizerAccess())
        losses.append(value.item())
    assert losses[-1] < 0.75 * losses[0]


def test_state_dict_restores_it(method: type[Adapter]) -> None:
    model, other = adapted(method), adapted(method)
    perturb(model)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(logits(model), logits(other))


def test_tensors_are_contiguous(method: type[Adapter]) -> None:
    assert all(
        t.is_contiguous() for adapter in adapters(adapted(method)).values() for t in adapter.own_tensors().values()
    )


def test_bfloat16_base_keeps_float32_adapters(method: type[Adapter]) -> None:
    model = tiny_llama().bfloat16()
    inject(model, method.name, seed=3)
    perturb(model, 0.02)
    exact = tiny_llama().bfloat16().float()  # type: ignore[no-untyped-call]
    inject(exact, method.name, seed=3)
    perturb(exact, 0.02)
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
    assert (logits(model).float() - logits(exact)).norm() < 0.05 * logits(exact).norm()
    loss(model).backward()  # type: ignore[no-untyped-call]
    assert all(torch.isfinite(p.grad).all() for p in trained_parameters(model).values() if p.grad is not None)


def test_gradient_checkpointing_changes_nothing(method: type[Adapter]) -> None:
    gradients = []
    for recompute in (False, True):
        model = adapted(method).train()
        perturb(model)
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss(model).backward()  # type: ignore[no-untyped-call]
        gradients.append({name: p.grad for name, p in trained_parameters(model).items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.allclose(gradient, gradients[1][name], atol=1e-10), name  # type: ignore[arg-type]


def test_padding_does_not_matter(method: type[Adapter]) -> None:
    model = adapted(method)
    perturb(model)
    ids = F.pad(IDS, (0, 3), value=1)
    mask = F.pad(torch.ones_like(IDS), (0, 3))
    padded = model(ids, attention_mask=mask, use_cache=False).logits[:, : IDS.shape[1]]
    assert torch.allclose(padded, logits(model), atol=1e-10)


def test_key_value_cache_gives_the_same(method: type[Adapter]) -> None:
    model = adapted(method)
    perturb(model)
    first = model(IDS[:, :5], use_cache=True)
    second = model(IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
    assert torch.allclose(second, logits(model)[:, 5:], atol=1e-10)


def test_start_depends_on_seed_and_site_alone(method: type[Adapter]) -> None:
    torch.manual_seed(1)
    whole = tiny_llama()
    inject(whole, method.name, seed=7)
    torch.manual_seed(2)
    part = tiny_llama()
    alone = method.site == "embedding"  # there is one only
    inject(part, method.name, seed=7, targets=None if alone else [r".*layers\.1\..*"])
    other = tiny_llama()
    inject(other, method.name, seed=8)
    same = trained_parameters(whole)
    shared = {name: p for name, p in trained_parameters(part).items() if name in same}
    assert 0 < len(shared) < len(same) + alone
    assert all(torch.equal(same[name], p) for name, p in shared.items())
    random = method.weight_access not in ("largest", "smallest") and method.family != "reference"
    drawn = [name for name, p in same.items() if random and p.std() > 0 and parameter_roles(whole)[name] != "scale"]
    assert all(not torch.equal(same[name], trained_parameters(other)[name]) for name in drawn)


def test_document_cites_and_shows(method: type[Adapter]) -> None:
    module = inspect.getmodule(method)
    assert module is not None
    manual = module.__doc__ or ""
    assert "arXiv:" in manual
    assert ".. math::" in manual
    assert len(Path(inspect.getfile(method)).read_text().splitlines()) < 100


@pytest.mark.parametrize("name", ["LORA", "Lora", "lora"])
def test_letter_case_is_free(name: str) -> None:
    assert resolve_method(name)[0].name == "lora"


def test_alias() -> None:
    assert resolve_method("P_Tuning_v2")[0].name == "prefix"


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no method is called 'dorra'. Did you mean 'dora'"):
        resolve_method("dorra")[0]


def test_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(UserError, match="lora has no setting 'alhpa'. Did you mean 'alpha'"):
        inject(tiny_llama(), "lora", {"alhpa": 3})


def test_value_out_of_bounds_is_refused() -> None:
    with pytest.raises(UserError, match="r is 0, but it must lie in"):
        inject(tiny_llama(), "lora", {"r": 0})


def test_second_method_keeps_the_first_trained() -> None:
    model = tiny_llama()
    inject(model, "lora", targets=["q_proj"])
    inject(model, "ssl", targets=["up_proj"])
    assert {type(a).name for a in adapters(model).values()} == {"lora", "ssl"}
    assert trained_parameters(model).keys() == parameter_roles(model).keys()
