r"""DoRA: train a weight's direction by LoRA and its row lengths by themselves.

Paper: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv:2402.09353, eqs. 5 and 6.

.. math:: W' = \mathrm{diag}(g)\,(W + s B A),\qquad g_j = m_j / \lVert (W + s B A)_j \rVert,\ s = \alpha / r

Every weight is (out, in). Trains r * (in + out) + out numbers per layer, or out of them, without ``direction``. B
starts at zero, m at W's row norms, which it reads once: up to g's rounding the frozen model. Mergeable.

The norm comes from the factors, exactly, without an (out, in) tensor: :math:`\lVert W_j + s B_j A \rVert^2 = \lVert W_j
\rVert^2 + 2 s B_j (W A^T)_j + s^2 B_j A A^T B_j^T`, where :math:`W A^T` is the frozen layer applied to A's r rows, even
if quantised or sharded. The norm is kept for an optimizer step, and taken as a constant if ``simple`` (section 4.3).

Departs from the paper's words, with its authors' code (NVlabs/DoRA): lengths are those of rows, one per output
feature. With dropout, that code multiplies W a second time, by the dropped input (``dropout_form: official``);
``branch`` drops the update's input only. ``constraint: nonlinear`` is refused: it leaves no weight, so no rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.adapters.low_rank import ConstrainedConfig, LowRankAdapter
from subspace.adapters.registry import register
from subspace.common.settings import setting
from subspace.errors import UserError
from subspace.kernels.dropout import dropout
from subspace.kernels.low_rank import lora_up_add, scale_rows

TINY = 1e-12  # keeps a row of zeros at zero


@register("dora", family="combination", num_params="(r * (n_in + n_out) if direction else 0) + n_out")
class DoRA(LowRankAdapter["DoRA.Config"]):
    """See the module's docstring."""

    W_norm2: Tensor
    roles: ClassVar = {"A": "down", "B": "up", "m": "scale"}
    weight_access: ClassVar = "row norms"

    @dataclass(frozen=True, kw_only=True)
    class Config(ConstrainedConfig):
        """DoRA's settings, under the paper's names."""

        dropout_form: str = setting("branch", "what is dropped", choices=("branch", "official"))
        simple: bool = setting(True, "send no gradient through the norm")
        direction: bool = setting(True, "train the direction too, not the lengths alone")

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        if self.constraint == "nonlinear":
            raise UserError("dora has no form with mpc-n: row lengths need a weight. Take mpc-o, mpc-d or lora+mpc-n")
        if not config.direction:
            del self.A, self.B
        self.m = nn.Parameter(torch.ones(self.out_features))
        self.register_buffer("W_norm2", torch.ones(self.out_features), persistent=False)  # of the W at hand

    def init_from_weight(self, W: Tensor) -> None:
        self.W_norm2.copy_(W.square().sum(dim=1))
        self.m.data.copy_(self.W_norm2.sqrt())

    def to_lora(self) -> None:  # type: ignore[override]
        return None

    def weight(self, W: Tensor) -> Tensor:
        direction = W + self.scale * self.B @ self.A if self.config.direction else W
        norm: Tensor = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        return self.m.unsqueeze(1) * direction / norm.clamp(min=TINY)

    def norm(self, dtype: torch.dtype) -> Tensor:
        """Return the row norms of W + s B A, ``(out,)``, with W in the dtype given."""
        if not self.config.direction:
            return self.W_norm2.sqrt()
        s, A, B = self.scale, self.A, self.B
        WA = self.product(A.to(dtype)).to(A.dtype)  # (r, out)
        norm2 = self.W_norm2 + 2 * s * (B * WA.T).sum(1) + s**2 * ((B @ (A @ A.T)) * B).sum(1)
        return norm2.clamp(min=TINY**2).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.simple):
            norm = self.cached("norm", lambda: self.norm(x.dtype)) if self.config.simple else self.norm(x.dtype)
        bias = self.base_bias()
        if self.training and self.config.direction and self.config.dropout and self.config.dropout_form == "official":
            g, dropped = (self.m / norm).to(x.dtype), dropout(x, self.config.dropout)
            h = F.linear(dropped, self.in_dtype("A", x.dtype))
            update = F.linear(h, self.scale * self.in_dtype("B", x.dtype))
            out = self.product(x) + (g - 1) * self.product(dropped) + g * update
        elif self.config.direction:
            x, h = self.hidden(x)
            y = lora_up_add(self.product(x), h, self.in_dtype("B", x.dtype), self.scale)
            out = scale_rows(y, self.m, norm)
        else:
            out = scale_rows(self.product(x), self.m, norm)
        return out if bias is None else out + bias
