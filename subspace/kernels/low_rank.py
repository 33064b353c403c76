"""A branch beside a frozen layer, through few hidden values: ``y = W x + s B f(A x)``.

Its products are small; what it costs are passes over tensors as wide as the layer. Left to autograd there are three
that need not be: a copy of W x that the update is added to, the branch's gradient of x, and its addition to the frozen
layer's. Here the products themselves add to what is there. So a method lets x through :func:`lora_down` on its way to
the frozen layer, and adds to the layer's output by :func:`lora_up_add`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from subspace.kernels.dropout import dropout, sample_dropped_indices, use_sparse_dropout


def lora_down(x: Tensor, A: Tensor, p: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return x for the frozen layer, which alone may read it, and ``A dropout(x)``, ``(..., r)``, for the branch.

    Args:
        x: ``(..., in)``.
        A: ``(r, in)``; it is rounded to x's dtype.
        p: how likely each value of x is to be dropped on its way into the branch.
    """
    A = A.to(x.dtype)
    plain = torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad)
    if plain or (p and not use_sparse_dropout(x, p)):
        return x, F.linear(dropout(x, p), A)
    out: tuple[Tensor, Tensor] = _LoraDown.apply(x, A, p)  # type: ignore[no-untyped-call]
    return out


def lora_up_add(y: Tensor, h: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``y + scale h B^T``, in y's memory where that can be: nobody else may read y.

    Args:
        y: ``(..., out)``, which a layer has just returned.
        h: ``(..., r)``.
        B: ``(out, r)``; it is rounded to y's dtype.
        scale: a factor.
    """
    B = B.to(y.dtype)
    if torch.compiler.is_compiling():
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B.T, alpha=scale).view(y.shape)
    out: Tensor = _LoraUpAdd.apply(y, h, B, scale)  # type: ignore[no-untyped-call]
    return out


class _LoraDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, p: float) -> tuple[Tensor, Tensor]:
        ctx.kept = 1 - p
        if not p:
            ctx.save_for_backward(x, A, None)
            return x.view_as(x), F.linear(x, A)
        dropped = sample_dropped_indices(x.numel(), p)
        read = x.clone(memory_format=torch.contiguous_format)
        read.view(-1).index_fill_(0, dropped, 0.0)
        ctx.save_for_backward(read, A, dropped)
        return x.view_as(x), F.linear(read, A).div_(ctx.kept)  # what was kept grows where it is narrow

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_h: Tensor) -> tuple[Tensor, Tensor | None, None]:
        read, A, dropped = ctx.saved_tensors
        rows = grad_h.reshape(-1, len(A))
        total = grad_x.reshape(-1, A.shape[1])  # which the frozen layer has just made, for nobody else
        if dropped is None:
            total.addmm_(rows, A)
        else:
            rows = rows / ctx.kept
            own = rows @ A
            own.view(-1).index_fill_(0, dropped, 0.0)
            total.add_(own)
        grad_A = rows.T @ read.reshape(total.shape) if ctx.needs_input_grad[1] else None
        return total.view(grad_x.shape), grad_A, None


class _LoraUpAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(h, B)
        ctx.scale = scale
        if y.is_contiguous() and not y._is_view():  # others may hold what it is a view of
            ctx.mark_dirty(y)
        else:
            y = y.clone(memory_format=torch.contiguous_format)
        y.view(-1, len(B)).addmm_(h.reshape(-1, B.shape[1]), B.T, alpha=scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        h, B = ctx.saved_tensors
        rows = grad_y.reshape(-1, len(B))
        grad_h = (rows @ B).mul_(ctx.scale).view(h.shape)
        # In this order the product reads both along their rows, which is half again as fast.
        grad_B = (h.reshape(-1, B.shape[1]).T @ rows).mul_(ctx.scale).T if ctx.needs_input_grad[2] else None
        return grad_y, grad_h, grad_B, None
