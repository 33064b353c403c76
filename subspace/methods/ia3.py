r"""(IA)^3: scale what a layer puts out, or what it takes in.

Paper: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS
2022, arXiv:2205.05638, section 3.3.

.. math:: W' = \mathrm{diag}(l)\,W,\qquad W \in R^{out \times in},\ l \in R^{out}

Trains out numbers per layer (in numbers where the input is scaled: then W' = W diag(l)). l starts at one, so training
starts from the frozen model. Mergeable. Reads W only to merge.

``variant: paper`` is the subspace-tuning paper's: outputs everywhere. ``original`` is the method's own and PEFT's: keys
and values are scaled as outputs, the feed-forward block's hidden values as the input of ``down_proj``. The bias is
scaled too, as in PEFT, unless ``scale_bias`` is false, as in the subspace-tuning authors' code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from subspace.adapters.base import LinearAdapter, MethodConfig
from subspace.adapters.registry import register
from subspace.common.settings import setting


@register("ia3", family="reconstruction", num_params="n_out if side == 'output' else n_in", aliases={"(ia)3": {}})
class IA3(LinearAdapter["IA3.Config"]):
    """See the module's docstring."""

    roles: ClassVar = {"l": "scale"}

    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """(IA)^3's settings."""

        variant: str = setting("paper", "which values are scaled", choices=("paper", "original"))
        scale_bias: bool = setting(True, "scale the layer's bias too, where its output is scaled")
        side: str = setting("output", "what is scaled; `variant: original` sets it", choices=("output", "input"))

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        self.l = nn.Parameter(torch.ones(self.out_features if config.side == "output" else self.in_features))

    @classmethod
    def default_targets(cls, config: Config) -> Sequence[str] | None:
        return ("k_proj", "v_proj", "down_proj") if config.variant == "original" else None

    @classmethod
    def config_for(cls, config: Config, name: str) -> Config:
        feeds_forward = config.variant == "original" and name.rpartition(".")[2] == "down_proj"
        return dataclasses.replace(config, side="input") if feeds_forward else config

    def weight(self, W: Tensor) -> Tensor:
        return self.l[:, None] * W if self.config.side == "output" else W * self.l

    def bias(self, b: Tensor | None) -> Tensor | None:
        scaled = b is not None and self.config.scale_bias and self.config.side == "output"
        return b * self.l if b is not None and scaled else b

    def forward(self, x: Tensor) -> Tensor:
        l = self.in_dtype("l", x.dtype)
        if self.config.side == "input":
            return self.frozen(x * l)
        b = self.base_bias()
        if b is None or self.config.scale_bias:
            return self.frozen(x) * l
        return self.product(x) * l + b
