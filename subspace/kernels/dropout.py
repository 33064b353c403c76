"""Sparse dropout for CPU: draws only the indices of dropped values.

When: on a CPU, in training, for p up to SPARSE. On a GPU, and above, torch's own.

Gain: of a LoRA layer with dropout, forward and backward, over the frozen layer alone: torch's dropout 1.181, this one
1.099, none 1.089; so nine tenths of what dropout costs (`tests/bench/RESULTS.md`).

Why: torch draws a number for every value, one after the other. For p = 0.05 a twentieth as many suffice: those that say
how many values are kept until the next dropped one. When each value is dropped with probability p, independently of the
others, these distances are distributed geometrically, and a geometric number is drawn from a uniform one by inversion.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: The largest p for which this is faster than one random number for every value.
SPARSE = 0.4


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Return x, in training with each value zeroed with probability p and the others divided by 1 - p."""
    if not (p and training):
        return x
    if not use_sparse_dropout(x, p):
        return F.dropout(x, p)
    out: Tensor = _SparseDropout.apply(x, p)  # type: ignore[no-untyped-call]
    return out


def use_sparse_dropout(x: Tensor, p: float) -> bool:
    """Return True if the indices of x's dropped values are drawn instead of a mask."""
    return x.device.type == "cpu" and p <= SPARSE and not torch.compiler.is_compiling()


class _SparseDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped = sample_dropped_indices(x.numel(), p)
        ctx.save_for_backward(dropped)  # the indices, a few integers, instead of a mask of x's size
        ctx.p = p
        return _without(x, dropped, p)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        (dropped,) = ctx.saved_tensors
        return _without(grad_out, dropped, ctx.p), None


def _without(x: Tensor, dropped: Tensor, p: float) -> Tensor:
    """Return x / (1 - p) with zeros at the dropped indices, which count in row-major order."""
    out = x.contiguous() * (1 / (1 - p))
    out.view(-1).index_fill_(0, dropped, 0.0)
    return out


def sample_dropped_indices(count: int, p: float) -> Tensor:
    """Draw which of ``count`` values are dropped, each with probability p: their indices in rising order, int64."""
    # P(kept >= k) = (1 - p)^k, so kept = floor(log(1 - u) / log(1 - p)) for a uniform u in [0, 1).
    kept_between = torch.rand(indices_drawn(count, p)).neg_().log1p_().mul_(1 / math.log1p(-p)).long()
    # A dropped value's index is the number of kept and dropped values before it; the first is at kept[0].
    indices = kept_between.add_(1).cumsum_(0).sub_(1)
    return indices[: int(torch.searchsorted(indices, count))]


def indices_drawn(count: int, p: float) -> int:
    """Return the number of distances to draw for ``count`` values; it is too small with probability below 1e-12.

    On average ``count * p`` are dropped, with a standard deviation below ``sqrt(count * p)``; there are eight more of
    those. So the random state advances by an amount that does not depend on the values drawn.
    """
    return int(count * p + 8 * math.sqrt(count * p) + 32)
