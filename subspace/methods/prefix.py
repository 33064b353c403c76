r"""Prefix tuning: n trained keys and values that every query of every layer sees.

Paper: Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021, arXiv:2101.00190,
section 4; without its network, which is the default here, it is P-tuning v2 (Liu et al., ACL 2022, arXiv:2110.07602).

.. math:: \mathrm{Attention}(Q,\ [K_p; K],\ [V_p; V]),\qquad K_p, V_p \in R^{heads \times n \times d_{head}}

With ``hidden: h`` a layer's keys and values come from a network, :math:`[K_p, V_p] = W_2 \tanh(W_1 Z + b_1) + b_2` with
Z (n, h), W_1 (h, h), W_2 (2 n_kv, h). With ``gate: g`` each query head adds a trained number, at first g, to its logits
on the prefix: at -10 training starts next to the frozen model.

Trains 2 * n * n_kv numbers per layer, n_kv = key-value heads x head dimension, and one more per query head with a
gate. Not mergeable. Reads nothing of W. It never starts from the frozen model exactly: even zero keys take their share
of the softmax.

Departs from the paper: the network is each layer's own, where the paper's first layer serves all, so that ZeRO-3 can
shard it and a layer needs no other. The gate is ours. The keys carry no rotary embedding, and real tokens keep their
positions; HF PEFT moves them up by n, which is the same class of functions with rotated keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.adapters.base import MethodConfig
from subspace.adapters.registry import register
from subspace.adapters.virtual_tokens import AttentionAdapter, linear
from subspace.common.settings import MOST_RANK, setting

PLAIN, NETWORK = "2 * n * n_kv", "(n + hidden + 1) * hidden + 2 * (hidden + 1) * n_kv"


@register(
    "prefix",
    family="reconstruction",
    num_params=f"({NETWORK} if hidden else {PLAIN}) + (gate is not None) * heads",
    aliases={"prefix-tuning": {}, "p-tuning-v2": {"hidden": 0}},
)
class Prefix(AttentionAdapter["Prefix.Config"]):
    """See the module's docstring."""

    size_setting: ClassVar = "n"
    roles: ClassVar = {
        **{"K": "prompt", "V": "prompt", "gate": "scale"},
        **{"Z": "prompt", "W1": "core", "b1": "bias", "W2": "up", "b2": "bias"},
    }

    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """The prefix's settings."""

        n: int = setting(30, "keys and values added to each layer", min=1, max=MOST_RANK)
        std: float = setting(1.0, "standard deviation of the Gaussian that they, or Z, start from", min=0)
        hidden: int = setting(0, "width h of the network that they come from; 0 is none", min=0, max=MOST_RANK)
        gate: float | None = setting(None, "start of a trained offset of each query head's logits on the prefix")

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        h, shape = config.hidden, (self.num_kv_heads, config.n, self.head_dim)
        if h:
            self.Z = nn.Parameter(torch.empty(config.n, h).normal_(std=config.std))
            self.W1, self.b1 = linear(h, h)
            self.W2, self.b2 = linear(h, 2 * self.num_kv_heads * self.head_dim)
        else:
            self.K, self.V = (nn.Parameter(torch.empty(shape).normal_(std=config.std)) for _ in range(2))
        if config.gate is not None:
            self.gate = nn.Parameter(torch.full((self.num_heads,), config.gate))

    def prefix(self) -> tuple[Tensor, Tensor]:
        if not self.config.hidden:
            return self.K, self.V
        rows = F.linear(torch.tanh(F.linear(self.Z, self.W1, self.b1)), self.W2, self.b2)
        keys, values = rows.view(-1, 2, self.num_kv_heads, self.head_dim).permute(1, 2, 0, 3)
        return keys, values

    def offset(self) -> Tensor | None:
        return None if self.config.gate is None else self.gate
