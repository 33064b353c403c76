r"""Bases of the low-rank methods: two factors, a scale, dropout, and the matrix pattern constraints on the factors.

The constraints are those of Si, Yang, Shen, arXiv:2407.05417, section "matrix pattern constraints". With every weight
``(out, in)``, ``A (r, in)`` and ``B (out, r)``:

=====  ===============================================================================================================
``o``  orthogonality: adds :math:`w\,(\lVert AA^T - I\rVert_F^2 + \lVert B^TB - I\rVert_F^2)` to the loss
``d``  diagonality: :math:`w\,(\lVert AA^T - I\rVert_F^2 + \lVert B^TB - \mathrm{diag}(B^TB)\rVert_F^2)`
``n``  no linear pattern: :math:`s\,B\,\mathrm{relu}(A x)`, which makes LoRA a parallel adapter; it cannot be merged
=====  ===============================================================================================================

The paper gives no weight w. It is 0 by default; B at zero is a stationary point of ``o``, so the term acts on B only
after the task has moved it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import TypeVar

from subspace.adapters.base import LinearAdapter, MethodConfig
from subspace.adapters.linalg import SVD, off_diagonal
from subspace.common.settings import MOST_RANK, setting
from subspace.errors import UserError
from subspace.kernels.dropout import dropout
from subspace.kernels.low_rank import lora_down, lora_up_add


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(MethodConfig):
    """Settings shared by low-rank methods."""

    r: int = setting(16, "rank of the update", min=1, max=MOST_RANK)
    alpha: float | None = setting(32.0, "the update is scaled by alpha / r; null for alpha = r", min=0)
    rslora: bool = setting(False, "scale by alpha / sqrt(r) instead")
    dropout: float = setting(0.0, "dropout on the input of A, in training only", min=0, max=1)


@dataclass(frozen=True, kw_only=True)
class ConstrainedConfig(LowRankConfig):
    """Settings of a low-rank method whose factors may be constrained."""

    constraint: str = setting(
        "none",
        "matrix pattern constraint on the factors",
        choices=("none", "orthogonal", "diagonal", "nonlinear"),
        formerly="mpc",
        former_values={"o": "orthogonal", "d": "diagonal", "n": "nonlinear"},
    )
    constraint_weight: float = setting(
        0.0, "weight of the constraint's penalty; the paper gives none", min=0, formerly="mpc_weight"
    )
    constraint_reduce: str = setting(
        "sum", "the penalty over all layers", choices=("sum", "mean"), formerly="mpc_reduce"
    )
    constraint_squared: bool = setting(True, "square the penalty's norms", formerly="mpc_squared")


def check_rank(adapter: LinearAdapter, r: int) -> None:
    """Raise UserError where a layer has fewer than r singular directions."""
    smaller = min(adapter.in_features, adapter.out_features)
    if r > smaller:
        raise UserError(
            f"{adapter.name} was asked for r={r} singular directions of a layer that has {smaller}. Set "
            f"method.r={smaller} or less, or leave that layer out of `targets`"
        )


#: A rank that any layer may have: above its features it only costs a little.
SMALL_RANK = 64
#: The Config of a method of this family.
C = TypeVar("C", bound=LowRankConfig, default=Any)


class LowRankAdapter(LinearAdapter[C]):
    """``W' = W + s B C A`` with a small core ``C (r, r)``, which is the identity unless a method says otherwise."""

    size_setting: ClassVar = "r"
    roles: ClassVar = {"A": "down", "B": "up"}
    input_factor: ClassVar[str | None] = "A"

    def __init__(self, base: nn.Module, config: C) -> None:
        super().__init__(base, config)
        larger = max(self.in_features, self.out_features)
        if config.r > max(larger, SMALL_RANK):
            raise UserError(
                f"method.r is {config.r:,}, more than the {larger:,} features of a layer that it is to adapt. A rank "
                f"above {min(self.in_features, self.out_features):,} adds nothing there"
            )
        alpha = config.r if config.alpha is None else config.alpha
        self.scale = alpha / (math.sqrt(config.r) if config.rslora else config.r)
        self.A = nn.Parameter(torch.empty(config.r, self.in_features))
        self.B = nn.Parameter(torch.zeros(self.out_features, config.r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.constraint: str = getattr(config, "constraint", "none")
        self.mergeable = self.constraint != "nonlinear"

    def core(self, h: Tensor) -> Tensor:
        """Return C h for the hidden values h, ``(..., r)``."""
        return h

    def to_lora(self) -> tuple[Tensor, Tensor]:
        C = self.core(torch.eye(len(self.A), dtype=self.A.dtype, device=self.A.device)).T
        return C @ self.A, self.scale * self.B

    def weight(self, W: Tensor) -> Tensor:
        if not self.mergeable:
            raise UserError(f"{self.name} with mpc-n has no weight: a ReLU stands between its factors")
        A, B = self.to_lora()
        return W + B @ A

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x for the frozen layer, and what stands between the factors, ``(..., in) -> (..., r)``."""
        p = self.input_dropout()
        shared = None if p else self.copies.share(self, x)
        x, h = lora_down(x, self.in_dtype("A", x.dtype), p) if shared is None else shared
        return x, self.between(h)

    def between(self, h: Tensor) -> Tensor:
        """Return what stands between the factors, ``(..., r)``, for the product of x and A."""
        return self.core(torch.relu(h) if self.constraint == "nonlinear" else h)

    def forward(self, x: Tensor) -> Tensor:
        # B (A x) costs r * (in + out) per token; (B A) x would cost in * out.
        x, h = self.hidden(x)
        return lora_up_add(self.frozen(x), h, self.in_dtype("B", x.dtype), self.scale)

    def penalty(self) -> Tensor | None:
        config: Any = self.config  # a ConstrainedConfig where a constraint is set
        if self.constraint not in ("orthogonal", "diagonal") or not config.constraint_weight:
            return None
        A, B = self.A @ self.A.T, self.B.T @ self.B
        one = torch.eye(len(A), dtype=A.dtype, device=A.device)
        gaps = [A - one, B - one if self.constraint == "orthogonal" else off_diagonal(B)]
        norms = [gap.square().sum() if config.constraint_squared else torch.linalg.matrix_norm(gap) for gap in gaps]
        share = 1 if config.constraint_reduce == "sum" else self.num_siblings
        penalty: Tensor = (norms[0] + norms[1]) * (config.constraint_weight / share)
        return penalty


class TripletAdapter(LowRankAdapter[C]):
    """``W' = W + s B diag(E) A``: an update in the form of a singular value decomposition. E starts at zero."""

    roles: ClassVar = {"A": "down", "E": "core", "B": "up"}

    def __init__(self, base: nn.Module, config: C, *, std: float | None = None, spare: int = 0) -> None:
        super().__init__(base, config)
        if spare:
            self.A = nn.Parameter(torch.empty(config.r + spare, self.in_features))
            self.B = nn.Parameter(torch.empty(self.out_features, config.r + spare))
        self.E = nn.Parameter(torch.zeros(len(self.A)))
        if std is None:
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
        else:
            nn.init.normal_(self.A, std=std)
            nn.init.normal_(self.B, std=std)

    def core(self, h: Tensor) -> Tensor:
        return h * self.in_dtype("E", h.dtype)


class SVDInitAdapter(LowRankAdapter[C]):
    """``W' = W + s (B A - B_0 A_0)``, where ``s B_0 A_0`` is a part of W itself: that part is trained, the rest is not.

    Both products are computed apart and alike, so that at the start their difference is zero to the last bit.
    """

    A0: Tensor
    B0: Tensor
    input_factor: ClassVar[str | None] = None  # its products are all its own
    copied_buffers: ClassVar = ("A0", "B0")

    def __init__(self, base: nn.Module, config: C) -> None:
        super().__init__(base, config)
        check_rank(self, config.r)
        self.register_buffer("A0", torch.zeros_like(self.A, requires_grad=False))
        self.register_buffer("B0", torch.zeros_like(self.B, requires_grad=False))

    def part(self, W: Tensor) -> SVD:
        """Return the r singular triplets of W, ``(out, in)``, that are trained."""
        raise NotImplementedError

    def init_from_weight(self, W: Tensor) -> None:
        U, sigma, Vt = self.part(W)
        root = (sigma / self.scale).sqrt()
        for tensor, value in ((self.A, root[:, None] * Vt), (self.B, U * root)):
            tensor.data.copy_(value)
        self.A0.copy_(self.A.data)
        self.B0.copy_(self.B.data)

    def to_lora(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.A, self.A0]), self.scale * torch.cat([self.B, -self.B0], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        dropped = dropout(x, self.config.dropout, self.training)  # on the trained part only, as published
        now, before = (
            F.linear(F.linear(read, self.in_dtype(A, x.dtype)), self.in_dtype(B, x.dtype))
            for read, A, B in ((dropped, "A", "B"), (x, "A0", "B0"))
        )
        return self.frozen(x) + self.scale * (now - before)
