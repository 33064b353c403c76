r"""LoRA: add a low-rank update to a frozen weight.

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685, section 4.1, eq. 3.

.. math:: W' = W + s\,B A,\qquad W \in R^{out \times in},\ B \in R^{out \times r},\ A \in R^{r \times in},\ s=\alpha/r

Trains r * (in + out) numbers per layer. B starts at zero, so training starts from the frozen model.
Mergeable. Reads W only to merge, so a quantised or sharded base costs nothing extra.

``rslora`` scales by :math:`\alpha/\sqrt r` (Kalajdzievski, arXiv:2312.03732). Departs from the paper: A starts
Kaiming-uniform, as in the authors' code (microsoft/LoRA), where the paper says Gaussian.
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


@register("lora", family="extension", trains="r * (n_in + n_out)")
class LoRA(LinearAdapter):
    """See the module's docstring."""

    roles: ClassVar = {"A": "down", "B": "up"}

    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """LoRA's settings, under the paper's names."""

        r: int = setting(16, "rank of the update", min=1)
        alpha: float = setting(32.0, "the update is scaled by alpha / r", min=0)
        rslora: bool = setting(False, "scale by alpha / sqrt(r) instead")
        dropout: float = setting(0.0, "dropout on the input of A, in training only", min=0, max=1)

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        self.scale = config.alpha / (math.sqrt(config.r) if config.rslora else config.r)
        self.dropout = config.dropout
        self.A = nn.Parameter(torch.empty(config.r, self.in_features))
        self.B = nn.Parameter(torch.zeros(self.out_features, config.r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def weight(self, W: Tensor) -> Tensor:
        return W + self.scale * self.B @ self.A

    def forward(self, x: Tensor) -> Tensor:
        # B (A x) costs r * (in + out) per token; (B A) x would cost in * out.
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        update = F.linear(F.linear(dropped, self.A.to(x.dtype)), self.scale * self.B.to(x.dtype))
        return self.frozen(x) + update
