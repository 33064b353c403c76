r"""Pfeiffer adapter: one bottleneck network per layer, after the MLP.

Paper: Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", EACL 2021,
arXiv:2005.00247, section 2.2 and appendix A.1.

.. math:: h' = h + s\,(U f(D h + c) + e),\qquad D \in R^{b \times d},\ U \in R^{d \times b}

h is what the MLP is about to add to the residual stream. Trains 2 * b * d + b + d numbers per layer. Not mergeable,
for f is nonlinear. Reads nothing of W.

Departs from the paper: there the adapter stands behind the sub-layer's norm (BERT), which in a pre-norm decoder is the
MLP's output itself; U starts at zero, so that training starts from the frozen model (``start: gaussian``: as theirs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from subspace.adapters.bottleneck import NUM_PARAMS, BottleneckAdapter, BottleneckConfig
from subspace.adapters.registry import register


@register("pfeiffer", family="extension", num_params=NUM_PARAMS, aliases={"adapterp": {}})
class Pfeiffer(BottleneckAdapter["Pfeiffer.Config"]):
    """See the module's docstring."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BottleneckConfig):
        """The bottleneck's settings."""

    @classmethod
    def default_targets(cls, config: Config) -> Sequence[str]:
        return ("down_proj",)
