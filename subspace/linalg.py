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
