r"""PiSSA: train the principal part of a weight, and freeze the rest.

Paper: Meng, Wang, Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
NeurIPS 2024, arXiv:2404.02948, eqs. 2-4.

.. math:: W' = W + s\,(B A - B_0 A_0),\qquad B_0 = U_r\sqrt{\Sigma_r / s},\ A_0 = \sqrt{\Sigma_r / s}\,V_r^T

Every weight is (out, in); U_r, Sigma_r, V_r are its r largest singular triplets. Trains r * (in + out) numbers per
layer. B and A start at B_0 and A_0, so training starts from the frozen model, to the last bit. Mergeable; as a LoRA it
has rank 2 r. Reads W once; the largest directions of a quantised W serve as well.

Departs from the paper, which replaces W by :math:`W - s B_0 A_0`: here W stays as it is, the adapter is usable without
a second base model, and nothing is rounded. alpha is r unless given, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from subspace.adapters.linalg import SVD, top_singular_triplets
from subspace.adapters.low_rank import LowRankConfig, SVDInitAdapter
from subspace.adapters.registry import register
from subspace.common.settings import setting


@register("pissa", family="reconstruction", num_params="r * (n_in + n_out)")
class PiSSA(SVDInitAdapter["PiSSA.Config"]):
    """See the module's docstring."""

    weight_access: ClassVar = "largest"

    @dataclass(frozen=True, kw_only=True)
    class Config(LowRankConfig):
        """PiSSA's settings."""

        alpha: float | None = setting(None, "the update is scaled by alpha / r; none is r", min=1e-6)

    def part(self, W: Tensor) -> SVD:
        return top_singular_triplets(W, self.config.r)
