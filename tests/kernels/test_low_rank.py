"""A branch beside a frozen layer: what autograd would make of it, and where it writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.kernels.dropout import dropout
from subspace.kernels.low_rank import lora_down, lora_down_shared, lora_up_add, scale_rows

IN, OUT, RANK, SCALE = 12, 7, 3, 1.7
Branch = Callable[[Tensor, nn.Linear, Tensor, Tensor, float], Tensor]


def ours(x: Tensor, layer: nn.Linear, A: Tensor, B: Tensor, p: float) -> Tensor:
    x, h = lora_down(x, A, p)
    return lora_up_add(layer(x), torch.relu(h), B, SCALE)


def plainly(x: Tensor, layer: nn.Linear, A: Tensor, B: Tensor, p: float) -> Tensor:
    out: Tensor = layer(x) + SCALE * F.linear(torch.relu(F.linear(dropout(x, p), A)), B)
    return out


def results(of: Branch, p: float, *, bias: bool = False, seen: str = "values", trained: str = "xAB") -> list[Tensor]:
    """Return the output and what arrives at the input and the factors; the input goes elsewhere, too."""
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT, bias=bias, dtype=torch.float64).requires_grad_(False)
    x, A, B = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 5, IN), (RANK, IN), (OUT, RANK)))
    given = {"x": x.transpose(0, 1).contiguous().transpose(0, 1), "A": A, "B": B}  # as attention leaves it
    for name in trained:
        given[name].requires_grad_()
    out = of(given["x"], layer, given["A"], given["B"], p)
    total = out.sum() if seen == "sum" else (out * torch.randn(out.shape, dtype=torch.float64)).sum()
    if "x" in trained:
        total = total + given["x"].sin().sum()
    return [out.detach(), *torch.autograd.grad(total, [given[name] for name in trained])]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seen", ["values", "sum"])
@pytest.mark.parametrize("trained", ["xAB", "AB", "x", "xB"])
def test_it_is_what_autograd_makes(p: float, bias: bool, seen: str, trained: str) -> None:
    found, expected = (results(of, p, bias=bias, seen=seen, trained=trained) for of in (ours, plainly))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_the_update_is_written_into_the_output() -> None:
    y, h, B = torch.randn(4, OUT), torch.randn(4, RANK, requires_grad=True), torch.randn(OUT, RANK)
    expected = y + SCALE * h @ B.T
    assert lora_up_add(y, h, B, SCALE) is y
    assert torch.allclose(y, expected)


def test_a_view_is_not_written_to() -> None:
    """Others may hold what it is a view of."""
    whole = torch.randn(2, 4 * OUT)
    before = whole.clone()
    h, B = torch.randn(8, RANK, requires_grad=True), torch.randn(OUT, RANK)
    assert torch.allclose(lora_up_add(whole.view(8, OUT), h, B, SCALE), before.view(8, OUT) + SCALE * h @ B.T)
    assert torch.equal(whole, before)


def test_factors_are_rounded_to_what_they_meet() -> None:
    x = torch.randn(3, IN, dtype=torch.bfloat16, requires_grad=True)
    A, B = torch.randn(RANK, IN, requires_grad=True), torch.randn(OUT, RANK, requires_grad=True)
    through, h = lora_down(x, A)
    out = lora_up_add(through @ torch.randn(IN, OUT).bfloat16(), h, B)
    assert out.dtype == h.dtype == torch.bfloat16
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert A.grad is not None
    assert B.grad is not None
    assert A.grad.dtype == B.grad.dtype == torch.float32


def test_a_second_derivative_is_right() -> None:
    def curvature(of: Branch) -> Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(IN, OUT, bias=False, dtype=torch.float64).requires_grad_(False)
        x, A, B = (
            torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, IN), (RANK, IN), (OUT, RANK))
        )
        (first,) = torch.autograd.grad(of(x * 1.0, layer, A, B, 0.0).sin().sum(), A, create_graph=True)
        return torch.autograd.grad(first.square().sum(), B)[0]

    assert torch.allclose(curvature(ours), curvature(plainly))


def shared(used: str, dtype: torch.dtype = torch.float64, *, plainly: bool = False) -> tuple[Tensor, ...]:
    """Return what three sites of different ranks make of one input, and the gradients, of those in ``used``."""
    torch.manual_seed(0)
    ranks = {"q": 3, "k": 2, "v": 4}
    x = torch.randn(4, 5, IN, dtype=dtype, requires_grad=True)
    stacked = torch.randn(sum(ranks.values()), IN, dtype=dtype)
    factors = [factor.clone().requires_grad_() for factor in torch.split(stacked, list(ranks.values()))]
    if plainly:
        through, hidden = x, tuple(F.linear(x, factor) for factor in factors)
    else:
        through, hidden = lora_down_shared(x, stacked, factors)
    layers = [torch.randn(IN, OUT, dtype=dtype) for _ in ranks]
    parts = [h.sin() for name, h in zip(ranks, hidden, strict=True) if name in used]
    parts += [(through @ layer).cos() for name, layer in zip(ranks, layers, strict=True) if name in used or "W" in used]
    total = sum(part.square().sum() for part in parts) + x.sin().sum()
    gradients = torch.autograd.grad(total, [x, *factors], allow_unused=True, create_graph=True)
    assert isinstance(total, Tensor)
    return total.detach(), *(torch.zeros(()) if g is None else g for g in gradients)


@pytest.mark.parametrize("used", ["qkv", "q", "kv", "W", "kW"])
def test_shared_products_are_what_autograd_makes_of_each(used: str) -> None:
    found, expected = shared(used), shared(used, plainly=True)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_sixteen_bits_round_a_scaled_product_once() -> None:
    torch.manual_seed(0)
    given = [torch.randn(*shape).bfloat16() for shape in ((64, OUT), (64, RANK), (OUT, RANK))]
    y, h, B = (tensor.detach().requires_grad_(n > 0) for n, tensor in enumerate(given))
    lora_up_add(y.clone(), h, B, SCALE).backward(y)  # type: ignore[no-untyped-call]
    exact = [(SCALE * product).bfloat16() for product in (y.float() @ B.float(), y.float().T @ h.float())]
    assert h.grad is not None
    assert B.grad is not None
    assert torch.equal(h.grad, exact[0])
    assert torch.equal(B.grad, exact[1])


@pytest.mark.parametrize("shape", [(OUT,), (4, OUT), (4, 5, OUT)])
@pytest.mark.parametrize("trained", [True, False])
def test_rows_are_scaled_as_autograd_does_it(shape: tuple[int, ...], trained: bool) -> None:
    def outcome(of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        y, m, norm = torch.randn(shape).requires_grad_(), torch.randn(OUT, requires_grad=trained), torch.rand(OUT) + 1
        out = of(y, m, norm)
        first = torch.autograd.grad(out.sin().sum(), [y, m][: 1 + trained], create_graph=True)
        return [out, *first, torch.autograd.grad(first[0].square().sum(), y)[0]]

    for found, expected in zip(outcome(scale_rows), outcome(lambda y, m, norm: m / norm * y), strict=True):
        assert torch.equal(found, expected)


def test_a_rows_scale_is_rounded_once() -> None:
    y, m, norm = torch.randn(6, OUT).bfloat16(), torch.randn(OUT, requires_grad=True), torch.rand(OUT) + 1
    out = scale_rows(y, m, norm)
    assert torch.equal(out, (m / norm).bfloat16() * y)
    out.backward(y)  # type: ignore[no-untyped-call]
    assert m.grad is not None
    assert torch.allclose(m.grad, (y * y).float().sum(0) / norm)
