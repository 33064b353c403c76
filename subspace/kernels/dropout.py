"""Dropout that costs little on a CPU: only what is dropped is drawn.

torch draws a number for every value, and on a CPU one after the other: a tenth of a training step. Here the distances
from one dropped value to the next are drawn. They are distributed geometrically, so that each value is dropped with
probability p, whatever happens to the others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: Where more is dropped than this, a number for every value is the cheaper way.
SPARSE = 0.4


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Return x, in training with each value zeroed with probability p and the others divided by 1 - p."""
    if not (p and training):
        return x
    if not use_sparse_dropout(x, p):
        return F.dropout(x, p)
    out: Tensor = _Dropout.apply(x, p)  # type: ignore[no-untyped-call]
    return out


def use_sparse_dropout(x: Tensor, p: float) -> bool:
    """Tell whether what is dropped of x is drawn by its places."""
    return x.device.type == "cpu" and p <= SPARSE and not torch.compiler.is_compiling()


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped = sample_dropped_indices(x.numel(), p)
        ctx.save_for_backward(dropped)
        ctx.p = p
        return _without(x, dropped, p)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (dropped,) = ctx.saved_tensors
        return _without(gradients[0], dropped, ctx.p), None


def _without(x: Tensor, dropped: Tensor, p: float) -> Tensor:
    out = x.contiguous() * (1 / (1 - p))
    out.view(-1).index_fill_(0, dropped, 0.0)
    return out


def sample_dropped_indices(count: int, p: float) -> Tensor:
    """Draw which of ``count`` values are dropped, each with probability p, in rising order."""
    kept_between = torch.rand(indices_drawn(count, p)).neg_().log1p_().mul_(1 / math.log1p(-p)).long()
    places = kept_between.add_(1).cumsum_(0).sub_(1)
    return places[: int(torch.searchsorted(places, count))]


def indices_drawn(count: int, p: float) -> int:
    """Return how many distances are drawn for ``count`` values: too few with a probability below 1e-12."""
    return int(count * p + 8 * math.sqrt(count * p) + 32)
