r"""Pfeiffer adapter: one bottleneck network per layer, after the MLP.

Paper: Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", EACL 2021,
arXiv:2005.00247, section 2.2 and appendix A.1.

.. math:: h' = h + s\,(U f(D (h + x) + c) + e),\qquad D \in R^{b \times d},\ U \in R^{d \times b}

h is what the MLP is about to add to the residual stream, and x that stream. Trains 2 * b * d + b + d numbers per layer.
Not mergeable, for f is nonlinear. Reads nothing of W.

That the network reads x too is AdapterHub's form in a pre-norm decoder (``adapters`` 1.3, SeqBnConfig); ``residual:
false`` reads h alone. Departs from the paper: there a norm follows (BERT); U starts at zero, so that training starts
from the frozen model (``start: gaussian``: as theirs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from subspace.adapters.bottleneck import NUM_PARAMS, BottleneckAdapter, BottleneckConfig, ResidualStream
from subspace.adapters.registry import register
from subspace.common.settings import setting


@register("pfeiffer", family="extension", num_params=NUM_PARAMS, aliases={"adapterp": {}})
class Pfeiffer(BottleneckAdapter["Pfeiffer.Config"]):
    """See the module's docstring."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BottleneckConfig):
        """The bottleneck's settings."""

        residual: bool = setting(True, "read the residual stream besides what the MLP adds to it, as AdapterHub's does")

    @classmethod
    def settings_of_file(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"residual": False, **settings}  # before this setting, none read it

    def attach(self, model: nn.Module) -> None:
        if self.config.residual:
            self.residual = ResidualStream(model, self)

    @classmethod
    def default_targets(cls, config: Config) -> Sequence[str]:
        return ("down_proj",)
