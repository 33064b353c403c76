r"""Singular value decompositions of weights: each computed once, kept on disk, and shared by all methods.

W, ``(out, in)``, is :math:`U\,\mathrm{diag}(\sigma)\,V^T` with :math:`\sigma` falling; ``V`` is given transposed, as
``(k, in)``. Signs are fixed, so that a decomposition that is computed again is the same one: the largest entry of each
column of U is positive.

On a GPU the exact decomposition comes from the eigenvectors of :math:`W^T W` in float64: with cuSOLVER's Jacobi method,
which torch takes there, U of a 4096 x 4096 weight is orthonormal to 2e-3 only (``tests/bench/RESULTS.md``).

The largest directions of a large W come from a randomised range finder (Halko, Martinsson, Tropp, arXiv:0909.4061,
algorithm 4.4 with 12 power iterations); the smallest need the exact decomposition.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from subspace.common.files import write_file
from subspace.common.paths import svd_cache_folder
from subspace.common.random_state import seeded

#: Up to this smaller side, the exact decomposition takes under a second.
SMALL = 1024


class SVD(NamedTuple):
    """Some singular triplets of W: ``U (out, k)``, ``sigma (k,)``, ``Vt (k, in)``."""

    U: Tensor
    sigma: Tensor
    Vt: Tensor


def top_singular_triplets(W: Tensor, k: int) -> SVD:
    """Return the k largest singular triplets of W, ``(out, in)``, float32."""
    return _cached(W, f"largest-{min(k, *W.shape)}", lambda: largest_triplets(W, min(k, *W.shape)))


def bottom_singular_triplets(W: Tensor, k: int) -> SVD:
    """Return the k smallest singular triplets of W, ``(out, in)``, float32, from an exact decomposition."""
    return _cached(
        W, f"smallest-{min(k, *W.shape)}", lambda: SVD(*(_some(t, i, k) for i, t in enumerate(exact_svd(W))))
    )


def full_svd(W: Tensor) -> SVD:
    """Return all min(out, in) singular triplets of W, ``(out, in)``, float32."""
    return _cached(W, "whole", lambda: exact_svd(W))


def _some(tensor: Tensor, position: int, k: int) -> Tensor:
    return tensor[:, -k:] if position == 0 else tensor[-k:]


def exact_svd(W: Tensor) -> SVD:
    """Return all singular triplets of W, ``(out, in)``, float32, as :func:`full_svd`, without its cache."""
    return _signed(*(_by_eigenvectors(W) if W.is_cuda else torch.linalg.svd(W, full_matrices=False)))


def _by_eigenvectors(W: Tensor) -> SVD:
    """Return all singular triplets of W, ``(out, in)``, float32, as exact as its numbers are.

    The squares that this decomposes hold values below 1e-8 of the largest as noise, which is less than what float32
    keeps of W. QR makes U orthonormal also where such values leave a direction of W V to chance.
    """
    if W.shape[0] < W.shape[1]:
        turned = _by_eigenvectors(W.T)
        return SVD(turned.Vt.T, turned.sigma, turned.U.T)
    exact = W.double()
    V = torch.linalg.eigh(exact.T @ exact).eigenvectors.flip(1)
    U, R = torch.linalg.qr(exact @ V)
    sigma = R.diagonal()
    order = sigma.abs().argsort(descending=True, stable=True)  # the smallest may have changed places
    U = U * torch.where(sigma < 0, -1.0, 1.0)
    return SVD(U[:, order].to(W.dtype), sigma[order].abs().to(W.dtype), V[:, order].T.to(W.dtype))


def largest_triplets(W: Tensor, k: int) -> SVD:
    """Return the k largest singular triplets of W, ``(out, in)``, float32, without a cache."""
    if min(W.shape) <= SMALL:
        U, sigma, Vt = exact_svd(W)
        return SVD(U[:, :k], sigma[:k], Vt[:k])
    with seeded(0, W.device):
        U, sigma, V = torch.svd_lowrank(W, q=min(2 * k + 32, *W.shape), niter=12)
    found = _within(W, U) if W.is_cuda else SVD(U, sigma, V.T)  # its last step is a decomposition of torch's, too
    return _signed(found.U[:, :k], found.sigma[:k], found.Vt[:k])


def _within(W: Tensor, basis: Tensor) -> SVD:
    """Return the singular triplets of W, ``(out, in)``, in the span of a basis, ``(out, q)``, its projection's."""
    Q = torch.linalg.qr(basis).Q
    U, sigma, Vt = _by_eigenvectors(Q.T @ W)
    return SVD(Q @ U, sigma, Vt)


def _signed(U: Tensor, sigma: Tensor, Vt: Tensor) -> SVD:
    top = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return SVD(U * top, sigma, Vt * top.T)


def _cached(W: Tensor, kind: str, compute: Callable[[], SVD]) -> SVD:
    """Read the decomposition from the cache, or compute it and write it there."""
    from safetensors.torch import load_file, save_file

    file = _file(W, kind)
    if file.exists():
        stored = load_file(file)
        return SVD(*(stored[name].to(W.device) for name in SVD._fields))
    found = compute()
    tensors = {name: t.cpu().contiguous() for name, t in found._asdict().items()}
    write_file(file, lambda partial: save_file(tensors, partial))
    return found


def _file(W: Tensor, kind: str) -> Path:
    digest = hashlib.sha256(W.detach().float().cpu().contiguous().numpy().data).hexdigest()[:24]
    return svd_cache_folder() / f"{digest}-{'x'.join(map(str, W.shape))}-{kind}.safetensors"


def orthogonality_gap(*factors: Tensor, alive: Tensor | None = None) -> Tensor:
    r"""Return how far the rows of each factor ``(r, n)`` are from orthonormal, on average.

    That is the mean of :math:`\lVert A A^T - I \rVert_F`, over the rows at which ``alive (r,)`` is 1, if it is given.
    """
    if alive is not None:
        factors = tuple(A * alive.to(A.dtype)[:, None] for A in factors)
    ones = torch.ones(len(factors[0]), device=factors[0].device) if alive is None else alive
    one = torch.diag(ones).to(factors[0].dtype)
    return torch.stack([torch.linalg.matrix_norm(A @ A.T - one) for A in factors]).mean()


def off_diagonal(matrix: Tensor) -> Tensor:
    """Return a square matrix with zeros on its diagonal."""
    return matrix - torch.diag(matrix.diagonal())


def entropy_exchanges(sizes: Sequence[Tensor], most: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield which layer loses which direction, and which other gains which: (layer, direction, layer, direction).

    Those of the least entropy lose their smallest direction to those of the most.

    Args:
        sizes: of each layer's directions, ``(R,)`` on the host, not a number where there is none at present; what is
            yielded is entered.
        most: how many exchanges there are at most.
    """
    count = [int((~size.isnan()).sum()) for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: spectral_entropy(sizes[i][~sizes[i].isnan()]))
    losing = [i for i in order if count[i] > 1]
    gaining = [i for i in reversed(order) if 1 < count[i] < len(sizes[i])]
    for _, i, j in zip(range(most), losing, gaining, strict=False):
        lost = int(sizes[i].nan_to_num(torch.inf).argmin())
        sizes[i][lost] = torch.nan
        new = int(sizes[j].isnan().int().argmax())
        sizes[j][new] = 0
        yield i, lost, j, new


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
