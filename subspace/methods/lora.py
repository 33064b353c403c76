r"""LoRA: add a low-rank update to a frozen weight.

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685, section 4.1, eq. 3.

.. math:: W' = W + s\,B A,\qquad W \in R^{out \times in},\ B \in R^{out \times r},\ A \in R^{r \times in},\ s=\alpha/r

Trains r * (in + out) numbers per layer. B starts at zero, so training starts from the frozen model.
Mergeable. Reads W only to merge, so a quantised or sharded base costs nothing extra.

``rslora`` scales by :math:`\alpha/\sqrt r` (Kalajdzievski, arXiv:2312.03732). With ``constraint: nonlinear`` a ReLU
stands between the factors: it is then a parallel adapter and cannot be merged. Departs from the paper: A starts
Kaiming-uniform, as in the authors' code (microsoft/LoRA), where the paper says Gaussian.
"""

from __future__ import annotations

from dataclasses import dataclass

from subspace.adapters.low_rank import ConstrainedConfig, LowRankAdapter
from subspace.adapters.registry import register


@register("lora", family="extension", num_params="r * (n_in + n_out)", aliases={"rslora": {"rslora": True}})
class LoRA(LowRankAdapter):
    """See the module's docstring."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ConstrainedConfig):
        """LoRA's settings, under the paper's names."""
