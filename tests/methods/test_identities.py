"""What must be true of a method by its mathematics, on random tensors: independent of how it is written.

The numbers in brackets are those of the list of oracles that the methods were specified with.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.adapters.base import LinearAdapter, TrainProgress
from subspace.adapters.linalg import bottom_singular_triplets, full_svd, spectral_entropy, top_singular_triplets
from subspace.adapters.registry import list_methods, resolve_method
from subspace.errors import UserError
from subspace.kernels.dropout import dropout
from subspace.methods.flexlora import FlexLoRA, moves
from subspace.methods.lora import LoRA
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess

OUT, IN = 24, 20


def make(name: str, *, seed: int = 1, bias: bool = True, moved: float = 0.3, **settings: Any) -> Any:
    """Return an adapter of a random layer, in float64, with trained tensors that have moved."""
    torch.manual_seed(seed)
    base = nn.Linear(IN, OUT, bias=bias)
    cls, presets = resolve_method(name)
    adapter = cls(base, cls.Config(**{**presets, **settings}))
    with torch.no_grad():
        adapter.init_from_weight(base.weight)
    base.double(), adapter.double()
    torch.manual_seed(seed + 1)
    for parameter in adapter.trained().values():
        parameter.data += moved * torch.randn_like(parameter)
    return adapter


def frozen(adapter: LinearAdapter) -> Tensor:
    return adapter.base.weight.detach()  # type: ignore[no-any-return]


def update(adapter: LinearAdapter) -> Tensor:
    return (adapter.weight(frozen(adapter)) - frozen(adapter)).detach()


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-9))


LOW_RANK: dict[str, tuple[dict[str, Any], int]] = {
    "lora": ({"r": 3}, 3),
    "trilora": ({"r": 3}, 3),
    "adalora": ({"r": 3}, 3),
    "flexlora": ({"r": 3, "headroom": 2}, 5),
    "flora": ({"r": 3}, 3),
    "moslora": ({"r": 3}, 3),
    "pissa": ({"r": 3}, 6),
    "milora": ({"r": 3}, 6),
    "spectral": ({"r": 3}, 6),
    "lora-dash": ({"r": 3, "d": 4}, 7),
    "svdiff": ({"p": 3}, 3),
    "sam-parser": ({"p": 3}, 3),
}


@pytest.mark.parametrize("name", LOW_RANK)
def test_as_a_lora_it_is_the_same_update_of_the_stated_rank(name: str) -> None:
    """[9, 12]."""
    settings, expected = LOW_RANK[name]
    adapter = make(name, **settings)
    if name == "lora-dash":
        adapter.U.copy_(torch.randn_like(adapter.U))
        adapter.Vt.copy_(torch.randn_like(adapter.Vt))
    if name == "flexlora":
        adapter.alive.fill_(1)
    A, B = adapter.to_lora()
    assert A.shape == (expected, IN)
    assert B.shape == (OUT, expected)
    assert torch.allclose(B @ A, update(adapter), atol=1e-12)
    assert rank(update(adapter)) == expected


def test_every_method_with_a_lora_form_is_in_the_table() -> None:
    forms = {name for name, cls in list_methods().items() if issubclass(cls, LinearAdapter) and cls.mergeable}
    none = {name for name in forms if name in ("dora", "liera", "ia3", "ssl", "ssb", "bitfit", "full")}
    assert forms - none - LOW_RANK.keys() == set()


@pytest.mark.parametrize(
    ("name", "core", "settings"), [("flora", "G", {}), ("moslora", "M", {}), ("flora", "G", {"r_out": 5})]
)
def test_a_core_is_lora_with_a_mixed_factor(name: str, core: str, settings: dict[str, Any]) -> None:
    """[9, 26]."""
    adapter = make(name, r=3, **settings)
    mixed = getattr(adapter, core) @ adapter.A
    assert torch.allclose(update(adapter), adapter.scale * adapter.B @ mixed, atol=1e-12)


@pytest.mark.parametrize("name", ["flora", "moslora"])
def test_with_an_identity_core_it_is_lora(name: str) -> None:
    """[26]."""
    adapter, lora = make(name, r=3), make("lora", r=3)
    getattr(adapter, {"flora": "G", "moslora": "M"}[name]).data = torch.eye(3).double()
    lora.A.data, lora.B.data = adapter.A.data, adapter.B.data
    x = torch.randn(5, IN).double()
    assert torch.allclose(adapter(x), lora(x), atol=1e-12)


def test_mixer_leaves_loras_first_gradient_of_the_up_factor() -> None:
    """[26]."""
    adapter, lora = make("moslora", r=3, moved=0.0), make("lora", r=3, moved=0.0)
    adapter.M.data, lora.A.data = torch.eye(3).double(), adapter.A.data
    x, seen = torch.randn(5, IN).double(), torch.randn(5, OUT).double()
    for each in (adapter, lora):
        (each(x) * seen).sum().backward()
    assert adapter.B.grad.abs().max() > 0.1
    assert torch.allclose(adapter.B.grad, lora.B.grad, atol=1e-12)


def test_scales_are_diagonal_matrices() -> None:
    """[15]."""
    adapter = make("ssb")
    W = frozen(adapter)
    assert torch.allclose(adapter.weight(W), torch.diag(adapter.l) @ W @ torch.diag(adapter.d))
    x, c = torch.randn(5, IN).double(), 3.0
    before = adapter(x)
    adapter.l.data *= c
    adapter.d.data /= c
    assert torch.allclose(adapter(x), before)


@pytest.mark.parametrize("name", ["ia3", "ssl", "ssb"])
def test_gradient_of_a_scale_is_the_dense_one_summed(name: str) -> None:
    """[15]."""
    adapter = make(name, bias=False)
    x, seen = torch.randn(5, IN).double(), torch.randn(5, OUT).double()
    (adapter(x) * seen).sum().backward()
    W, dense = frozen(adapter), seen.T @ x  # the gradient with respect to a dense W'
    for key, parameter in adapter.trained().items():
        other = {"ssb.l": adapter.trained().get("d"), "ssb.d": adapter.trained().get("l")}.get(f"{name}.{key}")
        scaled = dense * W
        if other is not None:
            scaled = scaled * (other[None, :] if key == "l" else other[:, None])
        expected = scaled.sum(dim=1 if key == "l" else 0)
        assert torch.allclose(parameter.grad, expected)


def test_ia3_variants_differ_in_the_side_and_the_bias() -> None:
    output = make("ia3")
    x = torch.randn(5, IN).double()
    assert torch.allclose(output(x), output.base(x) * output.l)
    plain = make("ia3", scale_bias=False)
    assert torch.allclose(plain(x), (x @ frozen(plain).T) * plain.l + plain.base.bias)
    assert torch.allclose(make("ia3", side="input")(x), make("ssl")(x))


@pytest.mark.parametrize("settings", [{}, {"p": 5}])
def test_singular_values_alone_move(settings: dict[str, Any]) -> None:
    """[16]."""
    adapter = make("sam-parser", **settings)
    U, sigma, Vt = full_svd(frozen(adapter).float())
    core = U.double().T @ adapter.weight(frozen(adapter)) @ Vt.double().T
    assert torch.allclose(core, torch.diag(core.diagonal()), atol=1e-5)
    expected = torch.cat([adapter.s, sigma[len(adapter.s) :].double()])
    assert torch.allclose(core.diagonal(), expected, atol=1e-5)


def test_gradient_of_a_singular_value() -> None:
    """[16]."""
    adapter = make("sam-parser")
    x, seen = torch.randn(5, IN).double(), torch.randn(5, OUT).double()
    (adapter(x) * seen).sum().backward()
    assert torch.allclose(adapter.s.grad, (adapter.U * (seen.T @ x @ adapter.Vt.T)).sum(0))


def test_svdiff_removes_a_direction_and_cannot_bring_it_back() -> None:
    """[17]."""
    adapter = make("svdiff", moved=0.0)
    assert rank(adapter.weight(frozen(adapter))) == IN
    adapter.delta.data[4] = -adapter.sigma[4] - 0.1
    assert rank(adapter.weight(frozen(adapter))) == IN - 1
    adapter(torch.randn(5, IN).double()).square().sum().backward()
    assert adapter.delta.grad[4] == 0
    assert (adapter.delta.grad != 0).sum() == IN - 1


def test_spectral_adapter_by_its_definition() -> None:
    """[18]."""
    adapter = make("spectral", r=4)
    U, sigma, Vt = adapter.U, adapter.sigma, adapter.Vt
    P, Q = adapter.P, adapter.Q
    expanded = P * sigma @ Vt + U * sigma @ Q.T + P * sigma @ Q.T
    assert torch.allclose(update(adapter), expanded, atol=1e-12)
    adapter.P.data, adapter.Q.data = 0.1 * U, torch.zeros_like(Q)
    after = torch.linalg.svdvals(adapter.weight(frozen(adapter)))
    expected = torch.linalg.svdvals(frozen(adapter))
    expected[:4] *= 1.1
    assert torch.allclose(after, expected, atol=1e-5)


def test_principal_and_minor_parts_are_apart() -> None:
    """[2, 19]."""
    pissa, milora = make("pissa", r=4, moved=0.0), make("milora", r=4, moved=0.0)
    assert (pissa.B0.T @ milora.B0).abs().max() < 1e-6
    assert (pissa.A0 @ milora.A0.T).abs().max() < 1e-6
    sigma = torch.linalg.svdvals(frozen(pissa))
    assert torch.allclose(pissa.B.T @ pissa.B, torch.diag(sigma[:4]), atol=1e-5)
    assert torch.allclose(pissa.A @ pissa.A.T, torch.diag(sigma[:4]), atol=1e-5)
    assert torch.allclose(milora.A @ milora.A.T, torch.diag(sigma[-4:]), atol=1e-5)
    for name in ("pissa", "milora"):
        everything = make(name, r=IN, moved=0.0)
        assert torch.allclose(everything.scale * everything.B @ everything.A, frozen(everything), atol=1e-5)


@pytest.mark.parametrize("name", ["pissa", "milora"])
def test_dropout_is_on_the_trained_part_only(name: str) -> None:
    """As published, where what is not trained stands in the frozen weight."""
    adapter = make(name, r=3, dropout=0.5).train()
    x = torch.randn(7, IN, dtype=torch.float64)
    torch.manual_seed(5)
    found = adapter(x)
    torch.manual_seed(5)
    dropped = dropout(x, 0.5)
    rest = frozen(adapter) - adapter.scale * adapter.B0 @ adapter.A0
    expected = F.linear(x, rest, adapter.base.bias) + adapter.scale * F.linear(F.linear(dropped, adapter.A), adapter.B)
    assert not torch.equal(dropped, x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["pissa", "milora", "spectral"])
def test_more_directions_than_there_are_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"r=21 singular directions of a layer that has 20. Set method.r=20"):
        make(name, r=21)


def test_liera() -> None:
    """[20]."""
    adapter = make("liera", r=3, alpha=3)
    W = frozen(adapter)
    assert rank(update(adapter)) == IN
    adapter.base.weight.data[2, 3] = 0.0
    assert adapter.weight(W)[2, 3] == 0
    adapter.A.data, adapter.B.data = torch.full((3, IN), 0.5).double(), torch.full((OUT, 3), 0.2).double()
    assert torch.allclose(adapter.weight(W), W * (1 + 3 * 0.1), atol=1e-12)


def test_liera_first_order_and_exponential_agree_to_second_order() -> None:
    """[20]."""
    gaps = []
    for size in (1e-2, 1e-3):
        first, exact = make("liera", r=3, alpha=3 * size), make("liera", r=3, alpha=3 * size, form="exp")
        gaps.append(float((update(first) - update(exact)).norm()))
    assert 90 < gaps[0] / gaps[1] < 110


@pytest.mark.parametrize("form", ["first-order", "exp"])
def test_liera_gradients_in_tiles(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """[31]."""
    monkeypatch.setattr(importlib.import_module("subspace.methods.liera"), "ROWS", 7)
    adapter = make("liera", r=3, form=form)
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        adapter.A.data, adapter.B.data = A.detach(), B.detach()
        return adapter_function(x, A, B, adapter)

    assert torch.autograd.gradcheck(run, (x, adapter.A, adapter.B))


def adapter_function(x: Tensor, A: Tensor, B: Tensor, adapter: Any) -> Tensor:
    from subspace.methods.liera import _Update

    return _Update.apply(x, A, B, adapter)  # type: ignore[no-any-return, no-untyped-call]


def test_dora_rows_have_the_trained_lengths() -> None:
    """[21]."""
    adapter = make("dora", r=3)
    assert torch.allclose(adapter.weight(frozen(adapter)).norm(dim=1), adapter.m.abs())
    x = torch.randn(5, IN).double()
    before = adapter(x)
    adapter.A.data /= 7.0
    adapter.B.data *= 7.0
    assert torch.allclose(adapter(x), before)


def test_dora_of_lengths_alone_is_a_scaled_output() -> None:
    adapter = make("dora", direction=False)
    assert adapter.trained().keys() == {"m"}
    x = torch.randn(5, IN).double()
    scale = adapter.m / frozen(adapter).norm(dim=1)
    assert torch.allclose(adapter(x), (x @ frozen(adapter).T) * scale + adapter.base.bias)


def test_dora_keeps_its_norm_where_that_is_safe() -> None:
    adapter, x = make("dora", r=3), torch.randn(5, IN).double()
    calls: list[int] = []
    adapter.base.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    adapter(x), adapter(x)
    assert calls == [3, 5, 3, 5]  # nobody promised to tell of changes
    adapter.clear_cache()
    calls.clear()
    adapter(x), adapter(x)
    assert calls == [3, 5, 5]
    adapter.clear_cache()
    adapter.A.data *= 2
    assert not torch.allclose(adapter(x), make("dora", r=3)(x))
    adapter.load_state_dict(make("dora", r=3).state_dict())
    assert torch.allclose(adapter(x), make("dora", r=3)(x))


def dash(direction: int, size: float) -> Any:
    """Return an adapter whose low-rank update is ``size`` along one singular direction of W."""
    adapter = make("lora-dash", r=1, alpha=2, d=1, launch=4, moved=0.0)
    U, _, Vt = full_svd(frozen(adapter).float())
    adapter.A.data, adapter.B.data = Vt[direction][None].double(), size / 2 * U[:, direction, None].double()
    return adapter


def test_dash_finds_the_direction_that_changes() -> None:
    """[22]."""
    adapter = dash(5, 0.7)
    x = torch.randn(5, IN).double()
    before = adapter(x)
    type(adapter).after_step([adapter], TrainProgress(3, 10), DeepSpeedOptimizerAccess())
    assert not adapter.U.any()
    type(adapter).after_step([adapter], TrainProgress(4, 10), DeepSpeedOptimizerAccess())
    U, _, Vt = full_svd(frozen(adapter).float())
    assert torch.allclose(adapter.U[:, 0].float(), U[:, 5], atol=1e-5)
    assert torch.allclose(adapter.Vt[0].float(), Vt[5], atol=1e-5)
    assert torch.equal(adapter(x), before)
    adapter.delta.data[:] = 2.0
    expected = before + 2.0 * (x @ Vt[5].double())[:, None] * U[:, 5].double()
    assert torch.allclose(adapter(x), expected, atol=1e-5)


def test_dash_prefers_what_changes_most_for_its_size() -> None:
    """[22]."""
    adapter = dash(0, 0.5)
    U, sigma, Vt = full_svd(frozen(adapter).float())
    small = 0.9 * 0.5 * float(sigma[-1] / sigma[0]) + 0.2 * 0.5
    adapter.A.data = torch.stack([Vt[0], Vt[-1]]).double()
    adapter.B.data = 0.5 * torch.stack([0.5 * U[:, 0], small * U[:, -1]], dim=1).double()
    type(adapter).after_step([adapter], TrainProgress(4, 10), DeepSpeedOptimizerAccess())
    assert torch.allclose(adapter.Vt[0].float(), Vt[-1], atol=1e-5)


def test_each_of_dashs_branches_drops_by_a_mask_of_its_own() -> None:
    """As in the authors' code. The two branches are opposite here, so that a common mask would cancel."""
    adapter: Any = make("lora-dash", r=1, d=1, alpha=1.0, dropout=0.2, moved=0.0)
    adapter.A.data.fill_(1.0), adapter.Vt.fill_(1.0), adapter.delta.data.fill_(1.0)
    adapter.U[:, 0] = torch.randn(OUT).double()
    adapter.B.data.copy_(-adapter.U)
    x = torch.ones(4000, IN).double()
    of_one = IN * 0.2 / 0.8  # the variance of a sum of IN dropped ones
    torch.manual_seed(5)
    sums = (adapter.train()(x) - adapter.frozen(x)) @ adapter.U[:, 0] / adapter.U.square().sum()
    assert sums.var().item() == pytest.approx(2 * of_one, rel=0.1)
    assert torch.allclose(adapter.eval()(x), adapter.frozen(x))


def test_entropy() -> None:
    """[24]."""
    assert spectral_entropy(torch.tensor([2.0, -2.0, 2.0])) == pytest.approx(1.0)
    assert spectral_entropy(torch.tensor([0.0, 5.0, 0.0])) == pytest.approx(0.0)
    assert spectral_entropy(torch.zeros(3)) == 1.0
    assert spectral_entropy(torch.tensor([3.0])) == 0.0
    expected = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8)) / math.log(2)
    assert spectral_entropy(torch.tensor([1.0, 2.0])) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("paper", [4, 3, 2, 1, 1, 0, 0, 0, 0, 0, 0]),
        ("code", [4, 4, 4, 4, 4, 4, 3, 3, 2, 1, 0]),
        ("constant", [4] * 11),
    ],
)
def test_flexlora_moves_fall_as_tabulated(decay: str, expected: list[int]) -> None:
    """[24]. The paper's falls as (1 - p)^3, the code's as 1 - p^3; the values are worked out at p = 0, 0.1, ... 1."""
    config = FlexLoRA.Config(moves=4, decay=decay)
    assert [moves(config, tenth / 10) for tenth in range(11)] == expected


def flex(E: list[float], alive: int, headroom: int = 1) -> FlexLoRA:
    adapter = make("flexlora", r=alive, headroom=headroom, every=1, moves=1, decay="constant", warm_up=0.0)
    adapter.E.data[:alive] = torch.tensor(E).double()
    assert isinstance(adapter, FlexLoRA)
    return adapter


def test_flexlora_moves_a_direction_from_the_peaked_to_the_even() -> None:
    """[24]."""
    peaked, even = flex([-5.0, 0.1, 0.2], 3), flex([1.0, 1.0, 1.0], 3)
    optimizer = torch.optim.AdamW([*peaked.parameters(), *even.parameters()], lr=0.1)
    x = torch.randn(5, IN).double()
    (peaked(x).square().sum() + even(x).square().sum()).backward()
    optimizer.step()
    peaked.E.data[:3], even.E.data[:3] = torch.tensor([-5.0, 0.1, 0.2]), torch.tensor([1.0, 1.0, 1.0])
    before, moments = even(x), optimizer.state[even.A]["exp_avg"].clone()
    FlexLoRA.after_step([peaked, even], TrainProgress(3, 10), DeepSpeedOptimizerAccess(optimizer=optimizer))
    assert peaked.alive.tolist() == [1, 0, 1, 0]
    assert even.alive.tolist() == [1, 1, 1, 1]
    assert torch.equal(even(x), before)  # the new direction's E is zero
    assert torch.equal(optimizer.state[even.A]["exp_avg"][:3], moments[:3])
    assert not optimizer.state[even.A]["exp_avg"][3].any()
    assert not optimizer.state[even.B]["exp_avg"][:, 3].any()
    assert 0.01 < even.A[3].std() < 0.03


def test_flexlora_leaves_single_directions_alone() -> None:
    """[24]."""
    lone, other = flex([0.5], 1), flex([1.0, 1.0], 2)
    FlexLoRA.after_step([lone, other], TrainProgress(3, 10), DeepSpeedOptimizerAccess())
    assert lone.alive.sum() == 1
    assert other.alive.sum() in (2, 3)


FACTORS = [name for name, cls in list_methods().items() if "constraint" in cls.Config.__dataclass_fields__]


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("constraint", ["mpc-o", "mpc-d"])
def test_constraints_have_the_closed_form_gradients(name: str, constraint: str) -> None:
    """[25]."""
    adapter = make(f"{name}+{constraint}", r=3, constraint_weight=0.5)
    adapter.penalty().backward()
    A, B, one = adapter.A.detach(), adapter.B.detach(), torch.eye(3).double()
    assert torch.allclose(adapter.A.grad, 0.5 * 4 * (A @ A.T - one) @ A)
    gap = B.T @ B - one if constraint == "mpc-o" else B.T @ B - torch.diag((B.T @ B).diagonal())
    assert torch.allclose(adapter.B.grad, 0.5 * 4 * B @ gap)


def test_constraints_vanish_where_they_should() -> None:
    """[25]."""
    orthonormal, _ = torch.linalg.qr(torch.randn(IN, 3).double())
    columns, _ = torch.linalg.qr(torch.randn(OUT, 3).double())
    for constraint, lengths in (("mpc-o", 1.0), ("mpc-d", torch.tensor([1.0, 5.0, 0.1]))):
        adapter = make(f"lora+{constraint}", r=3, constraint_weight=1.0)
        adapter.A.data, adapter.B.data = orthonormal.T, columns * lengths
        assert adapter.penalty() < 1e-20
    adapter.config = type(adapter.config)(**{**vars(adapter.config), "constraint": "orthogonal"})
    adapter.constraint = "orthogonal"
    assert adapter.penalty() > 1


def test_constraint_at_the_start_is_the_stated_size() -> None:
    # A A^T is about I / 3 and B is zero, so R_o is about 32 (4/9) + 32 = 46 at r = 32.
    torch.manual_seed(0)
    penalty = LoRA(nn.Linear(4096, 64), LoRA.Config(constraint="orthogonal", r=32, constraint_weight=1.0)).penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(46.3, abs=0.5)


def test_mean_constraint_is_shared_among_layers() -> None:
    whole_of_it = make("lora+mpc-o", r=3, constraint_weight=1.0)
    share = make("lora+mpc-o", r=3, constraint_weight=1.0, constraint_reduce="mean")
    share.num_siblings = 4
    assert torch.allclose(4 * share.penalty(), whole_of_it.penalty())
    norms = make("lora+mpc-o", r=3, constraint_weight=1.0, constraint_squared=False)
    assert norms.penalty() < whole_of_it.penalty()


def test_lora_without_a_linear_pattern() -> None:
    """[25]."""
    adapter, plain = make("lora+mpc-n", r=3), make("lora", r=3)
    x = torch.randn(5, IN).double()
    hidden = torch.relu(x @ adapter.A.T)
    assert torch.allclose(adapter(x), adapter.base(x) + adapter.scale * hidden @ adapter.B.T)
    assert not torch.allclose(adapter(x), plain(x))
    assert not adapter.mergeable
    with pytest.raises(UserError, match="lora with mpc-n has no weight"):
        adapter.weight(frozen(adapter))


@pytest.mark.parametrize("name", ["ssl+mpc-o", "adalora+mpc-o"])
def test_constraints_want_free_factors(name: str) -> None:
    with pytest.raises(UserError, match=r"mpc-o constrains two factors, which \w+ has not"):
        resolve_method(name)


def test_dora_has_no_nonlinear_form() -> None:
    with pytest.raises(UserError, match="dora has no form with mpc-n"):
        make("dora+mpc-n", r=3)


@pytest.mark.parametrize("name", ["LoRA+MPC_o", "lora+mpc-o", "Lora+Mpc_O"])
def test_the_papers_spelling_is_understood(name: str) -> None:
    cls, presets = resolve_method(name)
    assert (cls.name, presets) == ("lora", {"constraint": "orthogonal"})


def test_decompositions_agree_with_each_other() -> None:
    torch.manual_seed(0)
    W = torch.randn(1100, 1050) @ torch.diag(torch.linspace(3, 0.01, 1050) ** 2)
    U, sigma, Vt = full_svd(W)
    assert torch.allclose(U * sigma @ Vt, W, atol=1e-2)
    for part, where in ((top_singular_triplets(W, 8), slice(0, 8)), (bottom_singular_triplets(W, 8), slice(-8, None))):
        assert torch.allclose(part.sigma, sigma[where], rtol=2e-3)
    top = top_singular_triplets(W, 8)  # randomised at this size
    assert (top.U.T @ U[:, :8]).diagonal().min() > 0.99
    assert torch.equal(top_singular_triplets(W, 8).U, top.U)


def test_a_decomposition_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    W = torch.randn(9, 7)
    first = bottom_singular_triplets(W, 2)
    monkeypatch.setattr(torch.linalg, "svd", None)
    assert torch.equal(bottom_singular_triplets(W, 2).U, first.U)
    with pytest.raises(TypeError):
        bottom_singular_triplets(W + 1e-6, 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "name", [n for n, c in list_methods().items() if issubclass(c, LinearAdapter) and c.site == "linear"]
)
def test_no_dense_tensor_is_saved_for_the_backward_pass(name: str, bias: bool) -> None:
    """[31]: nothing of W's size but W itself and the method's own tensors."""
    torch.manual_seed(0)
    n_in, n_out, tokens = 96, 80, 4
    base = nn.Linear(n_in, n_out, bias=bias).requires_grad_(False)
    cls, presets = resolve_method(name)
    adapter = cls(base, cls.Config(**presets))
    with torch.no_grad():
        adapter.init_from_weight(base.weight)
    own = {t.untyped_storage().data_ptr() for t in (*adapter.parameters(), *adapter.buffers())}
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved.append(tensor.numel())
        return tensor

    x = torch.randn(tokens, n_in, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = adapter.train()(x)
    out.sum().backward()
    assert x.grad is not None
    # Low-rank factors have (n_in + n_out) * r values; with a rank as large as here they would hide a dense tensor.
    assert all(count < 0.5 * n_in * n_out for count in saved), sorted(saved)[-3:]
    assert F.linear(x, base.weight).numel() < 0.5 * n_in * n_out
