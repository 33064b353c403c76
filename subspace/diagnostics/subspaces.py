r"""An update dW of a weight W in the singular directions of W: the quantities of ``subspace inspect``.

:math:`W = U \Sigma V^T` and :math:`dW = U_d\,\mathrm{diag}(s)\,V_d^T`, both thin, k = min(out, in). All quantities
follow from dW alone, so they are the same for (A, B) and (G A, B G^{-1}). Each that chance would not leave at zero
comes with its value for updates of the same singular values in random directions: of draws, or exactly.

Sources: the diagonal and the change rate are LoRA-Dash's (arXiv:2409.01035), amplification LoRA's (arXiv:2106.09685,
section 7.3), intruder dimensions those of arXiv:2410.21228.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from subspace.adapters.linalg import exact_svd, largest_triplets

#: Directions that are compared where all would be too many: of dW with W's largest and smallest, and between updates.
COMPARED = 8
#: Random updates that chance is measured by, and the directions of dW above which fewer do.
DRAWS, MANY, FEW_DRAWS = 20, 64, 4
#: Singular values below this share of the largest are rounding, of a product of factors and a difference of weights.
ROUNDING, ROUNDING_OF_DIFFERENCES = 1e-9, 1e-8
#: What W does in a direction is nothing below this share of its largest singular value, which float32 leaves.
NOTHING = 1e-5
#: Of LoRA-Dash's change rate.
EPSILON = 1e-6
#: An intruder's largest cosine with W's left singular vectors, and the first vectors of W + dW that are looked at.
INTRUDER_COSINE, LOOKED_AT = 0.5, 10
ITERATIONS = 500


class Update(NamedTuple):
    """A thin decomposition of dW, ``(out, in)``: U ``(out, q)``, s ``(q,)`` falling, V ``(in, q)``."""

    U: Tensor
    s: Tensor
    V: Tensor

    @property
    def dense(self) -> Tensor:
        """The update itself, ``(out, in)``."""
        return (self.U * self.s) @ self.V.T


def factored_update(A: Tensor, B: Tensor) -> Update:
    """Return the update B A of factors ``(q, in)`` and ``(out, q)``, which is never formed."""
    Qb, Rb = torch.linalg.qr(B.double())
    Qa, Ra = torch.linalg.qr(A.double().T)
    U, s, Vt = torch.linalg.svd(Rb @ Ra.T)
    rank = min(Rb.shape[0], Ra.shape[0])
    return _without_rounding(Qb @ U[:, :rank], s[:rank], Qa @ Vt.T[:, :rank], ROUNDING)


def dense_update(dW: Tensor) -> Update:
    """Return the decomposition of an update ``(out, in)`` that is a difference of weights."""
    U, s, Vt = torch.linalg.svd(dW.double(), full_matrices=False)
    return _without_rounding(U, s, Vt.T, ROUNDING_OF_DIFFERENCES)


def _without_rounding(U: Tensor, s: Tensor, V: Tensor, share: float) -> Update:
    kept = int((s > share * s[0]).sum()) if len(s) and s[0] > 0 else 0
    return Update(U[:, :kept], s[:kept], V[:, :kept])


@dataclass(frozen=True)
class Site:
    """What an update does at one site; None for what chance gives where it is not known exactly, and for no update.

    Attributes:
        directions: q, of dW.
        relative: the norm of dW over that of W, Frobenius.
        spectral: the same of the largest singular values.
        entropy_rank: exp of the entropy of dW's singular values: how many directions it has, really.
        stable_rank: the squared norm of dW over its largest squared singular value.
        rank_90: the fewest directions that hold 0.9 of dW's squared norm.
        diagonal: share of dW that changes W's singular values alone; ``diagonal_chance`` is 1 / max(out, in).
        span: share of dW within the spans of W's singular vectors; 1 where W is square.
        scale: share of dW that scaling W's rows and columns could give.
        top_out, top_in: overlap of dW's first directions with W's largest, from 0 to 1.
        bottom_out, bottom_in: the same with W's smallest.
        out_chance, in_chance: of both.
        energy: shares of dW's squared norm in ten equal parts of W's left singular vectors, the largest first.
        task_directions: the eight directions of W with the largest change rate.
        task_chance: the share of them that random updates change most too: those of small singular values, mostly.
        smallest_decile: the share of them in W's smallest tenth; ``smallest_chance`` for random updates.
        amplification: the norm of dW over that of W in dW's own first directions; None if nothing of W lies there.
        intruders: of the first ten left singular vectors of W + dW, those that none of W's is near.
        spectrum_change: of W's ten largest singular values, relative.
    """

    out_features: int
    in_features: int
    directions: int
    relative: float
    spectral: float = 0.0
    entropy_rank: float = 0.0
    stable_rank: float = 0.0
    rank_90: int = 0
    diagonal: float | None = None
    diagonal_chance: float | None = None
    span: float | None = None
    scale: float | None = None
    top_out: float | None = None
    top_in: float | None = None
    bottom_out: float | None = None
    bottom_in: float | None = None
    out_chance: float | None = None
    in_chance: float | None = None
    energy: tuple[float, ...] = field(default=())
    task_directions: tuple[int, ...] = field(default=())
    task_chance: float | None = None
    smallest_decile: float | None = None
    smallest_chance: float | None = None
    amplification: float | None = None
    amplification_chance: float | None = None
    intruders: int = 0
    spectrum_change: float = 0.0


class Frozen(NamedTuple):
    """A frozen W ``(out, in)`` with its thin decomposition, float64: U ``(out, k)``, s ``(k,)``, V ``(in, k)``."""

    W: Tensor
    U: Tensor
    s: Tensor
    V: Tensor


def decompose(W: Tensor) -> Frozen:
    """Return a frozen weight ``(out, in)`` in the form that :func:`measure` takes."""
    U, s, Vt = exact_svd(W)
    return Frozen(W.double(), U.double(), s.double(), Vt.T.double())


def measure(frozen: Frozen, update: Update, seed: int = 0) -> Site:
    """Return what an update does to a frozen weight; ``seed`` is of the draws that show chance."""
    (out, into), k, q = frozen.W.shape, len(frozen.s), len(update.s)
    if not q:
        return Site(out, into, 0, 0.0)
    W, s = frozen.W, update.s
    norm2, share = s.square().sum(), s / s.sum()
    inside = _Inside(frozen, update)
    near = min(COMPARED, q)
    draws = [_Inside(frozen, _random_like(update, seed + n)) for n in range(DRAWS if q <= MANY else FEW_DRAWS)]
    amplified = inside.amplification(near)
    by_chance = [one for draw in draws if (one := draw.amplification(near)) is not None]
    intruders, changed = _of_sum(frozen, update)
    tasks, by_draw = inside.task_directions(), [draw.task_directions() for draw in draws]
    energy = (inside.L * s).square().sum(1) / norm2
    return Site(
        out, into, q,
        relative=float(norm2.sqrt() / torch.linalg.norm(W)),
        spectral=float(s[0] / frozen.s[0]),
        entropy_rank=float(torch.exp(-(share * share.log()).sum())),
        stable_rank=float(norm2 / s[0].square()),
        rank_90=int((s.square().cumsum(0) < 0.9 * norm2).sum()) + 1,
        diagonal=float(inside.diagonal.square().sum() / norm2),
        diagonal_chance=1 / max(out, into),
        span=float(inside.span() / norm2),
        scale=_scale_share(W, update),
        top_out=_overlap(inside.L[:near], near), top_in=_overlap(inside.R[:near], near),
        bottom_out=_overlap(inside.L[-near:], near), bottom_in=_overlap(inside.R[-near:], near),
        out_chance=near / out, in_chance=near / into,
        energy=tuple(float(part.sum()) for part in torch.tensor_split(energy, 10)),
        task_directions=tuple(tasks),
        task_chance=_mean([_in_common(tasks, other) for other in by_draw]),
        smallest_decile=_in_smallest(tasks, k),
        smallest_chance=_mean([_in_smallest(other, k) for other in by_draw]),
        amplification=amplified,
        amplification_chance=sorted(by_chance)[len(by_chance) // 2] if by_chance else None,
        intruders=intruders, spectrum_change=changed,
    )  # fmt: skip


class _Inside:
    """An update in W's singular directions: L ``(k, q)`` and R ``(k, q)`` are its own in W's left and right ones."""

    def __init__(self, frozen: Frozen, update: Update) -> None:
        self.s, self.sigma = update.s, frozen.s
        self.L, self.R = frozen.U.T @ update.U, frozen.V.T @ update.V
        self.diagonal = (self.L * self.R) @ update.s  # u_i^T dW v_i

    def span(self) -> Tensor:
        """Return the squared norm of U^T dW V."""
        return ((self.L.T @ self.L) * (self.R.T @ self.R) * torch.outer(self.s, self.s)).sum()

    def task_directions(self) -> list[int]:
        rates = self.diagonal.abs() / (self.sigma + EPSILON)
        first = rates.topk(min(COMPARED, len(rates)))
        chosen: list[int] = first.indices[first.values > ROUNDING_OF_DIFFERENCES * rates.max()].tolist()
        return chosen

    def amplification(self, near: int) -> float | None:
        there = torch.linalg.norm((self.L[:, :near].T * self.sigma) @ self.R[:, :near])
        if there <= NOTHING * self.sigma[0]:
            return None
        return float(torch.linalg.norm(self.s) / there)


def _random_like(update: Update, seed: int) -> Update:
    """Return an update of the same singular values in random directions."""
    generator = torch.Generator().manual_seed(seed)

    def directions(like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float32)
        orthonormal: Tensor = torch.linalg.qr(drawn.to(like.device)).Q
        return orthonormal.to(like.dtype)

    return Update(directions(update.U), update.s, directions(update.V))


def _overlap(part: Tensor, near: int) -> float:
    """Return how much of dW's first directions, ``(n, q)`` in some of W's, lies in those, from 0 to 1."""
    return float(part[:, :near].square().sum() / near)


def _in_smallest(directions: list[int], k: int) -> float:
    return sum(i >= k - max(1, k // 10) for i in directions) / max(1, len(directions))


def _in_common(own: Sequence[int], other: Sequence[int]) -> float:
    return len(set(own) & set(other)) / max(1, len(own))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _scale_share(W: Tensor, update: Update) -> float:
    """Return the share of dW that the nearest D_l W + W D_r has, with diagonal D, by alternating least squares."""
    dW, weights = update.dense, W.square()
    rows, columns = weights.sum(1).clamp(min=1e-30), weights.sum(0).clamp(min=1e-30)
    a, b = (dW * W).sum(1), (dW * W).sum(0)
    left, right = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(ITERATIONS):
        before = left
        left = (a - weights @ right) / rows
        right = (b - weights.T @ left) / columns
        if (left - before).abs().max() <= 1e-10 * left.abs().max():
            break
    return float((left @ a + right @ b) / update.s.square().sum())


def _of_sum(frozen: Frozen, update: Update) -> tuple[int, float]:
    """Return how many intruders W + dW has, and the relative change of the largest singular values."""
    count = min(LOOKED_AT, len(frozen.s))
    U, s, _ = (part.double() for part in largest_triplets((frozen.W + update.dense).float(), count))
    before = frozen.s[:count]
    intruders = ((frozen.U.T @ U).abs().max(0).values < INTRUDER_COSINE).sum()
    return int(intruders), float(torch.linalg.norm(s - before) / torch.linalg.norm(before))


# Between updates.


def between(one: Update, other: Update) -> float | None:
    """Return the overlap of two updates' first directions, out and in on average, from 0 to 1; None without one."""
    near = min(COMPARED, len(one.s), len(other.s))
    if not near:
        return None
    sides = (one.U, other.U), (one.V, other.V)
    return _mean([float((a[:, :near].T @ b[:, :near]).square().sum() / near) for a, b in sides])


def same_task_directions(one: Site, other: Site) -> float | None:
    """Return the share of one's task directions that are the other's too; None without one."""
    own, others = one.task_directions, other.task_directions
    return _in_common(own, others) if own and others else None
