r"""Low-rank branches of several adapters beside one frozen layer, each on its own rows of the batch.

When: in the passes that several runs share (:mod:`subspace.adapters.one_pass`), by every method whose update has the
form ``s B f(A x)``.

Gain: the frozen layer's product runs once over the rows of all runs, and the branches neither copy rows out of the
batch nor back into it: each reads and writes its stretch in place. Ranks may differ, and nothing is padded.

What a run's rows go through are the operations of :mod:`subspace.kernels.low_rank`, so its numbers are those of a pass
of its own.

Shapes: (R, ..., I) input features of R rows, (R, ..., O) output features. A stretch is the first row and the one behind
the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from subspace.kernels.low_rank import scaled_product

Stretch = tuple[int, int]


def lora_down_each(
    x: Tensor, stretches: Sequence[Stretch], factors: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return x for the frozen layer, and ``A x``, ``(rows, ..., r)``, of each adapter's rows.

    Args:
        x: ``(R, ..., I)``. Whoever else reads it must not be given what is returned in its place.
        stretches: each adapter's rows.
        factors: ``(r, I)`` each, in x's dtype.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        parts = zip(stretches, factors, strict=True)
        return x, tuple(F.linear(x[begin:end], A) for (begin, end), A in parts)
    through, *hidden = _LoraDownEach.apply(x, stretches, *factors)  # type: ignore[no-untyped-call]
    return through, tuple(hidden)


def lora_up_add_each(
    y: Tensor,
    stretches: Sequence[Stretch],
    hidden: Sequence[Tensor],
    factors: Sequence[Tensor],
    scales: Sequence[float],
) -> Tensor:
    """Return y with ``s h B^T`` added to each adapter's rows, in place where that is safe; y must not be used again.

    Args:
        y: ``(R, ..., O)``, the frozen layer's output.
        stretches: each adapter's rows.
        hidden: ``(rows, ..., r)`` each.
        factors: ``(O, r)`` each, in y's dtype.
        scales: the factors s.
    """
    out: Tensor = _LoraUpAddEach.apply(y, stretches, scales, *hidden, *factors)  # type: ignore[no-untyped-call]
    return out


class _LoraDownEach(torch.autograd.Function):
    """Autograd function ``x -> (x, A_1 x_1, A_2 x_2, ...)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stretches: Sequence[Stretch], *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.stretches = stretches
        ctx.save_for_backward(x, *factors)
        parts = zip(stretches, factors, strict=True)
        return x.view_as(x), *(F.linear(x[begin:end], A) for (begin, end), A in parts)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, *grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        total = grad_x.contiguous()  # the frozen layer's gradient, with no other reference
        grads: list[Tensor | None] = []
        wanted = zip(ctx.stretches, factors, grad_hidden, ctx.needs_input_grad[2:], strict=True)
        for (begin, end), A, grad_h, trained in wanted:
            rows, width = grad_h.reshape(-1, len(A)), A.shape[1]
            total[begin:end].view(-1, width).addmm_(rows, A)
            grads.append(rows.T @ x[begin:end].reshape(-1, width) if trained else None)
        return total, None, *grads


class _LoraUpAddEach(torch.autograd.Function):
    """Autograd function ``(y, h_1, h_2, ...) -> y + s_i h_i B_i^T``, in place; y's gradient is the output's."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, stretches: Sequence[Stretch], scales: Sequence[float], *tensors: Tensor) -> Tensor:
        hidden, factors = tensors[: len(scales)], tensors[len(scales) :]
        ctx.stretches, ctx.scales = stretches, scales
        ctx.save_for_backward(*tensors)
        if y.is_contiguous() and not y._is_view():  # the base of a view may be in use elsewhere
            ctx.mark_dirty(y)
        else:
            y = y.clone(memory_format=torch.contiguous_format)
        for (begin, end), h, B, scale in zip(stretches, hidden, factors, scales, strict=True):
            y[begin:end].view(-1, len(B)).addmm_(h.reshape(-1, B.shape[1]), B.T, alpha=scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        count = len(ctx.scales)
        hidden, factors = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        trained = ctx.needs_input_grad[3 + count :]
        grad_hidden: list[Tensor] = []
        grad_factors: list[Tensor | None] = []
        parts = zip(ctx.stretches, hidden, factors, ctx.scales, trained, strict=True)
        for (begin, end), h, B, scale, needed in parts:
            rows = grad_y[begin:end].reshape(-1, len(B))
            grad_hidden.append(scaled_product(rows, B, scale).view(h.shape))
            h = h.reshape(-1, B.shape[1])
            if not needed:
                grad_factors.append(None)
            elif rows.is_cpu:  # in the order of `_LoraUpAdd`, and for its reasons
                grad_factors.append(scaled_product(h.T, rows, scale).T)
            else:
                grad_factors.append(scaled_product(rows.T, h, scale))
        return grad_y, None, None, *grad_hidden, *grad_factors
