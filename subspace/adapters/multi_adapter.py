"""Adapters of several subjects in one batch of one base: the first subject's rows, then the second's, and so on.

The base's products, attention and the output head then run once for all of them, over more rows at a time. Updates of
the form ``W + B A`` are one batched product; any other adapter at a linear layer is run on its own rows. What acts
elsewhere in a model (prompts, prefixes, whole modules) cannot be mixed: such subjects are scored one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.adapters.base import Adapter, LinearAdapter
from subspace.adapters.inject import adapters
from subspace.models.frozen_weights import layer_sizes

AdaptersBySite = Mapping[str, Adapter]


class MixedAdapters(nn.Module):
    """A site's adapters of all subjects, None where a subject has none there. Every subject has equally many rows."""

    def __init__(self, base: nn.Module, several: Sequence[Adapter | None]) -> None:
        super().__init__()
        self.base = base
        self.several = several  # hidden from torch: each of them holds the base as a part of its own
        for adapter in filter(None, several):
            adapter.eval()
        self.factors = stacked(base, several)

    def forward(self, x: Tensor) -> Tensor:
        """``(rows, ..., in) -> (rows, ..., out)``."""
        if self.factors is None:
            parts = zip(self.several, x.chunk(len(self.several)), strict=True)
            return torch.cat([self.base(rows) if adapter is None else adapter(rows) for adapter, rows in parts])
        A, B = (factor.to(x.dtype) for factor in self.factors)
        out: Tensor = self.base(x)
        h = x.reshape(len(self.several), -1, x.shape[-1]) @ A
        return torch.baddbmm(out.reshape(len(self.several), -1, out.shape[-1]), h, B).view(out.shape)


def stacked(base: Any, several: Sequence[Adapter | None]) -> tuple[Tensor, Tensor] | None:
    """Return all subjects' factors, ``(subjects, in, r)`` and ``(subjects, r, out)``; None where one has no such form.

    Ranks are filled up with zeros to the largest, and so is a subject without an adapter.
    """
    found: list[tuple[Tensor, Tensor]] = []
    device = next(base.parameters()).device
    for adapter in several:
        if adapter is None:
            n_in, n_out = layer_sizes(base)
            found.append((torch.zeros(0, n_in), torch.zeros(n_out, 0)))
            continue
        # A method that cannot be merged has more to it than its factors.
        factors = adapter.to_lora() if isinstance(adapter, LinearAdapter) and adapter.mergeable else None
        if factors is None:
            return None
        found.append((factors[0], adapter.update_scale * factors[1]))
    rank = max(len(A) for A, _ in found)
    return (
        torch.stack([F.pad(A.detach().T.to(device), (0, rank - len(A))) for A, _ in found]),
        torch.stack([F.pad(B.detach().T.to(device), (0, 0, 0, rank - len(A))) for A, B in found]),
    )


def can_batch_adapters(model: nn.Module) -> bool:
    """Return True if all adapters in a model act on linear layers, each by itself."""
    return all(
        adapter.target_kind(adapter.config) in ("linear", "sublayer")
        and type(adapter).attach is Adapter.attach
        and not isinstance(adapter.base, Adapter)
        for adapter in adapters(model).values()
    )


@contextmanager
def batch_adapters(model: nn.Module, subjects: Sequence[AdaptersBySite]) -> Iterator[None]:
    """Inside the block, inject the adapters of all subjects, by site, into a model without adapters."""
    sites = {site: adapter.base for found in subjects for site, adapter in found.items()}
    for site, base in sites.items():
        model.set_submodule(site, MixedAdapters(base, [found.get(site) for found in subjects]))
    try:
        yield
    finally:
        for site, base in sites.items():
            model.set_submodule(site, base)
