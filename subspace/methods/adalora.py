r"""AdaLoRA: a low-rank update in the form of an SVD, whose rank moves to the layers that need it.

Paper: Zhang et al., "AdaLoRA: Adaptive Budget Allocation ...", ICLR 2023, arXiv:2303.10512, eqs. 3-11.

.. math:: W' = W + s\,B\,\mathrm{diag}(E)\,A,\qquad B \in R^{out \times r},\ A \in R^{r \times in},\ s=\alpha / r

Trains r * (in + out + 1) numbers per layer. E starts at zero: training starts from the frozen model. Mergeable, and
reads W for that only. The least important E become zero, and may come back until the last phase. Departs from the
paper, with its authors' code: the penalty for factors that are not orthonormal is not squared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from subspace.adapters.base import OptimizerAccess, TrainProgress
from subspace.adapters.linalg import orthogonality_gap
from subspace.adapters.low_rank import LowRankConfig, TripletAdapter
from subspace.adapters.registry import register
from subspace.common.settings import MOST_RANK, setting


@register("adalora", family="extension", num_params="r * (n_in + n_out + 1)")
class AdaLoRA(TripletAdapter["AdaLoRA.Config"]):
    """See the module's docstring."""

    whole_run: ClassVar = frozenset({"warm_up", "cool_down", "every"})

    @dataclass(frozen=True, kw_only=True)
    class Config(LowRankConfig):
        """AdaLoRA's settings."""

        r: int = setting(12, "rank at the start", min=1, max=MOST_RANK)
        target_r: int = setting(8, "mean rank of the updates at the end", min=0, max=MOST_RANK)
        warm_up: float = setting(0.1, "share of the run before the budget falls", min=0, max=1)
        cool_down: float = setting(0.3, "share of the run, at its end, with the pattern fixed", min=0, max=1)
        every: int = setting(10, "optimizer steps from one allocation to the next", min=1)
        beta: float = setting(0.85, "smoothing of importances, and of how far they stray", min=0, max=1)
        orthogonality: float = setting(0.1, "weight of the penalty; 0 is AdaLoRA without MPC_o", min=0)

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config, std=0.02)
        self.gradients: dict[str, Tensor] = {}
        self.history = {key: torch.zeros(2, *p.shape) for key, p in self.trained().items()}

    def penalty(self) -> Tensor:
        weight: float = self.config.orthogonality / self.num_siblings
        return weight * orthogonality_gap(self.A, self.B.T)

    def scores(self, access: OptimizerAccess) -> Tensor:
        """Update the importances by this step (eqs. 8, 9); return those of (B_j, E_j, A_j), (r,) (eqs. 7, 10)."""
        for key, gradient in self.gradients.items():
            # As in the authors' code, the value is the one after the step.
            importance = (access.value(self.trained()[key]) * gradient).abs()
            mean, waver = self.history[key].to(importance.device)
            mean = importance.lerp(mean, self.config.beta)
            self.history[key] = torch.stack([mean, (importance - mean).abs().lerp(waver, self.config.beta)])
        A, E, B = (self.history[key].prod(0) for key in "AEB")
        return E + A.mean(1) + B.mean(0)

    @classmethod
    def before_step(cls, adapters: Sequence[Self], progress: TrainProgress, access: OptimizerAccess) -> None:
        watching = progress.fraction(adapters[0].config.warm_up, adapters[0].config.cool_down) < 1
        trained = [(adapter, key, p) for adapter in adapters for key, p in adapter.trained().items()]
        gradients = access.grads([p for _, _, p in trained]) if watching else []
        for adapter in adapters:
            adapter.gradients = {}
        for (adapter, key, _), gradient in zip(trained, gradients, strict=False):
            adapter.gradients[key] = gradient.nan_to_num()

    @classmethod
    def after_step(cls, adapters: Sequence[Self], progress: TrainProgress, access: OptimizerAccess) -> None:
        scores = [adapter.scores(access) for adapter in adapters]
        initial, target = (sum(getattr(a.config, key) for a in adapters) for key in ("r", "target_r"))
        if (pruned := initial - budget(adapters[0].config, progress, initial, target)) > 0:
            threshold = torch.cat(scores).sort().values[pruned - 1]  # kthvalue is not deterministic on every GPU build
            for adapter, score in zip(adapters, scores, strict=True):
                access.write(adapter.E, access.value(adapter.E) * (score > threshold))


def budget(config: AdaLoRA.Config, progress: TrainProgress, initial: int, target: int) -> int:
    """Return how many of the initial E may stay after this step (eq. 11); all at a step that allocates nothing."""
    passed = progress.fraction(config.warm_up, config.cool_down)
    if passed <= 0 or (passed <= 1 and progress.step % config.every):
        return initial
    return int(target + (initial - target) * max(0.0, 1 - passed) ** 3)
