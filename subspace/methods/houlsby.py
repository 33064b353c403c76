r"""Houlsby adapter: a small bottleneck network after each attention and each MLP.

Paper: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, arXiv:1902.00751, section 2.1 and
fig. 2.

.. math:: h' = h + s\,(U f(D h + c) + e),\qquad D \in R^{b \times d},\ U \in R^{d \times b}

h is what the sub-layer is about to add to the residual stream. Trains 2 * b * d + b + d numbers per site, two sites
per layer. Not mergeable, for f is nonlinear. Reads nothing of W.

Departs from the paper: U starts at zero, so that training starts from the frozen model (the paper: near-zero
Gaussian, here ``start: gaussian``); f is SiLU by default, as in AdapterHub; the layer norms stay frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

from subspace.adapters.bottleneck import ACTIVATIONS, NUM_PARAMS, BottleneckAdapter, BottleneckConfig
from subspace.adapters.registry import register
from subspace.common.settings import setting


@register("houlsby", family="extension", num_params=NUM_PARAMS)
class Houlsby(BottleneckAdapter["Houlsby.Config"]):
    """See the module's docstring."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BottleneckConfig):
        """The bottleneck's settings."""

        activation: str = setting("silu", "the nonlinearity f", choices=tuple(ACTIVATIONS))
