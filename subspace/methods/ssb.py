r"""SSB: scale both the subspace in which a weight reads and the one in which it writes.

Paper: Si, Yang, Shen, arXiv:2407.05417, section on subspace reconstruction ("scaling both").

.. math:: W' = \mathrm{diag}(l)\,W\,\mathrm{diag}(d),\qquad W \in R^{out \times in},\ l \in R^{out},\ d \in R^{in}

Trains in + out numbers per layer. Both start at one, so training starts from the frozen model. Mergeable. Reads W
only to merge. A bias is left as it is. The pair (c l, d / c) is the same weight for any c, which is harmless with
Adam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from subspace.adapters.base import LinearAdapter, MethodConfig
from subspace.adapters.registry import register


@register("ssb", family="reconstruction", num_params="n_in + n_out")
class SSB(LinearAdapter["SSB.Config"]):
    """See the module's docstring."""

    roles: ClassVar = {"d": "scale", "l": "scale"}

    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """SSB has no settings."""

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        self.d = nn.Parameter(torch.ones(self.in_features))
        self.l = nn.Parameter(torch.ones(self.out_features))

    def weight(self, W: Tensor) -> Tensor:
        return self.l.unsqueeze(1) * W * self.d

    def forward(self, x: Tensor) -> Tensor:
        out = self.in_dtype("l", x.dtype) * self.product(x * self.in_dtype("d", x.dtype))
        bias = self.base_bias()
        return out if bias is None else out + bias
