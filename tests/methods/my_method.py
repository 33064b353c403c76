r"""VeRA, as a method of a user's own: frozen random factors, between and after which vectors are trained.

Paper: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024, arXiv:2310.11454, eq. 2.

.. math:: W' = W + \mathrm{diag}(b)\,B\,\mathrm{diag}(d)\,A
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from subspace.adapters.base import LinearAdapter, MethodConfig
from subspace.adapters.registry import register
from subspace.common.settings import setting


@register("vera", family="extension", num_params="r + n_out", aliases={"vera-16": {"r": 16}})
class VeRA(LinearAdapter):
    """See the module's docstring."""

    A: Tensor
    B: Tensor
    roles: ClassVar = {"d": "core", "b": "scale"}
    size_setting = "r"

    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """VeRA's settings."""

        r: int = setting(4, "rank of the random factors", min=1)

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        self.register_buffer("A", torch.randn(config.r, self.in_features) / self.in_features**0.5)
        self.register_buffer("B", torch.randn(self.out_features, config.r) / config.r**0.5)
        self.d = nn.Parameter(torch.full((config.r,), 0.1))
        self.b = nn.Parameter(torch.zeros(self.out_features))

    def weight(self, W: Tensor) -> Tensor:
        return W + self.b[:, None] * (self.B @ (self.d[:, None] * self.A))
