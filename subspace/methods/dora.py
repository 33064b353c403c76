r"""DoRA: train a weight's direction by LoRA and its row lengths by themselves.

Paper: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv:2402.09353, eqs. 5 and 6.

.. math:: W' = \mathrm{diag}(g)\,(W + s B A),\qquad g_j = m_j / \lVert (W + s B A)_j \rVert,\ s = \alpha / r

Every weight is (out, in). Trains r * (in + out) + out numbers per layer. B starts at zero and m at the row norms of
W, so training starts from the frozen model. Mergeable. Reads W once, for its row norms.

The norm is computed from the factors, exactly, without an (out, in) tensor: :math:`\lVert W_j + s B_j A \rVert^2 =
\lVert W_j \rVert^2 + 2 s B_j (W A^T)_j + s^2 B_j A A^T B_j^T`, and :math:`W A^T` is the frozen layer applied to A's r
rows, which needs no access to a quantised or sharded W. ``simple`` treats the norm as a constant (section 4.3).

Departs from the paper's words, with its authors' code (NVlabs/DoRA): lengths are those of rows, one per output
feature. With dropout, that code multiplies W a second time, by the dropped input (``dropout_form: official``);
``branch`` drops the update's input only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.method import LinearAdapter, MethodConfig, register
from subspace.settings import setting

TINY = 1e-12  # keeps a row of zeros at zero


@register("dora", family="combination", trains="r * (n_in + n_out) + n_out")
class DoRA(LinearAdapter):
    """See the module's docstring."""

    W_norm2: Tensor
    roles: ClassVar = {"A": "down", "B": "up", "m": "scale"}

    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """DoRA's settings, under the paper's names."""

        r: int = setting(16, "rank of the direction's update", min=1)
        alpha: float = setting(32.0, "the update is scaled by alpha / r", min=0)
        dropout: float = setting(0.0, "dropout on the input, in training only", min=0, max=1)
        dropout_form: str = setting("branch", "what is dropped", choices=("branch", "official"))
        simple: bool = setting(True, "send no gradient through the norm")

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        self.scale = config.alpha / config.r
        self.A = nn.Parameter(torch.empty(config.r, self.in_features))
        self.B = nn.Parameter(torch.zeros(self.out_features, config.r))
        self.m = nn.Parameter(torch.ones(self.out_features))
        self.register_buffer("W_norm2", torch.ones(self.out_features))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def start(self, W: Tensor) -> None:
        self.W_norm2.copy_(W.square().sum(dim=1))
        self.m.data.copy_(self.W_norm2.sqrt())

    def weight(self, W: Tensor) -> Tensor:
        direction = W + self.scale * self.B @ self.A
        norm: Tensor = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        return self.m.unsqueeze(1) * direction / norm.clamp(min=TINY)

    def gain(self, dtype: torch.dtype) -> Tensor:
        """Return g, ``(out,)``."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.simple):
            s, A, B = self.scale, self.A, self.B
            WA = self.product(A.to(dtype)).to(A.dtype)  # (r, out)
            norm2 = self.W_norm2 + 2 * s * (B * WA.T).sum(1) + s**2 * ((B @ (A @ A.T)) * B).sum(1)
            norm = norm2.clamp(min=TINY**2).sqrt()
        return (self.m / norm).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.config.dropout if self.training else 0.0
        dropped = F.dropout(x, dropout) if dropout else x
        update = F.linear(F.linear(dropped, self.A.to(x.dtype)), self.scale * self.B.to(x.dtype))
        g = self.gain(x.dtype)
        out = self.product(x)
        if dropout and self.config.dropout_form == "official":
            out = out + (g - 1) * self.product(dropped) + g * update
        else:
            out = g * (out + update)
        bias = self.base_bias()
        return out if bias is None else out + bias
