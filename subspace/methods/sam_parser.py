r"""SAM-PARSER: train a weight's singular values themselves.

Paper: Peng et al., "SAM-PARSER: Fine-tuning SAM Efficiently by Parameter Space Reconstruction", AAAI 2024,
arXiv:2308.14604, eq. 4; as "reconstruction, mode 1" in Si, Yang, Shen, arXiv:2407.05417.

.. math:: W' = U\,\mathrm{diag}(\sigma')\,V^T,\qquad W = U\,\mathrm{diag}(\sigma)\,V^T \in R^{out \times in}

Trains min(in, out) numbers per layer, or p. sigma' starts at sigma, so training starts from the frozen model, up to the
rounding of the decomposition where all singular values are trained; exactly with ``p``. Mergeable. Reads all singular
vectors of W once; they are kept beside it, in its dtype (twice the memory of a square W).

Departs from the subspace-tuning authors' code, in which sigma' never reaches the optimizer; their figures for it are
those of a frozen model. The form that trains the p largest values beside a W that stays is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from subspace.adapters.registry import register
from subspace.adapters.singular_values import SingularValueAdapter, SingularValueConfig


@register("sam-parser", family="reconstruction", num_params="min(p or n_in, n_in, n_out)")
class SAMParser(SingularValueAdapter["SAMParser.Config"]):
    """See the module's docstring."""

    roles: ClassVar = {"s": "scale"}

    @dataclass(frozen=True, kw_only=True)
    class Config(SingularValueConfig):
        """SAM-PARSER's settings."""

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        self.s = nn.Parameter(torch.zeros(self.k))

    def init_from_weight(self, W: Tensor) -> None:
        super().init_from_weight(W)
        self.s.data.copy_(self.sigma)

    def values(self) -> Tensor:
        return self.s
