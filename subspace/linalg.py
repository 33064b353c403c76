"""Linear algebra that several methods speak of."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonality_gap(*factors: Tensor) -> Tensor:
    r"""Return how far the rows of each factor ``(r, n)`` are from orthonormal, on average.

    That is the mean of :math:`\lVert A A^T - I \rVert_F`.
    """
    gaps = [torch.linalg.matrix_norm(A @ A.T - torch.eye(len(A), dtype=A.dtype, device=A.device)) for A in factors]
    return torch.stack(gaps).mean()


def off_diagonal(matrix: Tensor) -> Tensor:
    """Return a square matrix with zeros on its diagonal."""
    return matrix - torch.diag(matrix.diagonal())


def spectral_entropy(E: Tensor) -> float:
    r"""Return :math:`-\sum_j p_j \log p_j / \log r` for :math:`p = E^2 / \sum E^2`: 0 for one value, 1 for equal ones.

    E ``(r,)`` all zero counts as equal.
    """
    total = E.double().square().sum()
    if len(E) == 1:
        return 0.0
    if total == 0:
        return 1.0
    p = E.double().square() / total
    return float(torch.special.entr(p).sum() / torch.log(torch.tensor(float(len(E)))))
