r"""TriLoRA: a low-rank update in the form of a singular value decomposition.

Paper: Feng et al., "TriLoRA: Integrating SVD for Advanced Style Personalization in Text-to-Image Generation",
arXiv:2405.11236; as compared in Si, Yang, Shen, arXiv:2407.05417.

.. math:: W' = W + s\,B\,\mathrm{diag}(E)\,A,\qquad B \in R^{out \times r},\ A \in R^{r \times in},\ s=\alpha/r

Trains r * (in + out + 1) numbers per layer. E starts at zero, so training starts from the frozen model. Mergeable.
Reads W only to merge. It is AdaLoRA without its allocation and without its penalty; ``constraint: orthogonal`` adds
a penalty again.

Departs from the subspace-tuning authors' GLUE code, which ignores the scale; their commonsense code has it.
"""

from __future__ import annotations

from dataclasses import dataclass

from subspace.adapters.low_rank import ConstrainedConfig, TripletAdapter
from subspace.adapters.registry import register


@register("trilora", family="extension", num_params="r * (n_in + n_out + 1)")
class TriLoRA(TripletAdapter["TriLoRA.Config"]):
    """See the module's docstring."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ConstrainedConfig):
        """TriLoRA's settings."""
