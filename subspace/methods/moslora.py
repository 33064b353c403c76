r"""MoSLoRA: LoRA with a trained mixer of its subspaces.

Paper: Wu et al., "Mixture-of-Subspaces in Low-Rank Adaptation", EMNLP 2024, arXiv:2406.11909, eq. 6.

.. math:: W' = W + s\,B M A,\qquad B \in R^{out \times r},\ M \in R^{r \times r},\ A \in R^{r \times in},\ s=\alpha/r

Trains r * (in + out) + r * r numbers per layer. B starts at zero, so training starts from the frozen model; A and M
start Kaiming-uniform, as in the authors' code (wutaiqiang/MoSLoRA). Mergeable. Reads W only to merge. With M fixed at
the identity it is LoRA; it differs from FLoRA only in which factor starts at zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.adapters.low_rank import ConstrainedConfig, LowRankAdapter
from subspace.adapters.registry import register


@register("moslora", family="extension", num_params="r * (n_in + n_out + r)")
class MoSLoRA(LowRankAdapter["MoSLoRA.Config"]):
    """See the module's docstring."""

    roles: ClassVar = {"A": "down", "M": "core", "B": "up"}

    @dataclass(frozen=True, kw_only=True)
    class Config(ConstrainedConfig):
        """MoSLoRA's settings."""

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        self.M = nn.Parameter(torch.empty(config.r, config.r))
        nn.init.kaiming_uniform_(self.M, a=math.sqrt(5))

    def core(self, h: Tensor) -> Tensor:
        return F.linear(h, self.in_dtype("M", h.dtype))
