"""Fold adapters into the weights that they wrap, in memory, and take that back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subspace.adapters.base import Adapter
from subspace.adapters.inject import adapters
from subspace.distributed.zero import is_sharded
from subspace.errors import UserError
from subspace.models.bitsandbytes_compat import storage_format
from subspace.models.experts.weights import replace_site

#: The attribute of a merged model that holds what was replaced. It is the model's, so that a copy of the model has it.
_UNDO = "_subspace_replaced_by_merge"


@dataclass(frozen=True)
class Replaced:
    """An adapter that a merge took out of the model, and the frozen parameters that it replaced."""

    adapter: Adapter
    held: dict[str, nn.Parameter | None]  # the module's own parameters, by their names in it

    def changes(self) -> Iterator[tuple[str, Tensor | None, Tensor]]:
        """Yield each tensor's name, its frozen value (None for what the merge created) and its merged value."""
        for name, held in self.held.items():
            merged = getattr(self.adapter.base, name)
            if merged is not None:
                yield name, self.adapter.original_params.get(name, held), merged


def merge(model: nn.Module) -> None:
    """Replace every adapter by the plain layer that computes the same. ``unmerge`` undoes it.

    Raises:
        UserError: no adapters, a method that cannot be merged, or weights that are quantised or spread over processes.
            The model is then as before.
    """
    found, shared = mergeable_adapters(model), SharedTensors()
    replaced = {site: merge_site(model, site, adapter, shared) for site, adapter in found.items()}
    note_untied(model)
    setattr(model, _UNDO, replaced)


#: The merged parameters of trained tensors that several sites have, by the trained tensor.
SharedTensors = dict[nn.Parameter, nn.Parameter]


def mergeable_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the model's adapters by site; raise UserError, before anything changes, if they cannot be merged."""
    found = adapters(model)
    if not found:
        raise UserError("cannot merge: the model has no adapters (it may be merged already)")
    for site, adapter in found.items():
        _check_mergeable(site, adapter)
    return found


def merge_site(
    model: nn.Module, site: str, adapter: Adapter, shared: SharedTensors, dtype: torch.dtype | None = None
) -> Replaced:
    """Replace one adapter by the plain layer that computes the same, and return what that replaced.

    The merged tensors have ``dtype``; default: that of the frozen ones.
    """
    layer: Any = adapter.base
    merged = _merged_tensors(adapter)
    held = {name: getattr(layer, name) for name in merged}
    for name, value in merged.items():
        like = adapter.original_params.get(name, held[name])
        scaled = _part_of_the_way(like, value, adapter.update_scale)
        # New parameters, not new values: the old ones are kept as they are, bit for bit, and may be shared.
        new = None if scaled is None else frozen(scaled, dtype or (held["weight"] if like is None else like).dtype)
        if new is not None and isinstance(value, nn.Parameter):  # a trained tensor itself: other sites may have it
            new = shared.setdefault(value, new)
        setattr(layer, name, new)
    replace_site(model, site, layer)
    return Replaced(adapter, held)


@torch.no_grad()
def _part_of_the_way(start: Tensor | None, end: Tensor | None, scale: float) -> Tensor | None:
    """Return what lies a share of the way from a frozen tensor to its merged one; None stands for zeros."""
    if scale == 1 or end is None:
        return end
    if scale == 0:
        return start  # the same bits, the signs of zeros with them
    return torch.lerp(torch.zeros_like(end) if start is None else start.to(end), end, scale)


def scale_updates(model: nn.Module, scale: float) -> None:
    """Let each weight W' of a model with adapters be W + a (W' - W), whatever its method; ``merge`` follows it.

    Args:
        model: with adapters, which are to be used, not trained.
        scale: a, from 0, the base model, to 1, what was trained.

    Raises:
        UserError: a method changes more than weights, so there is no way from the base to it; or a is no such number.
    """
    if not 0 <= scale <= 1:
        raise UserError(f"the update was to be scaled by {scale:g}, but takes a share from 0, the base, to 1, the run")
    found = adapters(model)
    for site, adapter in found.items():
        if not adapter.mergeable:
            raise UserError(
                f"the update of {adapter.name} cannot be scaled: what it does at {site} is not what a linear layer can "
                "do, so it lies on no line from the base. Leave --scale out"
            )
    for adapter in found.values():
        adapter.scale_update(scale)


def note_untied(model: Any) -> None:
    """Let the configuration of a merged model say so if its embedding and head are two matrices now."""
    if model.config.tie_word_embeddings and not _shares(model):
        model.config.tie_word_embeddings = False


def unmerge(model: nn.Module) -> None:
    """Restore the adapters and frozen weights that ``merge`` replaced, as the same tensors."""
    replaced: dict[str, Replaced] = getattr(model, _UNDO, {})
    if not replaced:
        raise UserError("cannot unmerge: the model is not merged")
    if adapters(model):
        raise UserError("cannot unmerge: adapters were injected after the merge. Merge those first, or save them")
    for site, old in replaced.items():
        layer: Any = old.adapter.base
        for name, held in old.held.items():
            setattr(layer, name, held)
        replace_site(model, site, old.adapter)
    if _shares(model):
        model.config.tie_word_embeddings = True  # type: ignore[union-attr]
    delattr(model, _UNDO)


def _shares(model: nn.Module) -> bool:
    """Return True if modules share a parameter, as embedding and head of a model that ties them do."""
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return any(count > 1 for count in users.values())


def _check_mergeable(site: str, adapter: Adapter) -> None:
    if not adapter.mergeable:
        raise UserError(
            f"cannot merge {adapter.name}: what it does at {site} is not what a linear layer can do. "
            "Evaluate it unmerged: `subspace evaluate RUN` needs no merged model"
        )
    layer: Any = adapter.base
    if hasattr(layer, "weight") and (stored := storage_format(layer)) != "plain":
        raise UserError(
            f"cannot merge {adapter.name} into the {stored} layer {site}: the result would be rounded to "
            f"{stored} again. Open the base with `quantize: none`, as `subspace merge RUN --out DIR` does"
        )
    if any(is_sharded(parameter) for parameter in (*layer.parameters(), *adapter.trained().values())):
        raise UserError(
            f"cannot merge {adapter.name} at {site}: ZeRO-3 holds the weights in parts. Save the adapter and merge the "
            "file: `subspace merge RUN --out DIR`"
        )


@torch.no_grad()
def _merged_tensors(adapter: Adapter) -> dict[str, Tensor | None]:
    """Return the tensors that replace the frozen ones, in float32."""
    own = adapter.own_tensors().values()
    kept = [tensor.data for tensor in own]
    try:
        for tensor in own:  # an engine may have made them bfloat16
            tensor.data = tensor.data.float()
        return adapter.merged()
    finally:
        for tensor, data in zip(own, kept, strict=True):
            tensor.data = data


def frozen(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Return a frozen parameter with a tensor's values in a dtype."""
    return nn.Parameter(value.to(dtype).contiguous(), requires_grad=False)
