r"""Parallel adapter: a bottleneck network beside a frozen layer, reading what the layer reads.

Paper: He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", ICLR 2022, arXiv:2110.04366,
section 3.3 and table 1.

.. math:: y' = y + s\,B f(A x),\qquad A \in R^{b \times in},\ B \in R^{out \times b}

At a linear layer it is LoRA with ``constraint: nonlinear`` under another name: same tensors, same function. With
``site: ffn`` it stands beside a whole feed-forward block, as in the paper. Trains b * (in + out) numbers per site: with
b = 256 at up and down, the 3.54 % that are published for LLaMA-7B. B starts at zero, so training starts from the
frozen model. Not mergeable, for f is nonlinear. Reads nothing of W.

Departs from the paper: no biases. LLM-Adapters' (arXiv:2304.01933) has ``activation: tanh`` and starts elsewhere.
``scaled-parallel`` is the paper's best: beside the FFN, with s = 4.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from subspace.adapters.base import Adapter, MethodConfig, Site
from subspace.adapters.bottleneck import ACTIVATIONS
from subspace.adapters.registry import register
from subspace.common.settings import MOST_RANK, setting
from subspace.kernels.low_rank import lora_down, lora_up_add
from subspace.models.frozen_weights import is_linear, layer_sizes

ALIASES = {"parallel-adapter": {}, "pa": {}, "scaled-parallel": {"site": "ffn", "scale": 4.0}}


@register("parallel", family="extension", num_params="bottleneck * (n_in + n_out)", aliases=ALIASES)
class Parallel(Adapter["Parallel.Config"]):
    """See the module's docstring."""

    site = "linear"
    mergeable = False
    size_setting: ClassVar = "bottleneck"
    whole_run: ClassVar = frozenset({"site"})
    roles: ClassVar = {"A": "down", "B": "up"}

    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """The parallel adapter's settings."""

        bottleneck: int = setting(256, "width b of the bottleneck", min=1, max=MOST_RANK)
        activation: str = setting("relu", "the nonlinearity f", choices=tuple(ACTIVATIONS))
        scale: float = setting(1.0, "factor s on what is added")
        dropout: float = setting(0.0, "dropout on the input of A, in training only", min=0, max=1)
        site: str = setting("linear", "beside linear layers or whole feed-forward blocks", choices=("linear", "ffn"))

    @classmethod
    def target_kind(cls, config: Config) -> Site:
        return "mlp" if config.site == "ffn" else "linear"

    @classmethod
    def default_targets(cls, config: Config) -> Sequence[str] | None:
        return None if config.site == "ffn" else ("up_proj", "down_proj")

    @classmethod
    def check_module(cls, config: Config, site: nn.Module) -> str | None:
        linears = [n.replace(".base", "") for n, m in site.named_modules() if is_linear(m)]
        needed = [p for p in inspect.signature(site.forward).parameters.values() if p.default is p.empty]
        if config.site == "ffn" and (not linears or any("." in name for name in linears) or len(needed) > 1):
            return "is no block of linear layers that reads the hidden states alone. Take `site: linear`"
        return None

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        linears = [module for module in base.modules() if is_linear(module)]  # of a block, or itself alone
        self.in_features, self.out_features = layer_sizes(linears[0])[0], layer_sizes(linears[-1])[1]
        self.f = ACTIVATIONS[config.activation]
        self.A = nn.Parameter(torch.empty(config.bottleneck, self.in_features))
        self.B = nn.Parameter(torch.zeros(self.out_features, config.bottleneck))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        x, h = lora_down(x, self.in_dtype("A", x.dtype), self.input_dropout())
        return lora_up_add(self.base(x), self.f(h), self.in_dtype("B", x.dtype), self.config.scale)
