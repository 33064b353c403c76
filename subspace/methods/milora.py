r"""MiLoRA: train the minor part of a weight, and freeze the rest.

Paper: Wang et al., "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning", NAACL 2025,
arXiv:2406.09044, eqs. 3-5.

.. math:: W' = W + s\,(B A - B_0 A_0),\qquad B_0 = U_{-r}\sqrt{\Sigma_{-r} / s},\ A_0 = \sqrt{\Sigma_{-r} / s}\,V_{-r}^T

Every weight is (out, in); the triplets are its r smallest singular ones. Trains r * (in + out) numbers per layer. B and
A start at B_0 and A_0, so training starts from the frozen model, to the last bit. Mergeable; as a LoRA it has rank 2 r.
Reads W once, exactly: the small directions of a quantised W are noise, so they come from the unquantised checkpoint.

Departs from the paper, which replaces W by :math:`W - s B_0 A_0`: in bfloat16 a quarter of that small difference would
be rounded away. alpha is r unless given, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from subspace.adapters.linalg import SVD, bottom_singular_triplets
from subspace.adapters.low_rank import LowRankConfig, SVDInitAdapter
from subspace.adapters.registry import register
from subspace.common.settings import setting


@register("milora", family="reconstruction", num_params="r * (n_in + n_out)")
class MiLoRA(SVDInitAdapter["MiLoRA.Config"]):
    """See the module's docstring."""

    weight_access: ClassVar = "smallest"

    @dataclass(frozen=True, kw_only=True)
    class Config(LowRankConfig):
        """MiLoRA's settings."""

        alpha: float | None = setting(None, "the update is scaled by alpha / r; none is r", min=1e-6)

    def part(self, W: Tensor) -> SVD:
        return bottom_singular_triplets(W, self.config.r)
