r"""Series adapter: LLM-Adapters' bottleneck network on the MLP's output.

Paper: Hu et al., "LLM-Adapters: An Adapter Family for Parameter-Efficient Fine-Tuning of Large Language Models", EMNLP
2023, arXiv:2304.01933, section 3 (series adapter).

.. math:: h' = h + s\,U f(D h),\qquad D \in R^{b \times d},\ U \in R^{d \times b}

h is what the MLP is about to add to the residual stream. Trains 2 * b * d numbers per layer: with b = 256, the 0.99 %
that are published for LLaMA-7B. Not mergeable, for f is nonlinear. Reads nothing of W.

With ``start: gaussian`` it is the published one. Departs from it: U starts at zero by default, so that training starts
from the frozen model. It differs from ``pfeiffer`` in its defaults: width, tanh, no biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from subspace.adapters.bottleneck import ACTIVATIONS, NUM_PARAMS, BottleneckAdapter, BottleneckConfig
from subspace.adapters.registry import register
from subspace.common.settings import MOST_RANK, setting


@register("series", family="extension", num_params=NUM_PARAMS, aliases={"series-adapter": {}})
class Series(BottleneckAdapter["Series.Config"]):
    """See the module's docstring."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BottleneckConfig):
        """The bottleneck's settings."""

        bottleneck: int = setting(256, "width b of the bottleneck", min=1, max=MOST_RANK)
        activation: str = setting("tanh", "the nonlinearity f", choices=tuple(ACTIVATIONS))
        bias: bool = setting(False, "train biases in both layers")

    @classmethod
    def default_targets(cls, config: Config) -> Sequence[str]:
        return ("down_proj",)
