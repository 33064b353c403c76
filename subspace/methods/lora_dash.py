r"""LoRA-Dash: LoRA that, once warm, also trains the directions of W that it has found to matter.

Paper: Si, Shi, Zhang, et al., "Unleashing the Power of Task-Specific Directions in Parameter Efficient Fine-tuning",
ICLR 2025, arXiv:2409.01035.

.. math:: W' = W + s\,B A + U_S\,\mathrm{diag}(\delta)\,V_S^T,\qquad U_S \in R^{out \times d},\ V_S \in R^{in \times d}

Every weight is (out, in). Trains r * (in + out) + d numbers per layer. B and delta start at zero, so training starts
from the frozen model and goes on smoothly at the launch. At the launch, S are the d singular directions of W with the
largest rate of change :math:`|u_j^T (s B A) v_j| / (\sigma_j + \epsilon)`. Mergeable; as a LoRA it has rank r + d.
Reads W once, at the launch: all of it, exactly; small directions of a quantised W are noise, so they come from the
unquantised checkpoint. The directions are kept with the adapter, so that a run that is resumed has launched. Each of
the two branches drops values of its input by a mask of its own. Adam counts delta's steps from the launch.

Departs from the authors' code: the launch is at an optimizer step, where that counts forward passes, in evaluation and
recomputation too; the launched state is saved; a small epsilon stands in the rate, as the paper has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.adapters.base import OptimizerAccess, TrainProgress
from subspace.adapters.linalg import full_svd
from subspace.adapters.low_rank import LowRankAdapter, LowRankConfig
from subspace.adapters.registry import register
from subspace.common.settings import MOST_RANK, setting
from subspace.kernels.low_rank import lora_down, lora_up_add

EPSILON = 1e-6


@register("lora-dash", family="combination", num_params="r * (n_in + n_out) + d", aliases={"dash": {}})
class LoRADash(LowRankAdapter["LoRADash.Config"]):
    """See the module's docstring."""

    U: Tensor
    Vt: Tensor
    roles: ClassVar = {"A": "down", "B": "up", "delta": "core"}
    copied_buffers: ClassVar = ("U", "Vt")
    weight_access: ClassVar = "late"
    delayed_grad_params: ClassVar = frozenset({"delta"})
    whole_run: ClassVar = frozenset({"launch"})

    @dataclass(frozen=True, kw_only=True)
    class Config(LowRankConfig):
        """LoRA-Dash's settings."""

        d: int = setting(8, "task-specific directions of each layer", min=1, max=MOST_RANK)
        launch: int = setting(100, "optimizer step after which they are chosen", min=1)

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        self.delta = nn.Parameter(torch.zeros(config.d))
        self.register_buffer("U", torch.zeros(self.out_features, config.d))
        self.register_buffer("Vt", torch.zeros(config.d, self.in_features))
        self.seen: tuple[Tensor, Tensor] | None = None

    def to_lora(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.A, self.Vt]), torch.cat([self.scale * self.B, self.U * self.delta], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        Vt, p = self.in_dtype("Vt", x.dtype), self.input_dropout()
        x, read = lora_down(x, Vt, p) if p else (x, F.linear(x, Vt))  # sites that drop nothing may share x
        dashed = read * self.in_dtype("delta", x.dtype)
        return lora_up_add(super().forward(x), dashed, self.in_dtype("U", x.dtype))

    @classmethod
    def after_step(cls, adapters: Sequence[Self], progress: TrainProgress, access: OptimizerAccess) -> None:
        if progress.step != adapters[0].config.launch:
            return
        for adapter in adapters:
            adapter.seen = access.value(adapter.A).float(), access.value(adapter.B).float()
        access.for_each_weight(adapters, cls.choose)
        for adapter in adapters:
            adapter.seen = None
            # Until now its gradient was zero. In the authors' code it had none, and the optimizer meets it here.
            access.reset_optimizer_state(adapter.delta, torch.ones(adapter.config.d, dtype=torch.bool))

    def choose(self, W: Tensor) -> None:
        """Fill U and Vt with the directions of W, ``(out, in)``, that the update changes most for their size."""
        assert self.seen is not None
        A, B = self.seen
        U, sigma, Vt = full_svd(W)
        change = self.scale * ((U.T @ B) * (Vt @ A.T)).sum(dim=1)  # the diagonal of U^T (s B A) V
        chosen = (change.abs() / (sigma + EPSILON)).topk(min(self.config.d, len(sigma))).indices
        self.U[:, : len(chosen)] = U[:, chosen]
        self.Vt[: len(chosen)] = Vt[chosen]
