r"""LieRA: multiply each entry of a weight by one plus a low-rank update.

Paper: Si et al., "Generalized Tensor-based Parameter-Efficient Fine-Tuning via Lie Group Transformations", ICCV 2025,
arXiv:2504.00851; its first-order form is HiRA with the scale in B.

.. math:: W' = W \odot (1 + s\,B A),\qquad B \in R^{out \times r},\ A \in R^{r \times in},\ s=\alpha/r

or :math:`W \odot \exp(s\,B A)` with ``form: exp``. Trains r * (in + out) numbers per layer; the update has full rank. B
starts at zero, so training starts from the frozen model. Mergeable, best in float32: bfloat16 rounds small changes of W
away. Reads the values of W in every pass; entries that are zero stay zero. On a quantised base it runs on the values
that W dequantises to, and costs that each time.

The gradients are :math:`dB = s\,(W \odot G) A^T` and :math:`dA = s\,B^T (W \odot G)` with G the gradient of a dense W';
they are computed for some rows of W at a time, so that no (out, in) tensor is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from subspace.adapters.low_rank import LowRankAdapter, LowRankConfig
from subspace.adapters.registry import register
from subspace.common.settings import setting
from subspace.kernels.dropout import dropout
from subspace.models.frozen_weights import dequantized_weight

ROWS = 1024  # of W at a time


@register("liera", family="extension", num_params="r * (n_in + n_out)", aliases={"hira": {"alpha": None}})
class LieRA(LowRankAdapter["LieRA.Config"]):
    """See the module's docstring."""

    weight_access: ClassVar = "values"
    input_factor: ClassVar[str | None] = None  # it multiplies by A inside W's product

    @dataclass(frozen=True, kw_only=True)
    class Config(LowRankConfig):
        """LieRA's settings."""

        form: str = setting(
            "first-order", "the group's exponential, or its first two terms", choices=("first-order", "exp")
        )

    def to_lora(self) -> None:  # type: ignore[override]
        return None

    def weight(self, W: Tensor) -> Tensor:
        return W * (1 + change(self.scale * self.B @ self.A, exp=self.config.form == "exp"))

    def forward(self, x: Tensor) -> Tensor:
        # What is small is kept apart from W x, or a 16-bit W' would round it away.
        dropped = dropout(x, self.config.dropout, self.training)
        update: Tensor = _Update.apply(dropped, self.A, self.B, self)  # type: ignore[no-untyped-call]
        return self.frozen(x) + update


def change(M: Tensor, *, exp: bool) -> Tensor:
    """Return what W is multiplied by, less one, for the update M."""
    return torch.expm1(M) if exp else M


class _Update(torch.autograd.Function):
    """``(W * change(s B A)) x``, whose backward pass computes ``change`` again."""

    @staticmethod
    def tiles(adapter: LieRA, A: Tensor, B: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield W and s B A, some rows at a time, both in A's dtype."""
        W = dequantized_weight(adapter.base)
        for first in range(0, len(W), ROWS):
            rows = slice(first, first + ROWS)
            yield rows, W[rows].to(A.dtype), adapter.scale * B[rows] @ A

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, adapter: LieRA) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.adapter, exp = adapter, adapter.config.form == "exp"
        parts = [F.linear(x, (W * change(M, exp=exp)).to(x.dtype)) for _, W, M in _Update.tiles(adapter, A, B)]
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, A, B), adapter, exp = ctx.saved_tensors, ctx.adapter, ctx.adapter.config.form == "exp"
        flat, g = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, gradients[0].shape[-1])
        dx, dA, dB = torch.zeros_like(flat), torch.zeros_like(A), torch.zeros_like(B)
        for rows, W, M in _Update.tiles(adapter, A, B):
            dx += g[:, rows] @ (W * change(M, exp=exp)).to(g.dtype)
            dM = (g[:, rows].T @ flat).to(A.dtype) * (W * torch.exp(M) if exp else W) * adapter.scale
            dB[rows] = dM @ A.T
            dA += B[rows].T @ dM
        return dx.view(x.shape), dA, dB, None
