r"""Houlsby adapter: a small bottleneck network after each attention and each MLP.

Paper: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, arXiv:1902.00751, section 2.1 and
fig. 2.

.. math:: h' = h + s\,(U f(D h + c) + e),\qquad D \in R^{b \times d},\ U \in R^{d \times b}

h is what the sub-layer is about to add to the residual stream. Trains 2 * b * d + b + d numbers per site, two sites
per layer. Not mergeable, for f is nonlinear. Reads nothing of W.

Departs from the paper: U starts at zero, so that training starts from the frozen model (the paper: near-zero
Gaussian, here ``start: gaussian``); f is SiLU by default, as in AdapterHub; the layer norms stay frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.method import MethodConfig, SublayerAdapter, register
from subspace.settings import setting

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}


@register("houlsby", family="extension", trains="2 * bottleneck * n_out + bottleneck + n_out", aliases=("adapterh",))
class Houlsby(SublayerAdapter):
    """See the module's docstring."""

    roles: ClassVar = {"D": "down", "U": "up", "c": "bias", "e": "bias"}

    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """The bottleneck's settings."""

        bottleneck: int = setting(64, "width b of the bottleneck", min=1)
        activation: str = setting("silu", "the nonlinearity f", choices=tuple(ACTIVATIONS))
        scale: float = setting(1.0, "factor s on what is added")
        start: str = setting("zero", "U at zero, or all of it near zero", choices=("zero", "gaussian"))

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        self.scale = config.scale
        self.f = ACTIVATIONS[config.activation]
        self.D = nn.Parameter(torch.empty(config.bottleneck, self.out_features))
        self.U = nn.Parameter(torch.zeros(self.out_features, config.bottleneck))
        self.c = nn.Parameter(torch.zeros(config.bottleneck))
        self.e = nn.Parameter(torch.zeros(self.out_features))
        if config.start == "gaussian":
            nn.init.normal_(self.D, std=0.02)
            nn.init.normal_(self.U, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.base(x)
        D, U, c, e = (t.to(h.dtype) for t in (self.D, self.U, self.c, self.e))
        update = self.scale * F.linear(self.f(F.linear(h, D, c)), U, e)
        return h + update
