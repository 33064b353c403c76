"""Dropout on a CPU: what is dropped, how often, and that the backward pass drops the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subspace.kernels.dropout import SPARSE, dropout


@pytest.mark.parametrize("p", [0.01, 0.05, 0.3, 0.6])
def test_drops_its_share_and_scales_the_rest(p: float) -> None:
    torch.manual_seed(1)
    dropped = dropout(torch.ones(400, 500), p)
    assert set(dropped.flatten().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    share = (dropped == 0).double().mean().item()
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / dropped.numel()) ** 0.5)


def test_every_value_is_as_likely_to_be_dropped_whatever_happens_to_its_neighbor() -> None:
    torch.manual_seed(1)
    p, draws = 0.2, 20_000
    dropped = torch.stack([dropout(torch.ones(7), p) for _ in range(draws)]) == 0
    off = 5 * (p * (1 - p) / draws) ** 0.5
    assert torch.allclose(dropped.double().mean(0), torch.full((7,), p, dtype=torch.float64), atol=off)
    both = (dropped[:, 1:] & dropped[:, :-1]).double().mean(0)
    assert torch.allclose(both, torch.full((6,), p**2, dtype=torch.float64), atol=off)


@pytest.mark.parametrize("p", [0.1, SPARSE + 0.1])
def test_the_gradient_passes_where_the_value_does(p: float) -> None:
    torch.manual_seed(1)
    x = torch.randn(30, 20, 40).transpose(0, 1).requires_grad_()
    seen = torch.randn(20, 30, 40)
    out = dropout(x, p)
    out.backward(seen)  # type: ignore[no-untyped-call]
    assert torch.allclose(out, torch.where(out == 0, 0, x / (1 - p)))
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.where(out == 0, 0, seen / (1 - p)))


def test_drops_the_same_where_activations_are_recomputed() -> None:
    x = torch.randn(30, 40, requires_grad=True)

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(1)
        return torch.autograd.grad(loss(x), x)[0]

    def loss(x: Tensor) -> Tensor:
        return dropout(x, 0.3).sin().sum()

    assert torch.equal(gradient(loss), gradient(lambda x: checkpoint(loss, x, use_reentrant=False)))


def test_the_seed_decides() -> None:
    x = torch.randn(50, 60)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.05))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_nothing_is_dropped_in_eval_mode_or_at_zero() -> None:
    x = torch.randn(4)
    assert dropout(x, 0.3, training=False) is x
    assert dropout(x, 0.0) is x
    assert not dropout(x, 1.0).any()
