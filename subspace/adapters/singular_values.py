"""Base of the methods that train singular values: W's own singular vectors, frozen, and a factor between them.

All of them, and W is replaced: ``y = U (s * V^T x)``, two products of the smaller side. Or the p largest, and W stays:
``y = W x + U_p ((s - sigma)_p * V_p^T x)``, as cheap as LoRA of rank p and fit for quantised bases. The second form is
this project's; with all triplets and exact arithmetic both are the same function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import TypeVar

from subspace.adapters.base import LinearAdapter, MethodConfig
from subspace.adapters.linalg import full_svd, top_singular_triplets
from subspace.common.settings import setting
from subspace.kernels.low_rank import lora_up_add


@dataclass(frozen=True, kw_only=True)
class SingularValueConfig(MethodConfig):
    """Settings shared by the methods that train singular values."""

    p: int | None = setting(
        None, "train the p largest singular values only, beside W; none is all, in its place", min=1
    )


C = TypeVar("C", bound=SingularValueConfig, default=Any)


class SingularValueAdapter(LinearAdapter[C]):
    """``W' = U diag(values) V^T`` with :meth:`values` in place of W's singular values."""

    U: Tensor
    Vt: Tensor
    sigma: Tensor
    size_setting: ClassVar = "p"
    weight_access: ClassVar = "spectrum"
    identity_tolerance: ClassVar = 1e-4  # float32 rounding of the decomposition, where W is replaced

    def __init__(self, base: nn.Module, config: C) -> None:
        super().__init__(base, config)
        self.k = min(config.p or self.in_features, self.in_features, self.out_features)
        self.register_buffer("sigma", torch.zeros(self.k))
        # Larger than W where all of them are kept, and to be had from W again: an adapter's file holds only a few.
        few = config.p is not None
        dtype = self.base.weight.dtype if self.base.weight.dtype.is_floating_point and not few else torch.float32
        self.register_buffer("U", torch.zeros(self.out_features, self.k, dtype=dtype), persistent=few)
        self.register_buffer("Vt", torch.zeros(self.k, self.in_features, dtype=dtype), persistent=few)

    @classmethod
    def check_quantization(cls, config: C, storage: str) -> str | None:
        if config.p:
            return None
        return "all of W's singular vectors would be held in 16 bits, twice the size that W had. Set method.p=64, say"

    def values(self) -> Tensor:
        """Return the singular values in W's place, ``(k,)``."""
        raise NotImplementedError

    def init_from_weight(self, W: Tensor) -> None:
        svd = top_singular_triplets(W, self.k) if self.config.p else full_svd(W)
        for own, found in zip((self.U, self.sigma, self.Vt), svd, strict=True):
            own.copy_(found)

    def weight(self, W: Tensor) -> Tensor:
        kept = self.sigma if self.config.p else None
        base = W if kept is not None else torch.zeros_like(W)
        values = self.values() - (0 if kept is None else kept)
        return base + (self.U.to(W.dtype) * values.to(W.dtype)) @ self.Vt.to(W.dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.Vt.to(x.dtype))
        if self.config.p:
            return lora_up_add(self.frozen(x), h * (self.values() - self.sigma).to(x.dtype), self.U)
        b = self.base_bias()
        return F.linear(h * self.values().to(x.dtype), self.U.to(x.dtype), None if b is None else b.to(x.dtype))

    def to_lora(self) -> tuple[Tensor, Tensor] | None:
        if not self.config.p:
            return None
        return self.Vt.clone(), self.U * (self.values() - self.sigma)
