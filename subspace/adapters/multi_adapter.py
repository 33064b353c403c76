"""Adapters of several subjects in one batch of one base: the first subject's rows, then the second's, and so on.

The base's products, attention and the output head then run once for all of them, over more rows at a time. In scoring,
updates of the form ``W + B A`` are one batched product; any other adapter at a linear layer is run on its own rows.
What acts elsewhere in a model (prompts, prefixes, whole modules) cannot be mixed: such subjects are scored one after
the other.

In training every run has a model of its own, :func:`share_weights`, whose frozen tensors are the same ones: names,
initial values, optimizer and files are those of a run that is alone. Only the passes of a step are run together, in a
further model without adapters of its own (:class:`OnePass`). There every adapter computes on its own rows by the same
operations as alone, and rows do not interact, so that each run's gradients are those of its own loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.adapters.base import Adapter, LinearAdapter
from subspace.adapters.inject import adapters, trained_parameters
from subspace.adapters.low_rank import LowRankAdapter
from subspace.adapters.penalties import charge_penalty, with_penalties
from subspace.common.patching import patched
from subspace.data.collate import Batch, join_batches
from subspace.kernels.low_rank_groups import lora_down_each, lora_up_add_each
from subspace.models.base_record import note_copy
from subspace.models.bitsandbytes_compat import make_int8_shareable
from subspace.models.frozen_weights import layer_sizes
from subspace.models.lm_head import SummedLoss

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


# Training.


def share_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose modules are its own and whose tensors are the model's."""
    make_int8_shareable(model)
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    with patched(Tensor, "__deepcopy__", lambda tensor, memo: tensor):  # of tensors that are no part of a module
        twin = copy.deepcopy(model, shared)
    note_copy(twin, model)
    return twin


class OnePass:
    """The forward and backward passes of several runs in one model, which has no adapters of its own.

    Args:
        model: it shares its tensors with those of the runs.
        runs: the runs' models, with their adapters. Those that :func:`can_batch` refuses are none of these.
    """

    def __init__(self, model: Any, runs: Sequence[nn.Module]) -> None:
        self.runs = runs
        self.rows: list[tuple[int, int]] = []  # of the present pass: a run's number, and how many rows it has
        by_site: dict[str, list[Adapter | None]] = {}
        for number, run in enumerate(runs):
            for site, adapter in adapters(run).items():
                by_site.setdefault(site, [None] * len(runs))[number] = adapter
        for site, several in by_site.items():
            model.set_submodule(site, RunsAdapters(model.get_submodule(site), several, self.rows))
        self.loss = SummedLoss(model.train(), masks_padding=False)

    def gradients(
        self, numbers: Sequence[int], batches: Sequence[Batch], weights: Sequence[float], device: torch.device
    ) -> list[tuple[Tensor, list[Tensor | None]]]:
        """Return the summed loss of each run's batch, and the gradients of its trained tensors.

        Args:
            numbers: the runs that take part.
            batches: of each, in CPU memory.
            weights: the factors on their losses.
            device: the model's.
        """
        joined = join_batches(batches)
        self.rows[:] = zip(numbers, joined.rows, strict=True)
        losses = self.loss.each(joined.to(device))
        weighted = zip(numbers, weights, losses, strict=True)
        total = torch.stack([with_penalties(weight * loss, self.runs[n]) for n, weight, loss in weighted]).sum()
        trained = [list(trained_parameters(self.runs[number]).values()) for number in numbers]
        found = iter(torch.autograd.grad(total, [p for own in trained for p in own], allow_unused=True))
        return [(loss, [next(found) for _ in own]) for loss, own in zip(losses.detach(), trained, strict=True)]


def can_batch(model: Any) -> bool:
    """Return True if a run's adapters can compute in a pass with those of others: on rows, at frozen linear layers."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    return can_batch_adapters(model) and not any(
        adapter in ends or "experts" in site  # which read tokens by their routes
        for site, adapter in adapters(model).items()
    )


class RunsAdapters(nn.Module):
    """A site's adapters of all runs, None where a run has none there, in a pass of some of them.

    The frozen layer's product is one for all rows that it reads unchanged. Adapters that change what it reads multiply
    their own rows.

    Args:
        base: the frozen layer.
        several: by the runs' numbers.
        rows: the runs that take part in the present pass, and the rows of each.
    """

    def __init__(self, base: nn.Module, several: Sequence[Adapter | None], rows: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.base = base
        self.several = several  # hidden from torch: they are parts of the runs' models
        self.rows = rows
        self.outputs = {n: _Output(a) for n, a in enumerate(several) if a is not None and not _is_low_rank(a)}

    def forward(self, x: Tensor) -> Tensor:
        """``(rows, ..., in) -> (rows, ..., out)``."""
        repeat = len(x) // sum(rows for _, rows in self.rows)  # some models flatten rows and tokens
        numbers, sizes = [n for n, _ in self.rows], [rows * repeat for _, rows in self.rows]
        others = [n for n in numbers if n in self.outputs]
        parts = dict(zip(numbers, x.split_with_sizes(sizes), strict=True)) if others else {}
        apart = {n for n in others if not self.outputs[n].is_shared(parts[n])}
        joint = [(n, size) for n, size in zip(numbers, sizes, strict=True) if n not in apart]
        if not joint:
            return torch.cat([self._adapter(n)(parts[n]) for n in numbers])
        y = self._low_rank(x if len(joint) == len(numbers) else torch.cat([parts[n] for n, _ in joint]), joint)
        if not others:
            return y
        of_base = dict(zip((n for n, _ in joint), y.split_with_sizes([size for _, size in joint]), strict=True))
        outs = []
        for n in numbers:
            if n not in others:
                outs.append(of_base[n])
                continue
            if n in of_base:
                self.outputs[n].give(parts[n], of_base[n])
            outs.append(self._adapter(n)(parts[n]))
        return torch.cat(outs)

    def _adapter(self, number: int) -> Adapter:
        adapter = self.several[number]
        assert adapter is not None
        return adapter

    def _low_rank(self, x: Tensor, joint: Sequence[tuple[int, int]]) -> Tensor:
        """Return the frozen layer's output, with the low-rank branches on the rows that have one."""
        found: list[LowRankAdapter] = []
        stretches, begin = [], 0
        for number, size in joint:
            adapter = self.several[number]
            if isinstance(adapter, LowRankAdapter) and number not in self.outputs:
                found.append(adapter)
                stretches.append((begin, begin + size))
            begin += size
        if not found:
            y: Tensor = self.base(x)
            return y
        x, hidden = lora_down_each(x, stretches, [adapter.in_dtype("A", x.dtype) for adapter in found])
        between = [adapter.between(h) for adapter, h in zip(found, hidden, strict=True)]
        up, scales = [adapter.in_dtype("B", x.dtype) for adapter in found], [adapter.scale for adapter in found]
        y = lora_up_add_each(self.base(x), stretches, between, up, scales)
        for adapter in found:
            penalty = adapter.penalty() if torch.is_grad_enabled() else None
            if penalty is not None:
                y = charge_penalty(y, penalty, adapter.loss_tap)
        return y


def _is_low_rank(adapter: Adapter) -> bool:
    """Return True if all that an adapter does is ``s B f(A x)`` beside its layer."""
    if not isinstance(adapter, LowRankAdapter):
        return False
    own = type(adapter)
    return own.forward is LowRankAdapter.forward and own.hidden is LowRankAdapter.hidden


class _Output:
    """What an adapter's frozen layer puts out for its next input, where that is known, in place of its product."""

    def __init__(self, adapter: Adapter) -> None:
        layer: Any = adapter.base
        self.adapter = adapter
        self.multiply: Callable[[Tensor], Tensor] = layer.forward
        self.known: tuple[Tensor, Tensor] | None = None
        self.asked: bool | None = None
        layer.forward = self

    def give(self, x: Tensor, output: Tensor) -> None:
        """Say what the layer makes of x, which is asked for once."""
        self.known = x, output

    def __call__(self, x: Tensor) -> Tensor:
        if self.known is not None and self.known[0].data_ptr() == x.data_ptr() and self.known[0].shape == x.shape:
            output, self.known = self.known[1], None
            return output
        return self.multiply(x)

    def is_shared(self, x: Tensor) -> bool:
        """Return True if the adapter hands its layer what it reads itself, unchanged, so that anybody may multiply it.

        It is tried once, on the first of the rows x.
        """
        if self.asked is None:
            x = x.detach()[:1]
            with torch.no_grad():
                self.give(x, x.new_zeros(*x.shape[:-1], layer_sizes(self.adapter.base)[1]))
                self.adapter(x)
            if self.adapter._cache:
                self.adapter.clear_cache()
            self.asked, self.known = self.known is None, None
        return self.asked
