r"""BitFit: train biases only.

Paper: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
ACL 2022, arXiv:2106.10199, section 3.

.. math:: y = W x + b + \beta,\qquad \beta \in R^{out}

Trains out numbers per layer. beta starts at zero, so training starts from the frozen model. Mergeable: the layer gets
the bias b + beta. Reads nothing of W.

Departs from the paper: LLaMA has no biases to train, so a layer without one gets one (``create``; with ``create:
false`` such layers are left alone); the biases of norms, which LLaMA-like models have not either, stay frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from subspace.adapters.base import LinearAdapter, MethodConfig
from subspace.adapters.registry import register
from subspace.common.settings import setting


@register("bitfit", family="reconstruction", num_params="n_out")
class BitFit(LinearAdapter["BitFit.Config"]):
    """See the module's docstring."""

    roles: ClassVar = {"beta": "bias"}

    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """BitFit's settings."""

        create: bool = setting(True, "give layers without a bias one; else only those with one are adapted")

    @classmethod
    def check_module(cls, config: Config, site: nn.Module) -> str | None:
        if config.create or getattr(site, "bias", None) is not None:
            return None
        return "has no bias to train. Give it one with `create: true`"

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        self.beta = nn.Parameter(torch.zeros(self.out_features))

    def weight(self, W: Tensor) -> Tensor:
        return W

    def bias(self, b: Tensor | None) -> Tensor:
        return self.beta if b is None else b + self.beta

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.in_dtype("beta", x.dtype)
