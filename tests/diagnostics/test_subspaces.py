"""Updates whose place among W's directions is known, and what is measured of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from subspace.adapters.inject import inject
from subspace.diagnostics.inspect import _update
from subspace.diagnostics.subspaces import (
    Frozen,
    Site,
    between,
    decompose,
    dense_update,
    factored_update,
    measure,
    same_task_directions,
)

OUT, IN = 60, 40


@pytest.fixture(scope="module")
def frozen() -> Frozen:
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, IN, dtype=torch.float64)).Q for n in (OUT, IN))
    return decompose(((U * torch.logspace(1, -1, IN, dtype=torch.float64)) @ V.T).float())


def measured(frozen: Frozen, dW: Tensor) -> Site:
    return measure(frozen, dense_update(dW))


def test_an_update_of_singular_values_is_diagonal(frozen: Frozen) -> None:
    """Its task directions are found in the order of the change for their size."""
    chosen = [5, 20, 11, 30]
    by = torch.zeros(IN, dtype=torch.float64)
    by[chosen] = frozen.s[chosen] * torch.tensor([0.2, 0.4, 0.1, 0.3], dtype=torch.float64)
    site = measured(frozen, (frozen.U * by) @ frozen.V.T)
    assert site.diagonal == pytest.approx(1)
    assert site.span == pytest.approx(1)
    assert site.task_directions[:4] == (20, 30, 5, 11)
    assert (site.directions, site.intruders) == (4, 0)


def test_an_update_from_one_direction_to_another(frozen: Frozen) -> None:
    site = measured(frozen, 0.1 * torch.outer(frozen.U[:, 3], frozen.V[:, 7]))
    assert site.diagonal == pytest.approx(0, abs=1e-12)
    assert site.span == pytest.approx(1)
    assert site.amplification is None  # nothing of W leads there
    assert (site.entropy_rank, site.stable_rank, site.rank_90) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("end", ["top", "bottom"])
def test_the_largest_and_the_smallest_directions(frozen: Frozen, end: str) -> None:
    part = slice(None, 4) if end == "top" else slice(-4, None)
    site = measured(frozen, 0.01 * frozen.U[:, part] @ torch.diag(torch.arange(1.0, 5).double()) @ frozen.V[:, part].T)
    found = {"top": (site.top_out, site.top_in), "bottom": (site.bottom_out, site.bottom_in)}
    assert found.pop(end) == pytest.approx((1, 1))
    assert next(iter(found.values())) == pytest.approx((0, 0), abs=1e-9)
    assert site.energy[0 if end == "top" else -1] == pytest.approx(1)
    assert site.smallest_decile == (0 if end == "top" else 1)


def test_what_leaves_ws_space_intrudes(frozen: Frozen) -> None:
    outside = torch.linalg.qr(torch.cat([frozen.U, torch.randn(OUT, 3, dtype=torch.float64)], 1)).Q[:, IN:]
    site = measured(frozen, 100 * outside @ torch.linalg.qr(torch.randn(IN, 3, dtype=torch.float64)).Q.T)
    assert site.span == pytest.approx(0, abs=1e-12)
    assert site.intruders == 3
    assert site.spectrum_change > 1


def test_chance_is_what_random_updates_have(frozen: Frozen) -> None:
    torch.manual_seed(1)
    sites = [measure(frozen, factored_update(torch.randn(4, IN), 1e-3 * torch.randn(OUT, 4)), n) for n in range(60)]

    def mean(name: str) -> float:
        return float(sum(getattr(site, name) for site in sites) / len(sites))

    assert sites[0].diagonal_chance == 1 / OUT
    assert mean("diagonal") == pytest.approx(1 / OUT, rel=0.2)
    assert mean("top_out") == pytest.approx(sites[0].out_chance, rel=0.2)
    assert mean("bottom_in") == pytest.approx(sites[0].in_chance, rel=0.2)
    assert mean("smallest_decile") == pytest.approx(mean("smallest_chance"), rel=0.2)
    shared = [same_task_directions(one, other) or 0.0 for one, other in itertools.pairwise(sites)]
    assert mean("task_chance") == pytest.approx(sum(shared) / len(shared), rel=0.15)
    assert mean("task_chance") > 2 * 8 / IN  # small directions are the same for all
    assert mean("span") == pytest.approx(IN / OUT, rel=0.1)


def test_factors_and_their_product_are_the_same_update(frozen: Frozen) -> None:
    """And so are other factors of the same product."""
    torch.manual_seed(2)
    A, B = torch.randn(3, IN, dtype=torch.float64), torch.randn(OUT, 3, dtype=torch.float64)
    G = torch.randn(3, 3, dtype=torch.float64)
    one = measure(frozen, factored_update(A, B))
    for other in (factored_update(G @ A, B @ torch.linalg.inv(G)), dense_update(B @ A)):
        site = measure(frozen, other)
        assert site.task_directions == one.task_directions
        for name in ("relative", "diagonal", "span", "scale", "top_out", "amplification", "entropy_rank"):
            assert getattr(site, name) == pytest.approx(getattr(one, name), rel=1e-8), name
        assert between(factored_update(A, B), other) == pytest.approx(1)


def test_scaled_rows_and_columns(frozen: Frozen) -> None:
    torch.manual_seed(3)
    rows, columns = torch.rand(OUT, dtype=torch.float64), torch.rand(IN, dtype=torch.float64)
    assert measured(frozen, rows[:, None] * frozen.W + frozen.W * columns).scale == pytest.approx(1, abs=1e-6)
    random = measured(frozen, torch.randn(OUT, IN, dtype=torch.float64))
    assert random.scale == pytest.approx((OUT + IN - 1) / (OUT * IN), rel=0.6)


def test_no_update(frozen: Frozen) -> None:
    for nothing in (dense_update(torch.zeros(OUT, IN)), factored_update(torch.randn(2, IN), torch.zeros(OUT, 2))):
        site = measure(frozen, nothing)
        assert (site.directions, site.relative, site.amplification) == (0, 0, None)
        assert between(nothing, nothing) is None
        assert same_task_directions(site, site) is None


@pytest.mark.parametrize(
    ("method", "quantity"),
    [("svdiff", "diagonal"), ("sam-parser", "diagonal"), ("ssb", "scale"), ("ssl", "scale"), ("ia3", "scale")],
)
def test_methods_that_can_do_no_other(method: str, quantity: str) -> None:
    torch.manual_seed(4)
    linear = nn.Linear(IN, OUT, bias=False)
    model, W = nn.Sequential(linear), linear.weight.data.clone()
    (adapter,) = inject(model, method, targets=["0"]).values()
    for parameter in adapter.trained().values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    with torch.no_grad():
        site = measure(decompose(W), _update(adapter, W))
    if method == "ssb":  # the product of both scales is beyond their sum
        assert site.scale is not None
        assert site.scale > 0.99
    else:
        assert getattr(site, quantity) == pytest.approx(1, abs=1e-4)
    assert {tensor.dtype for tensor in adapter.own_tensors().values()} == {torch.float32}
