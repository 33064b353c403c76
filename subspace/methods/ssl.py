r"""SSL: scale the subspace in which a weight reads its input.

Paper: Si, Yang, Shen, "See Further for Parameter Efficient Fine-tuning by Standing on the Shoulders of Matrix
Decomposition", arXiv:2407.05417, section on subspace reconstruction ("scaling the left singular vectors").

.. math:: W' = W\,\mathrm{diag}(d),\qquad W \in R^{out \times in},\ d \in R^{in}

Trains in numbers per layer. d starts at one, so training starts from the frozen model. Mergeable. Reads W only to
merge.

Orientation: the paper writes weights (in, out), so its left singular vectors are the input side of the (out, in)
weight used here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from subspace.adapters.base import LinearAdapter, MethodConfig
from subspace.adapters.registry import register


@register("ssl", family="reconstruction", num_params="n_in")
class SSL(LinearAdapter["SSL.Config"]):
    """See the module's docstring."""

    roles: ClassVar = {"d": "scale"}

    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """SSL has no settings."""

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        self.d = nn.Parameter(torch.ones(self.in_features))

    def weight(self, W: Tensor) -> Tensor:
        return W * self.d

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x * self.in_dtype("d", x.dtype))
