r"""Spectral adapter: fine-tune the top singular vectors of a weight additively.

Paper: Zhang and Pilanci, "Spectral Adapter: Fine-Tuning in Spectral Space", NeurIPS 2024, arXiv:2405.13952, eq. 2.

.. math:: W' = W + (U_r + P)\,\Sigma_r\,(V_r + Q)^T - U_r \Sigma_r V_r^T

Every weight is (out, in); U_r, Sigma_r, V_r are its r largest singular triplets. Trains r * (in + out) numbers per
layer. P and Q start at zero, so training starts from the frozen model, to the last bit; both have a gradient in the
first step. Mergeable; as a LoRA it has rank 2 r. Reads W once; the largest directions of a quantised W serve as well.

Departs from the subspace-tuning authors' code, which multiplies the update by alpha / r: there is no such scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.adapters.base import LinearAdapter, MethodConfig
from subspace.adapters.linalg import top_singular_triplets
from subspace.adapters.low_rank import check_rank
from subspace.adapters.registry import register
from subspace.common.settings import MOST_RANK, setting
from subspace.kernels.low_rank import lora_up_add


@register("spectral", family="combination", num_params="r * (n_in + n_out)")
class Spectral(LinearAdapter["Spectral.Config"]):
    """See the module's docstring."""

    U: Tensor
    sigma: Tensor
    Vt: Tensor
    roles: ClassVar = {"Q": "down", "P": "up"}
    copied_buffers: ClassVar = ("U", "sigma", "Vt")
    weight_access: ClassVar = "largest"
    size_setting: ClassVar = "r"

    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """The spectral adapter's settings."""

        r: int = setting(16, "singular directions that are tuned", min=1, max=MOST_RANK)

    def __init__(self, base: nn.Module, config: Config) -> None:
        super().__init__(base, config)
        r = config.r
        check_rank(self, r)
        self.P = nn.Parameter(torch.zeros(self.out_features, r))
        self.Q = nn.Parameter(torch.zeros(self.in_features, r))
        self.register_buffer("U", torch.zeros(self.out_features, r))
        self.register_buffer("sigma", torch.zeros(r))
        self.register_buffer("Vt", torch.zeros(r, self.in_features))

    def init_from_weight(self, W: Tensor) -> None:
        for own, found in zip((self.U, self.sigma, self.Vt), top_singular_triplets(W, self.config.r), strict=True):
            own.copy_(found)

    def to_lora(self) -> tuple[Tensor, Tensor]:
        # P S (V + Q)^T + U S Q^T, which is the equation with W's own part taken out.
        return torch.cat([self.Vt + self.Q.T, self.Q.T]), torch.cat([self.P * self.sigma, self.U * self.sigma], dim=1)

    def weight(self, W: Tensor) -> Tensor:
        moved = ((self.U + self.P) * self.sigma) @ (self.Vt + self.Q.T)
        return W + moved - (self.U * self.sigma) @ self.Vt

    def forward(self, x: Tensor) -> Tensor:
        sigma = self.in_dtype("sigma", x.dtype)
        q = F.linear(x, self.in_dtype("Q", x.dtype).T) * sigma
        v = F.linear(x, self.in_dtype("Vt", x.dtype)) * sigma
        out = lora_up_add(self.frozen(x), q + v, self.in_dtype("P", x.dtype))
        return lora_up_add(out, q, self.in_dtype("U", x.dtype))
