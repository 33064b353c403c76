"""Count trainable parameters, and find the size of a method that trains a given number of them. No weight is read."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from subspace.adapters.base import Adapter, MethodConfig
from subspace.adapters.inject import adapters, inject, trained_parameters
from subspace.adapters.registry import list_methods, resolve_method
from subspace.distributed.zero import full_shape
from subspace.errors import UserError


def count_trained(
    model: nn.Module,
    method: str | type[Adapter] | None = None,
    settings: Mapping[str, Any] | MethodConfig | None = None,
    *,
    targets: Sequence[str] | None = None,
    patterns: Mapping[str, Mapping[str, Any]] | None = None,
) -> int:
    """Return how many numbers a model trains, or how many a method would train in it; arguments as of ``inject``.

    Numbers that several sites share count once, and parameters that ZeRO-3 has sharded count whole; those that a method
    keeps for later do not count (:meth:`Adapter.idle_params`). The model is left as it is.
    """
    if method is None:
        trained = trained_parameters(model)
        in_use = [a for a in adapters(model).values() if any(p.requires_grad for p in a.trained().values())]
        return count_numbers(trained.values()) - sum(adapter.idle_params() for adapter in in_use)
    return count_adapters(
        inject(_shape_of(model), method, settings, targets=targets, patterns=patterns, start=False).values()
    )


def count_adapters(created: Collection[Adapter]) -> int:
    """Return how many numbers these adapters train; see :func:`count_trained`."""
    trained = count_numbers(p for adapter in created for p in adapter.trained().values())
    return trained - sum(adapter.idle_params() for adapter in created)


def count_numbers(parameters: Iterable[nn.Parameter]) -> int:
    """Return how many numbers these parameters hold together, each parameter once and whole."""
    return sum({id(p): full_shape(p).numel() for p in parameters}.values())


def match_budget(
    method: str | type[Adapter],
    model: nn.Module,
    parameters: int,
    *,
    targets: Sequence[str] | None = None,
    **settings: Any,
) -> int:
    """Return the rank, bottleneck or length with which a method's trained count comes nearest to ``parameters``.

    That is the value of the setting that the method calls its ``size_setting``; of two as near, the smaller. The other
    settings are taken as given, else by default: LoRA's ``alpha`` does not grow with the rank that is found.

    Args:
        method: its name or an alias, which a constraint may follow, or its class.
        model: the model, on any device; it is left as it is.
        parameters: the number of trained values to come near to.
        targets: which sites; see :func:`subspace.adapters.targets.find_target_modules`.
        **settings: the method's own settings.

    Raises:
        UserError: a method whose size cannot be chosen, or settings that fix it.
    """
    cls = resolve_method(method)[0]
    size_setting = cls.size_setting
    if size_setting is None:
        able = [f"{name} ({cls.size_setting})" for name, cls in list_methods().items() if cls.size_setting]
        raise UserError(f"the size of method {cls.name} cannot be chosen. That of these can: {', '.join(able)}")
    if size_setting in settings:
        raise UserError(
            f"{size_setting}={settings[size_setting]} was given, but {size_setting} is what is looked for: leave it out"
        )
    if parameters < 1:
        raise UserError(f"{parameters} parameters were asked for: at least 1 can be trained")
    shape = _shape_of(model)

    @cache
    def count(size: int) -> float:
        try:
            return count_trained(shape, method, {**settings, size_setting: size}, targets=targets)
        except UserError:
            if size == 1:
                raise
            return math.inf  # some layer is too small for it

    below, above, goal = 1, 2, float(parameters)
    if count(below) >= goal:
        return below
    # Most counts are straight lines in the size_setting, so its slope leads beside the goal at once.
    while count(above) < goal:
        step = (count(above) - count(below)) / (above - below)
        if step == 0:  # larger makes no difference: look for the smallest that trains as many
            below, goal = 1, count(above)
            break
        below, above = above, above + math.ceil((goal - count(above)) / step)
    while above - below > 1:
        share = (goal - count(below)) / (count(above) - count(below))
        straight = goal == parameters and share > 0
        middle = below + math.floor(share * (above - below)) if straight else (below + above) // 2
        middle = min(max(middle, below + 1), above - 1)
        below, above = (middle, above) if count(middle) < goal else (below, middle)
    return min((below, above), key=lambda size: abs(count(size) - goal))


def _shape_of(model: nn.Module) -> nn.Module:
    """Return a copy of the model on the meta device, without copying a weight."""
    shapes: dict[int, Any] = {
        **{id(b): torch.empty_like(b, device="meta") for b in model.buffers()},
        **{id(p): nn.Parameter(torch.empty(full_shape(p), device="meta")) for p in model.parameters()},
    }
    return copy.deepcopy(model, memo=shapes)  # what stands in the memo counts as copied
