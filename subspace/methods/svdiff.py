r"""SVDiff: shift a weight's singular values.

Paper: Han et al., "SVDiff: Compact Parameter Space for Diffusion Fine-Tuning", ICCV 2023, arXiv:2303.11305, eq. 3.

.. math:: W' = U\,\mathrm{diag}(\mathrm{relu}(\sigma + \delta))\,V^T,\qquad W = U\,\mathrm{diag}(\sigma)\,V^T

Trains min(in, out) numbers per layer, or p. delta starts at zero, so training starts from the frozen model, up to the
rounding of the decomposition where all singular values are trained; exactly with ``p``. Mergeable. Reads all singular
vectors of W once; they are kept beside it, in its dtype (twice the memory of a square W). A direction whose value has
fallen to zero is dead: its gradient is zero too. Learning rates are ten to a hundred times LoRA's.

Departs from the paper: the form that trains the p largest values beside a W that stays is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from subspace.adapters.registry import register
from subspace.adapters.singular_values import SingularValueAdapter, SingularValueConfig


@register("svdiff", family="combination", num_params="min(p or n_in, n_in, n_out)")
class SVDiff(SingularValueAdapter["SVDiff.Config"]):
    """See the module's docstring."""

    roles: ClassVar = {"delta": "core"}

    @dataclass(frozen=True, kw_only=True)
    class Config(SingularValueConfig):
        """SVDiff's settings."""

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        self.delta = nn.Parameter(torch.zeros(self.k))

    def values(self) -> Tensor:
        return torch.relu(self.sigma + self.delta)
