"""Base of the bottleneck adapters: an MLP after a sub-layer, with a residual connection."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import TypeVar

from subspace.adapters.base import MethodConfig, SublayerAdapter
from subspace.common.settings import setting

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}
NUM_PARAMS = "2 * bottleneck * n_out + bias * (bottleneck + n_out)"


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(MethodConfig):
    """Settings shared by the bottleneck adapters."""

    bottleneck: int = setting(64, "width b of the bottleneck", min=1)
    activation: str = setting("relu", "the nonlinearity f", choices=tuple(ACTIVATIONS))
    bias: bool = setting(True, "train the biases c and e")
    scale: float = setting(1.0, "scaling factor s of the adapter's output")
    start: str = setting(
        "zero", "initialisation: U at zero, or D and U Gaussian near zero", choices=("zero", "gaussian")
    )


C = TypeVar("C", bound=BottleneckConfig, default=Any)


class BottleneckAdapter(SublayerAdapter[C]):
    """``h' = h + s (U f(D h + c) + e)`` for what the sub-layer returns, h ``(..., out)``."""

    size_setting: ClassVar = "bottleneck"
    roles: ClassVar = {"D": "down", "U": "up", "c": "bias", "e": "bias"}

    def __init__(self, base: nn.Module, config: C) -> None:
        super().__init__(base, config)
        self.f = ACTIVATIONS[config.activation]
        self.D = nn.Parameter(torch.empty(config.bottleneck, self.out_features))
        self.U = nn.Parameter(torch.zeros(self.out_features, config.bottleneck))
        self.c = nn.Parameter(torch.zeros(config.bottleneck)) if config.bias else None
        self.e = nn.Parameter(torch.zeros(self.out_features)) if config.bias else None
        if config.start == "gaussian":  # as BERT's layers start, which the published implementations take
            nn.init.normal_(self.D, std=0.02)
            nn.init.normal_(self.U, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.base(x)
        c, e = (None if getattr(self, name) is None else self.in_dtype(name, h.dtype) for name in ("c", "e"))
        update = F.linear(self.f(F.linear(h, self.in_dtype("D", h.dtype), c)), self.in_dtype("U", h.dtype), e)
        return h + update * float(self.config.scale)
