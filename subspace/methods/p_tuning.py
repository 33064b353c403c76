r"""P-tuning: prompt tuning whose vectors come from a small trained network.

Paper: Liu et al., "GPT Understands, Too", arXiv:2103.10385, section 3.2.

.. math:: E' = [P;\, E],\quad P = W_3 f(W_2 f(W_1 Z + b_1) + b_2) + b_3,\qquad Z \in R^{n \times d}

f is ReLU; the network, :math:`W_1 \in R^{h \times d}`, :math:`W_2 \in R^{h \times h}`, :math:`W_3 \in R^{d \times h}`,
takes each row of Z by itself. Trains n d + (d h + h) + (h^2 + h) + (h d + d) numbers. It never starts from the frozen
model. Not mergeable. Reads nothing of W.

Departs from the paper, with its authors' later code and HF PEFT: an MLP in place of the LSTM, and all vectors before
the text. ``p-tuning-v2`` is another method, ``prefix``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.adapters.base import MethodConfig
from subspace.adapters.registry import register
from subspace.adapters.virtual_tokens import PromptAdapter, linear
from subspace.common.settings import MOST_RANK, setting

TRAINS = "n * n_out + 2 * n_out * hidden + hidden**2 + 2 * hidden + n_out"


@register("p-tuning", family="reconstruction", num_params=TRAINS, aliases={"p-tuning-v1": {}})
class PTuning(PromptAdapter):
    """See the module's docstring."""

    size_setting: ClassVar = "hidden"
    roles: ClassVar = {
        "Z": "prompt",
        **{"W1": "down", "b1": "bias", "W2": "core", "b2": "bias", "W3": "up", "b3": "bias"},
    }

    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """The prompt's and its network's settings."""

        n: int = setting(20, "vectors before the text", min=1, max=MOST_RANK)
        hidden: int = setting(128, "width h of the network", min=1, max=MOST_RANK)

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        d, h = self.out_features, config.hidden
        self.Z = nn.Parameter(torch.empty(config.n, d).normal_())
        self.W1, self.b1 = linear(d, h)
        self.W2, self.b2 = linear(h, h)
        self.W3, self.b3 = linear(h, d)

    def vectors(self) -> Tensor:
        hidden = F.relu(F.linear(self.Z, self.W1, self.b1))
        return F.linear(F.relu(F.linear(hidden, self.W2, self.b2)), self.W3, self.b3)
