r"""Low-rank branch of a frozen layer, ``y = W x + s B f(A x)``, with additions fused into the matrix products.

When: always in training, on a CPU and on a GPU, by every method whose update has this form; f is between the two calls.

Gain: one LoRA layer with its frozen one, forward and backward, float32: 576 to 1536 features 17.8 ms instead of
autograd's 19.4, 1536 to 576 17.7 instead of 18.7. Of a whole step over the frozen model's, 1.138 instead of 1.177: that
is a fifth of what the branches cost (`tests/bench/RESULTS.md`).

Why: the products are small; the cost is in passes over tensors as wide as the layer. Plain autograd makes three
avoidable ones: a copy of W x that the update is added to; the branch's gradient of x, as a tensor of its own; and its
addition to the frozen layer's gradient of x. Here ``addmm_`` adds the product in place.

How a method uses it: ``x, h = lora_down(x, A)``; ``y = layer(x)``; ``y = lora_up_add(y, h, B, scale)``. Backwards in
that order: the frozen layer's gradient of x arrives at :func:`lora_down` as the gradient of its first output, a tensor
with no other reference, and the branch's is added into it.

Sites that read one input can share their products with it: :func:`lora_down_shared`, which
:mod:`subspace.kernels.working_copies` uses where the factors are neighbours in memory.

Shapes: (..., I) input features, (..., O) output features, (R) rank; n is the number of tokens, all leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from subspace.kernels.dropout import dropout, sample_dropped_indices, use_sparse_dropout


def lora_down(x: Tensor, A: Tensor, p: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return x for the frozen layer, its only reader, and ``A dropout(x)``, ``(..., R)``, for the branch.

    Args:
        x: ``(..., I)``.
        A: ``(R, I)``; it is rounded to x's dtype.
        p: dropout probability on the branch's input.
    """
    A = A.to(x.dtype)
    plain = torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad)
    if plain or (p and not use_sparse_dropout(x, p)):
        return x, F.linear(dropout(x, p), A)
    out: tuple[Tensor, Tensor] = _LoraDown.apply(x, A, p)  # type: ignore[no-untyped-call]
    return out


def lora_down_shared(x: Tensor, stacked: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return x for the frozen layers of several sites, its only readers, and ``A x``, ``(..., R)``, for each site.

    One product forward and two backward, for however many sites. A site that nobody calls costs its share of them; its
    factor then has no gradient.

    Args:
        x: ``(..., I)``, with a gradient.
        stacked: ``(sum of R, I)``, the factors' values one after the other, in x's dtype, without gradient.
        factors: ``(R, I)`` each, to which the gradients go.
    """
    through, *hidden = _LoraDownShared.apply(x, stacked, *factors)  # type: ignore[no-untyped-call]
    return through, tuple(hidden)


def lora_up_add(y: Tensor, h: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``y + scale h B^T``, computed in place where that is safe; y must not be used afterwards.

    Args:
        y: ``(..., O)``, the frozen layer's output.
        h: ``(..., R)``.
        B: ``(O, R)``; it is rounded to y's dtype.
        scale: a factor.
    """
    B = B.to(y.dtype)
    if torch.compiler.is_compiling():
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B.T, alpha=scale).view(y.shape)
    out: Tensor = _LoraUpAdd.apply(y, h, B, scale)  # type: ignore[no-untyped-call]
    return out


def scale_rows(y: Tensor, m: Tensor, norm: Tensor) -> Tensor:
    """Return ``diag(m / norm) y``, which gives the rows of a weight whose lengths are ``norm`` the lengths m.

    Args:
        y: ``(..., O)``, of any dtype; the quotient is rounded to it.
        m: ``(O,)``, trained.
        norm: ``(O,)``, in m's dtype.
    """
    if norm.requires_grad or torch.compiler.is_compiling():
        return (m / norm).to(y.dtype) * y
    out: Tensor = _ScaleRows.apply(y, m, norm)  # type: ignore[no-untyped-call]
    return out


class _LoraDown(torch.autograd.Function):
    """Autograd function ``x -> (x, A dropout(x))``; one function, so that backward receives both gradients at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, p: float) -> tuple[Tensor, Tensor]:
        ctx.kept_share = 1 - p
        if not p:
            ctx.save_for_backward(x, A, None)
            return x.view_as(x), F.linear(x, A)  # a view, since autograd cannot return an input unchanged
        dropped = sample_dropped_indices(x.numel(), p)
        zeroed = x.clone(memory_format=torch.contiguous_format)
        zeroed.view(-1).index_fill_(0, dropped, 0.0)
        ctx.save_for_backward(zeroed, A, dropped)
        # Dropout's factor 1 / (1 - p) commutes with the product, whose (n, R) values are fewer.
        return x.view_as(x), F.linear(zeroed, A).div_(ctx.kept_share)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_h: Tensor) -> tuple[Tensor, Tensor | None, None]:
        zeroed, A, dropped = ctx.saved_tensors  # without dropout, x itself
        rows = grad_h.reshape(-1, len(A))  # (n, R)
        total = grad_x.reshape(-1, A.shape[1])  # (n, I), the frozen layer's gradient, with no other reference
        if dropped is None:
            total.addmm_(rows, A)
        else:
            rows = rows / ctx.kept_share
            branch = rows @ A
            branch.view(-1).index_fill_(0, dropped, 0.0)  # so the product cannot be added in place
            total.add_(branch)
        grad_A = rows.T @ zeroed.reshape(total.shape) if ctx.needs_input_grad[1] else None
        return total.view(grad_x.shape), grad_A, None


class _LoraDownShared(torch.autograd.Function):
    """Autograd function ``x -> (x, A_1 x, A_2 x, ...)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stacked: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, stacked)
        ctx.ranks = [len(factor) for factor in factors]
        return x.view_as(x), *F.linear(x, stacked).split_with_sizes(ctx.ranks, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, *grad_hidden: Tensor | None) -> tuple[Tensor | None, ...]:
        x, stacked = ctx.saved_tensors
        tokens = x.reshape(-1, x.shape[-1])
        if all(grad is None for grad in grad_hidden):
            return grad_x, None, *grad_hidden
        parts = (
            tokens.new_zeros(len(tokens), rank) if grad is None else grad.reshape(-1, rank)
            for grad, rank in zip(grad_hidden, ctx.ranks, strict=True)
        )
        rows = torch.cat(list(parts), dim=1)  # (n, sum of R)
        # (n, I): the sum of the frozen layers' gradients, with no other reference. Autograd adds such sums up in place
        # or into new tensors, and passes on a single one as it came, which is as in _LoraDown.
        total = rows @ stacked if grad_x is None else grad_x.reshape(tokens.shape).addmm_(rows, stacked)
        of_factors = (rows.T @ tokens).split_with_sizes(ctx.ranks)
        wanted = zip(grad_hidden, of_factors, ctx.needs_input_grad[2:], strict=True)
        return total.view(x.shape), None, *(part if n and grad is not None else None for grad, part, n in wanted)


class _LoraUpAdd(torch.autograd.Function):
    """Autograd function ``(y, h) -> y + scale h B^T``, in place; y's gradient is the output's, without a copy."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(h, B)
        ctx.scale = scale
        if y.is_contiguous() and not y._is_view():  # the base of a view may be in use elsewhere
            ctx.mark_dirty(y)
        else:
            y = y.clone(memory_format=torch.contiguous_format)
        y.view(-1, len(B)).addmm_(h.reshape(-1, B.shape[1]), B.T, alpha=scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        h, B = ctx.saved_tensors
        rows = grad_y.reshape(-1, len(B))  # (n, O)
        grad_h = scaled_product(rows, B, ctx.scale).view(h.shape)
        if not ctx.needs_input_grad[2]:
            return grad_y, grad_h, None, None
        h = h.reshape(-1, B.shape[1])
        if rows.is_cpu:
            # h^T grad_y, (R, O), and transposed: in this order the product reads both along their rows, which is half
            # again as fast as grad_y^T h.
            return grad_y, grad_h, scaled_product(h.T, rows, ctx.scale).T, None
        # A GPU's products are as fast in either order, and what follows wants the gradient in B's own layout.
        return grad_y, grad_h, scaled_product(rows.T, h, ctx.scale), None


class _ScaleRows(torch.autograd.Function):
    """Autograd function ``(y, m) -> (m / norm) y``; the quotient is rounded by the call that computes it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, m: Tensor, norm: Tensor) -> Tensor:
        g = torch.div(m, norm, out=y.new_empty(m.shape))
        ctx.save_for_backward(y, m, norm, g)
        return y * g

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (y, m, norm, g), (grad,) = ctx.saved_tensors, gradients
        if torch.is_grad_enabled():  # for a second derivative
            g = (m / norm).to(y.dtype)
        if not ctx.needs_input_grad[1]:
            return grad * g, None, None
        return grad * g, (grad * y).reshape(-1, len(m)).sum(0, dtype=m.dtype) / norm, None


def scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return ``scale left right``, ``(m, k) (k, n) -> (m, n)``: in 16 bits by one call, and rounded once."""
    if left.dtype in (torch.float16, torch.bfloat16) and not torch.is_grad_enabled():
        return left.new_empty(len(left), right.shape[1]).addmm_(left, right, beta=0, alpha=scale)
    return (left @ right).mul_(scale)  # in float32 as it has always been, to the last bit
