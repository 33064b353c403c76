r"""FLoRA: a low-rank update with a full core between its factors (Tucker-2 of a matrix).

Paper: Si et al., "FLoRA: Low-Rank Core Space for N-dimension", arXiv:2405.14739, eq. 5.

.. math:: W' = W + s\,B G A,\qquad B \in R^{out \times r'},\ G \in R^{r' \times r},\ A \in R^{r \times in},\ s=\alpha/r

Trains r * in + r' * out + r r' numbers per layer; r' is r unless ``r_out`` says otherwise. G starts at zero and is all
that has a gradient in the first step; training starts from the frozen model. Mergeable. Reads W only to merge.

Departs from the paper: its free scale (4, say) is written alpha / r, and A and B start Kaiming-uniform, both as in the
authors' commonsense code.
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
from subspace.common.settings import MOST_RANK, setting


@register("flora", family="extension", num_params="r * n_in + (r_out or r) * n_out + r * (r_out or r)")
class FLoRA(LowRankAdapter["FLoRA.Config"]):
    """See the module's docstring."""

    roles: ClassVar = {"A": "down", "G": "core", "B": "up"}

    @dataclass(frozen=True, kw_only=True)
    class Config(ConstrainedConfig):
        """FLoRA's settings."""

        r_out: int | None = setting(None, "width of the core on the output's side; none is r", min=1, max=MOST_RANK)

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        r_out = config.r_out or config.r
        self.G = nn.Parameter(torch.zeros(r_out, config.r))
        self.B = nn.Parameter(torch.empty(self.out_features, r_out))
        nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))

    def core(self, h: Tensor) -> Tensor:
        return F.linear(h, self.in_dtype("G", h.dtype))
