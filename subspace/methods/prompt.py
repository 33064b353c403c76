r"""Prompt tuning: n trained vectors in front of the embedded text.

Paper: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021, arXiv:2104.08691,
section 2.

.. math:: E' = [P;\, E],\qquad P \in R^{n \times d},\ E \in R^{T \times d}

E are the text's embeddings. Trains n * d numbers. It never starts from the frozen model: the vectors take their share
of every attention. Not mergeable. Reads n rows of the embedding, drawn from the whole vocabulary, to start from them
(``start: gaussian``: from N(0, 1)).

The text's tokens keep their distances and move up by n positions. Departs from the paper: it draws from the 5,000 most
common tokens, which a tokenizer does not tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from subspace.adapters.base import MethodConfig
from subspace.adapters.registry import register
from subspace.adapters.virtual_tokens import PromptAdapter
from subspace.common.settings import MOST_RANK, setting


@register("prompt", family="reconstruction", num_params="n * n_out", aliases={"prompt-tuning": {}, "soft-prompt": {}})
class Prompt(PromptAdapter):
    """See the module's docstring."""

    size_setting: ClassVar = "n"
    weight_access: ClassVar = "rows"
    roles: ClassVar = {"P": "prompt"}

    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """The prompt's settings."""

        n: int = setting(20, "vectors before the text", min=1, max=MOST_RANK)
        start: str = setting("vocabulary", "rows of the embedding, or Gaussian", choices=("vocabulary", "gaussian"))

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        self.P = nn.Parameter(torch.empty(config.n, self.out_features).normal_())
        self.rows = torch.randint(self.in_features, (config.n,))

    def init_from_weight(self, W: Tensor) -> None:
        if self.config.start == "vocabulary":
            self.P.data.copy_(W[self.rows.to(W.device)] * self.gain)

    def vectors(self) -> Tensor:
        return self.P
