"""Copies of adapters in the base's dtype: the same numbers as casts, never stale, in one call, and products shared."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from subspace.adapters.base import Adapter
from subspace.adapters.inject import adapters, inject, remove_adapters, trained_parameters
from subspace.adapters.merging import merge, unmerge
from subspace.adapters.registry import list_methods
from tests.helpers.op_counts import Launches
from tests.helpers.tiny_models import EARLY_SCHEDULES, tiny_llama

METHODS = list_methods()
RECOMPUTED = ["lora", "dora", "flora", "pissa"]
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[5, 9, 33, 7, 120, 64, 3, 17], [8, 8, 250, 31, 2, 90, 4, 11]])


def adapted(method: str = "lora", dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    """Return a tiny model in 16 bits, in training, with moved float32 adapters."""
    torch.manual_seed(0)
    model: Any = tiny_llama().to(dtype)  # type: ignore[arg-type]
    several = METHODS[method].site == "linear" and method != "parallel"
    inject(model, method, {**EARLY_SCHEDULES.get(method, {}), **settings}, targets=TARGETS if several else None)
    torch.manual_seed(1)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def loss(model: Any) -> Tensor:
    torch.manual_seed(2)  # of dropout
    logits = model(IDS, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())


def without_copies(model: nn.Module) -> None:
    """Leave each site its own casts and products."""
    for adapter in adapters(model).values():
        adapter.copies.detach()
    if isinstance(model, PreTrainedModel):
        with torch.no_grad():
            assert not counted(lambda: loss(model))["_foreach_copy_"]


def outcome(model: Any, passes: int = 1, of: Callable[[Any], Tensor] = loss) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Return the loss and the gradients after as many micro-batches."""
    for _ in range(passes):
        value = of(model)
        value.backward()  # type: ignore[no-untyped-call]
    return value.detach(), {name: p.grad for name, p in trained_parameters(model).items()}


def assert_same(found: Any, expected: Any, rounding: float) -> None:
    """``rounding`` is relative to a tensor's length."""
    assert torch.allclose(found[0], expected[0], rtol=rounding / 10, atol=0)
    for name, gradient in expected[1].items():
        other = found[1][name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or other.dtype == gradient.dtype
        assert gradient is None or (other - gradient).norm() <= rounding * gradient.norm() + 1e-12, name


def counted(run: Callable[[], Any]) -> Counter[str]:
    with Launches() as launches:
        run()
    found: Counter[str] = launches.by_name
    return found


@pytest.mark.parametrize(("method", "recompute"), [(m, False) for m in METHODS] + [(m, True) for m in RECOMPUTED])
def test_loss_and_gradients_are_those_of_casts(method: str, recompute: bool) -> None:
    found, plain = adapted(method), adapted(method)
    without_copies(plain)
    for model in (found, plain):
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(outcome(found, passes=2), outcome(plain, passes=2), 0.04)
    copies = next(iter(adapters(found).values())).copies
    assert not copies._look  # every tensor that was asked for had been declared, or it would look for it again


@pytest.mark.parametrize("method", ["lora", "dora", "flora", "pissa", "ssb"])
def test_a_float32_model_computes_as_without(method: str) -> None:
    found, plain = adapted(method, torch.float32), adapted(method, torch.float32)
    without_copies(plain)
    assert_same(outcome(found, passes=2), outcome(plain, passes=2), 0.0)
    assert not counted(lambda: loss(found).backward())["_foreach_copy"]  # type: ignore[no-untyped-call]


def test_all_are_copied_by_one_call_a_pass_and_a_modules_gradients_by_one() -> None:
    model = adapted()
    frozen: Any = tiny_llama().bfloat16()
    value = loss(model)
    forward, backward = counted(lambda: loss(model)), counted(value.backward)
    assert forward["_foreach_copy_"] == 1
    assert forward["_to_copy"] == counted(lambda: loss(frozen))["_to_copy"]
    assert backward["_foreach_copy_"] == 2 * 2  # layers, of an attention and an MLP each


def test_gradients_are_taken_over_and_not_copied() -> None:
    model, plain = adapted(), tiny_llama().bfloat16()
    plain.get_input_embeddings().weight.requires_grad_()
    first, second = (counted(loss(model).backward) for _ in range(2))
    assert first["clone"] <= counted(loss(plain).backward)["clone"]
    assert second["add_"] - first["add_"] == len(trained_parameters(model))


MOVES: dict[str, Callable[[nn.Parameter], Any]] = {
    "by an optimizer": lambda p: torch.optim.SGD([p], lr=1.0).step(),
    "by a fused optimizer": lambda p: torch.optim.AdamW([p], lr=1.0, fused=True).step(),
    "past autograd": lambda p: p.data.mul_(3.0),
    "with other memory": lambda p: setattr(p, "data", 3 * p.data),
    "as memory": lambda p: p.data.numpy().__imul__(3.0),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "its parts"])
def test_a_copy_is_never_stale(move: str, whole: bool) -> None:
    """Whoever moves a tensor, in whatever way, and tells nobody."""
    model = adapted()
    site, adapter = next((name, a) for name, a in adapters(model).items() if name.endswith("up_proj"))
    outcome(model)
    parameter = adapter.trained()["A"]
    with torch.no_grad():
        MOVES[move](parameter)
    x = torch.randn(3, 64, dtype=torch.bfloat16)

    def run(of: nn.Module) -> Tensor:
        part: Any = of if whole else of.get_submodule(site)
        with torch.no_grad():
            return part(IDS, use_cache=False).logits if whole else part(x)  # type: ignore[no-any-return]

    plain = copy.deepcopy(model)
    without_copies(plain)
    assert torch.equal(run(model), run(plain))
    before = adapted()
    assert not torch.equal(run(model), run(before))


def test_a_tensor_that_was_replaced_is_seen() -> None:
    model = adapted()
    loss(model)
    adapter: Any = next(iter(adapters(model).values()))
    adapter.B = nn.Parameter(3 * adapter.B.data)
    plain = copy.deepcopy(model)
    without_copies(plain)
    for _ in range(2):  # with a cast of its own, and copied
        assert_same(outcome(model), outcome(plain), 0.05)
    assert adapter.B.grad is not None
    assert not adapter.copies._look


def test_sites_that_read_one_input_share_its_products() -> None:
    model = adapted()
    hidden = torch.randn(2, 8, 64, dtype=torch.bfloat16, requires_grad=True)
    layers = 2

    def of(model: Any) -> Any:
        return model(inputs_embeds=hidden, use_cache=False).logits.float().square().mean()

    found = [counted(lambda: of(model)), counted(of(model).backward)]
    without_copies(model)
    plain = [counted(lambda: of(model)), counted(of(model).backward)]
    products = [calls["mm"] + calls["addmm"] + calls["addmm_"] for calls in (*found, *plain)]
    assert products[2] - products[0] == 2 * layers  # q, k, v: one of x instead of three
    assert products[3] - products[1] == 4 * layers  # and of the gradients of x and of A
    assert found[1]["cat"] - plain[1]["cat"] == layers


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_each_site_has_a_dropout_mask_of_its_own(dropout: float) -> None:
    found, plain = adapted(dropout=dropout), adapted(dropout=dropout)
    without_copies(plain)
    assert_same(outcome(found), outcome(plain), 0.02)
    calls, own = counted(lambda: loss(found)), counted(lambda: loss(plain))
    assert (calls["mm"] == own["mm"]) == bool(dropout)


def test_a_site_without_dropout_multiplies_for_none_with_it() -> None:
    found, plain = (reading("qkv", targets="") for _ in range(2))
    for model in (found, plain):
        inject(model, "lora", targets=list("qkv"), patterns={"k": {"dropout": 0.3}})
    without_copies(plain)
    assert_same(outcome(found, 1, of_rows), outcome(plain, 1, of_rows), 0.03)
    assert counted(lambda: of_rows(found))["mm"] == counted(lambda: of_rows(plain))["mm"]


class Reader(nn.Module):
    """A module that holds sites, and calls them as ``order`` says."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.order = order
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for letter in self.order:
            if letter == "x":
                x = x * 1.5
            else:
                out = out + getattr(self, letter)(x)
        return out


class Model(nn.Module):
    """A model whose middle layer is a Reader."""

    def __init__(self, order: str, recompute: str = "") -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(16, 16), Reader(order), nn.Linear(16, 16)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).requires_grad_()
        if self.recompute:
            x = checkpoint(self.middle, x, use_reentrant=self.recompute == "reentrant")
        else:
            x = self.middle(x)
        out: Tensor = self.last(x)
        return out


def reading(order: str, recompute: str = "", targets: str = "qkvo") -> Any:
    torch.manual_seed(3)
    model = Model(order, recompute).bfloat16()
    if targets:
        inject(model, "lora", {"r": 2, "alpha": 3}, targets=list(targets))
    for parameter in trained_parameters(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def of_rows(model: Any) -> Tensor:
    torch.manual_seed(5)
    return model(torch.randn(7, 16, dtype=torch.bfloat16)).float().square().mean()  # type: ignore[no-any-return]


ORDERS = ["qkv", "qkvo", "q", "vq", "qkvxo", "qxkv", "qkvqkv", "qqkv", "oxqkv", "kxv"]


@pytest.mark.parametrize("recompute", ["", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("targets", ["qkvo", "qv"])
def test_sites_may_be_called_in_any_order(order: str, recompute: str, targets: str) -> None:
    """Some not at all, some twice, some with another input, some not adapted."""
    found, plain = (reading(order, recompute, targets) for _ in range(2))
    without_copies(plain)
    assert_same(outcome(found, 2, of_rows), outcome(plain, 2, of_rows), 0.03)
    pending = found.middle.q.copies._pending
    assert pending is None or recompute  # of what was recomputed last, until the next pass


@pytest.mark.parametrize("recompute", ["", "non-reentrant"])
def test_two_passes_may_come_before_their_backward_passes(recompute: str) -> None:
    def twice(model: Any) -> Tensor:
        one, other = of_rows(model), 3 * of_rows(model)
        with torch.no_grad():
            of_rows(model)
        return one + other

    found, plain = (reading("qkvo", recompute) for _ in range(2))
    without_copies(plain)
    assert_same(outcome(found, 2, twice), outcome(plain, 2, twice), 0.03)


@pytest.mark.parametrize("recompute", ["", "non-reentrant"])
def test_a_part_of_the_model_may_be_called_by_itself(recompute: str) -> None:
    def alone(model: Any) -> Tensor:
        torch.manual_seed(5)
        x = torch.randn(7, 16, dtype=torch.bfloat16, requires_grad=True)
        y: Any = checkpoint(model.middle, x, use_reentrant=False) if recompute else model.middle(x)
        mean: Tensor = y.float().square().mean()
        return mean

    found, plain = (reading("qkvo") for _ in range(2))
    without_copies(plain)
    outcome(found, 1, of_rows), outcome(plain, 1, of_rows)
    assert_same(outcome(found, 1, alone), outcome(plain, 1, alone), 0.03)


@pytest.mark.parametrize("hook", ["pre", "full backward"])
def test_hooks_may_stand_between(hook: str) -> None:
    def hooked() -> Any:
        model = reading("qkv")
        if hook == "pre":
            model.middle.k.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
        else:
            for module in (model.middle.k, model.middle.v):
                module.register_full_backward_hook(lambda module, given, seen: (2 * given[0],))
        return model

    found, plain = hooked(), hooked()
    without_copies(plain)
    assert_same(outcome(found, 2, of_rows), outcome(plain, 2, of_rows), 0.03)


def test_an_input_that_is_written_to_is_not_taken_for_the_same() -> None:
    class Writes(Reader):
        def forward(self, x: Tensor) -> Tensor:
            first: Tensor = self.q(x)
            with torch.no_grad():
                x.add_(1.0)
            out: Tensor = first + self.k(x)
            return out

    found, plain = reading("qk"), reading("qk")
    without_copies(plain)
    for model in (found, plain):
        model.middle.__class__ = Writes
    assert torch.allclose(of_rows(found), of_rows(plain), rtol=0.01)


def test_a_gradient_that_many_readers_have_is_added_up_in_float32() -> None:
    def by_hand(model: Any, times: int) -> Tensor:
        torch.manual_seed(5)
        x = torch.randn(64, 16, dtype=torch.bfloat16)
        model.times = times
        return model(x).float().square().mean()  # type: ignore[no-any-return]

    class Often(Model):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return torch.stack([self.middle.q(y * (1 + n)) for n in range(self.times)])  # type: ignore[arg-type]

    found = reading("q", targets="q")
    found.__class__ = Often
    plain = copy.deepcopy(found)
    without_copies(plain)
    one, other = (outcome(model, 1, lambda m: by_hand(m, 30)) for model in (found, plain))
    assert_same(one, other, 1e-6)


def test_no_activation_is_kept() -> None:
    model = reading("qk")  # v and o were expected, too
    seen: list[weakref.ref[Tensor]] = []
    model.middle.q.register_forward_pre_hook(lambda module, inputs: seen.append(weakref.ref(inputs[0])))
    outcome(model, 1, of_rows)
    gc.collect()
    assert len(seen) == 1
    assert seen[0]() is None


def test_a_model_is_freed_with_its_last_name() -> None:
    """By counting references, as without copies: nothing of it waits for the collector of cycles."""
    model = reading("qkv")
    outcome(model, 1, of_rows)
    kept = weakref.ref(model.middle.q.base.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert kept() is None
    finally:
        gc.enable()


def test_a_copied_model_has_copies_of_its_own() -> None:
    model = adapted()
    outcome(model)
    other = copy.deepcopy(model)
    assert next(iter(adapters(other).values())).copies is not next(iter(adapters(model).values())).copies
    assert len({id(adapter.copies) for adapter in adapters(other).values()}) == 1
    for parameter in trained_parameters(other).values():
        parameter.data.mul_(2.0)
        parameter.grad = None
    plain = copy.deepcopy(other)
    without_copies(plain)
    assert_same(outcome(other), outcome(plain), 0.02)


def test_adapters_are_removed_without_a_trace() -> None:
    model = adapted()
    remove_adapters(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_tensors_that_lose_their_values_are_not_copied() -> None:
    """As those that ZeRO-3 shards, after the model has run: it puts an empty tensor in their place."""
    model = adapted()
    loss(model)
    adapter: Any = list(adapters(model).values())[-1]
    values = adapter.A.data
    adapter.A.data = torch.empty(0)
    adapter.register_forward_pre_hook(lambda module, inputs: setattr(module.A, "data", values))  # as its hooks gather
    assert not counted(lambda: loss(model))["_foreach_copy_"]


def test_adapters_that_come_back_are_copied_again() -> None:
    model = adapted()
    merge(model)
    assert not counted(lambda: loss(model))["_foreach_copy_"]
    unmerge(model)
    loss(model)  # by casts; here they are seen
    assert counted(lambda: loss(model))["_foreach_copy_"] == 1


def test_adapters_of_two_injections_share_their_copies() -> None:
    model = adapted("lora")
    inject(model, "ssl", targets=["gate_proj", "o_proj"])
    for adapter in adapters(model).values():
        for parameter in adapter.trained().values():
            parameter.requires_grad_()
    plain = copy.deepcopy(model)
    without_copies(plain)
    assert_same(outcome(model), outcome(plain), 0.02)
    assert counted(lambda: loss(model))["_foreach_copy_"] == 1


def test_a_frozen_tensor_gets_no_gradient() -> None:
    found, plain = adapted(), adapted()
    without_copies(plain)
    for model in (found, plain):
        for site, adapter in adapters(model).items():
            if "k_proj" in site:
                adapter.requires_grad_(False)
    assert_same(outcome(found), outcome(plain), 0.02)


@pytest.mark.filterwarnings("default")  # torch's compiler looks where it is warned not to
def test_a_compiled_module_rounds_by_itself() -> None:
    """In one graph, which does not depend on the pass."""
    found, plain = reading("qkvo"), reading("qkvo")
    without_copies(plain)
    torch.compiler.reset()
    counter = CompileCounter()
    found.middle.compile(backend=counter, fullgraph=True)
    assert_same(outcome(found, 3, of_rows), outcome(plain, 3, of_rows), 0.03)
    assert counter.frame_count == 1


def test_a_second_derivative_is_right() -> None:
    def curvature(model: Any) -> list[Tensor]:
        q = model.middle.q
        (first,) = torch.autograd.grad(of_rows(model), q.A, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [q.B, model.middle.k.B]))

    found, plain = reading("qkv"), reading("qkv")
    without_copies(plain)
    for one, other in zip(curvature(found), curvature(plain), strict=True):
        assert (one - other).norm() <= 0.05 * other.norm()


def test_every_adapter_has_the_models_copies() -> None:
    """Or the fast path would be off without a sign."""
    model = adapted()
    found: list[Adapter] = list(adapters(model).values())
    assert all(adapter.copies is found[0].copies for adapter in found)
    assert [site for site, adapter in adapters(model).items() if adapter.ends_sublayer] == [
        f"model.layers.{n}.mlp.down_proj" for n in range(2)
    ]
