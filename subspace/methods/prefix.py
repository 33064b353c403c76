r"""Prefix tuning: n trained keys and values that every query of every layer sees.

Paper: Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021, arXiv:2101.00190,
section 4; without its reparametrisation it is P-tuning v2 (Liu et al., ACL 2022, arXiv:2110.07602).

.. math:: \mathrm{Attention}(Q,\ [K_p; K],\ [V_p; V]),\qquad K_p, V_p \in R^{heads \times n \times d_{head}}

Trains 2 * n * n_kv numbers per layer, n_kv = key-value heads x head dimension. Not mergeable. Reads nothing of W.
It never starts from the frozen model: even zero keys take their share of the softmax.

The keys carry no rotary embedding, and real tokens keep their positions; HF PEFT moves them up by n, which is the
same class of functions with rotated keys. Without the paper's reparametrising network, which only shapes the
optimization.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from subspace.method import MethodConfig, register
from subspace.settings import setting
from subspace.virtual_tokens import AttentionAdapter


@register("prefix", family="reconstruction", trains="2 * n * n_kv", aliases={"prefix-tuning": {}, "p-tuning-v2": {}})
class Prefix(AttentionAdapter):
    """See the module's docstring."""

    dial: ClassVar = "n"
    roles: ClassVar = {"K": "prompt", "V": "prompt"}

    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """The prefix's settings."""

        n: int = setting(30, "keys and values added to each layer", min=1)
        std: float = setting(1.0, "standard deviation of the Gaussian they start from", min=0)

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        shape = (self.num_kv_heads, config.n, self.head_dim)
        self.K = nn.Parameter(torch.empty(shape).normal_(std=config.std))
        self.V = nn.Parameter(torch.empty(shape).normal_(std=config.std))

    def prefix(self) -> tuple[Tensor, Tensor]:
        return self.K, self.V
