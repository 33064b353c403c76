"""Singular value decompositions: those of a GPU beside LAPACK's in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subspace.adapters import linalg


def weight(out: int, width: int, rank: int) -> Tensor:
    """Return a matrix of a rank, whose singular values fall by eight orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    factors = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in (out, width))
    U, V = (torch.linalg.qr(factor).Q for factor in factors)
    product: Tensor = U * torch.logspace(0, -8, rank, dtype=torch.float64) @ V.T
    return product.float()


@pytest.mark.parametrize(("out", "width", "rank"), [(96, 64, 64), (64, 96, 64), (96, 64, 10), (64, 64, 1)])
def test_eigenvectors_give_every_singular_triplet(out: int, width: int, rank: int) -> None:
    W = weight(out, width, rank)
    U, sigma, Vt = linalg._by_eigenvectors(W)
    exact = torch.linalg.svdvals(W.double())
    # What float32 keeps of W, and no more: gesvdj's values were 5e-4 off, and its U orthonormal to 2e-3.
    torch.testing.assert_close(sigma.double(), exact, rtol=1e-6, atol=2e-8)
    torch.testing.assert_close(U * sigma @ Vt, W, rtol=0, atol=1e-6)
    for factor in (U.T, Vt):
        torch.testing.assert_close(factor @ factor.T, torch.eye(len(sigma)), rtol=0, atol=2e-6)
    assert (sigma.diff() <= 0).all()
    assert {U.dtype, sigma.dtype, Vt.dtype} == {torch.float32}


def test_triplets_within_a_basis_are_those_of_the_projection() -> None:
    W = weight(96, 64, 64)
    basis = torch.linalg.svd(W.double()).U[:, :16].float()
    spoilt = basis @ (torch.eye(16) + 1e-2 * torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))
    U, sigma, Vt = linalg._within(W, spoilt)  # spans the same, and is not orthonormal
    torch.testing.assert_close(sigma.double(), torch.linalg.svdvals(W.double())[:16], rtol=1e-5, atol=1e-7)
    for factor in (U.T, Vt):
        torch.testing.assert_close(factor @ factor.T, torch.eye(16), rtol=0, atol=2e-6)
    torch.testing.assert_close(U * sigma @ Vt, U @ (U.T @ W), rtol=0, atol=1e-6)


def test_a_matrix_of_zeros_has_orthonormal_directions() -> None:
    U, sigma, Vt = linalg._by_eigenvectors(torch.zeros(5, 4))
    assert not sigma.any()
    torch.testing.assert_close(U.T @ U, torch.eye(4))
    torch.testing.assert_close(Vt @ Vt.T, torch.eye(4))
