r"""FlexLoRA: low-rank updates that trade directions among layers by the entropy of their spectra.

Paper: Liu, Si, Jia, "FlexLoRA: Entropy-Guided Flexible Low-Rank Adaptation", ICLR 2026, arXiv:2601.22905.

.. math:: W' = W + s\,B\,\mathrm{diag}(E \odot a)\,A,\qquad B \in R^{out \times R},\ A \in R^{R \times in}

with s = alpha / r, R = r + headroom, a in {0, 1}: r directions are alive at first, and as many in all layers together
for ever. Trains r * (in + out + 1) numbers per layer; what is not alive lies idle. E starts at zero: training starts
from the frozen model. Mergeable. A layer matters by :math:`-\sum p \log p / \log r`, :math:`p = E^2 / \sum E^2`. Every
so often the layers that matter least lose the direction with the smallest abs(E), and those that matter most gain one.

Departs from the authors' code, by the formulas: abs(E), not E; a layer with one direction matters 0 and one whose E are
all zero 1, where theirs is not a number, and gains; Adam goes on but for the new directions, theirs is made anew. By
choice: new vectors are of size 0.02, as the first, theirs of size 1; moves fall as in the paper, theirs stay
(``constant``) or fall late (``code``) and begin when the warm-up ends; a layer loses or gains, theirs may do both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from subspace.adapters.base import OptimizerAccess, TrainProgress
from subspace.adapters.linalg import entropy_exchanges, orthogonality_gap
from subspace.adapters.low_rank import LowRankConfig, TripletAdapter
from subspace.adapters.registry import register
from subspace.common.settings import MOST_RANK, setting

STD = 0.02


@register("flexlora", family="extension", num_params="r * (n_in + n_out + 1)")
class FlexLoRA(TripletAdapter["FlexLoRA.Config"]):
    """See the module's docstring."""

    alive: Tensor
    whole_run: ClassVar = frozenset({"moves", "decay", "warm_up", "cool_down", "every"})

    @dataclass(frozen=True, kw_only=True)
    class Config(LowRankConfig):
        """FlexLoRA's settings."""

        headroom: int = setting(4, "directions that a layer may gain", min=0, max=MOST_RANK)
        moves: int = setting(4, "layers that lose a direction at the first reallocation", min=0, max=MOST_RANK)
        decay: str = setting("paper", "how moves fall, as p goes from 0 to 1", choices=("paper", "code", "constant"))
        warm_up: float = setting(0.1, "share of the run before the first reallocation", min=0, max=1)
        cool_down: float = setting(0.3, "share of the run, at its end, with the ranks fixed", min=0, max=1)
        every: int = setting(10, "optimizer steps from one reallocation to the next", min=1)
        orthogonality: float = setting(0.1, "weight of the penalty for factors that are not orthonormal", min=0)

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config, std=STD, spare=config.headroom)
        self.register_buffer("alive", (torch.arange(len(self.E)) < config.r).float())

    def core(self, h: Tensor) -> Tensor:
        return h * (self.E * self.alive).to(h.dtype)

    def idle_params(self) -> int:
        idle = self.config.headroom if self.alive.is_meta else int((self.alive == 0).sum())
        return idle * (self.in_features + self.out_features + 1)

    def penalty(self) -> Tensor:
        return self.config.orthogonality / self.num_siblings * orthogonality_gap(self.A, self.B.T, alive=self.alive)

    @classmethod
    def after_step(cls, adapters: Sequence[Self], progress: TrainProgress, access: OptimizerAccess) -> None:
        config = adapters[0].config
        passed = progress.fraction(config.warm_up, config.cool_down)
        if not 0 < passed < 1 or progress.step % config.every:
            return
        E = [access.value(adapter.E) for adapter in adapters]
        # One copy to the host: on a GPU each read would wait for what was launched before. Not a number: not alive.
        sizes = [torch.where(a.alive > 0, e.abs(), torch.nan) for a, e in zip(adapters, E, strict=True)]
        own = torch.split(torch.cat(sizes).cpu(), [len(size) for size in sizes])
        for i, lost, j, new in entropy_exchanges(own, min(moves(config, passed), len(adapters) // 2)):
            adapters[i].alive[lost] = 0
            access.write(adapters[i].E, E[i] * (torch.arange(len(E[i]), device=E[i].device) != lost))
            adapters[j].grow(new, access, seed=progress.step * len(adapters) + j)

    def grow(self, new: int, access: OptimizerAccess, seed: int) -> None:
        """Begin a direction afresh, with E zero, so that the output stays."""
        generator, self.alive[new] = torch.Generator().manual_seed(seed), 1
        for parameter, axis, std in ((self.A, 0, STD), (self.B, 1, STD), (self.E, 0, 0.0)):
            value = access.value(parameter).clone()
            where, begun = torch.zeros_like(value, dtype=torch.bool), value.select(axis, new)
            where.select(axis, new).fill_(True)
            begun.copy_(std * torch.randn(begun.shape, generator=generator))
            access.write(parameter, value)
            access.reset_optimizer_state(parameter, where)


def moves(config: FlexLoRA.Config, passed: float) -> int:
    """Return how many directions change places, as the share ``passed`` of the schedule grows from 0 to 1."""
    return round(config.moves * {"paper": (1 - passed) ** 3, "code": 1 - passed**3, "constant": 1.0}[config.decay])
