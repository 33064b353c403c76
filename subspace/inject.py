"""Put adapters into a model and find them there again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from subspace.base import full_weight
from subspace.distributed import from_main
from subspace.method import Adapter, MethodConfig, configure, find_method
from subspace.sites import find


def inject(
    model: nn.Module,
    method: str,
    settings: Mapping[str, Any] | MethodConfig | None = None,
    *,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    start: bool = True,
) -> dict[str, Adapter]:
    """Freeze the model, wrap the sites that the method's kind and ``targets`` choose, and return the adapters by site.

    Initial values depend on ``seed`` and the site's name alone, so not on the order of sites, on other adapters, or
    on the number of processes. ``start=False`` leaves out what is computed from the weights, for adapters that are to
    be overwritten.

    Raises:
        UserError: an unknown method, setting or target.
    """
    cls = find_method(method)
    config = settings if isinstance(settings, MethodConfig) else configure(cls, settings or {})
    sites = find(model, cls.site, targets)  # type: ignore[arg-type]
    kept = {id(parameter) for adapter in adapters(model).values() for parameter in adapter.trained().values()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    created = {name: _build(cls, config, name, site, seed, start=start) for name, site in sites.items()}
    for name, adapter in created.items():
        model.set_submodule(name, adapter)
        adapter.num_siblings = len(created)
        adapter.train(model.training)
    return created


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the model's adapters by the names of their sites, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def groups(model: nn.Module) -> list[list[Adapter]]:
    """Return the model's adapters by method and settings: those that share a schedule."""
    found: dict[tuple[type[Adapter], MethodConfig], list[Adapter]] = {}
    for adapter in adapters(model).values():
        found.setdefault((type(adapter), adapter.config), []).append(adapter)
    return list(found.values())


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every trained tensor by its name in the model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def roles(model: nn.Module) -> dict[str, str]:
    """Return the role of every trained tensor, by its name in the model."""
    return {
        f"{site}.{name}": adapter.roles[name] for site, adapter in adapters(model).items() for name in adapter.trained()
    }


def _build(cls: type[Adapter], config: MethodConfig, name: str, site: nn.Module, seed: int, *, start: bool) -> Adapter:
    device = next(site.parameters()).device
    digest = hashlib.sha256(f"{seed} {name} {cls.name}".encode()).digest()
    # The global generator is borrowed, so that methods may use torch.nn.init as everywhere else.
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
        torch.manual_seed(int.from_bytes(digest[:8], "little"))
        adapter = cls(site, config)
    if device.type != "meta":
        for tensor in adapter.own_tensors().values():
            tensor.data = tensor.data.to(device)
        if start and type(adapter).start is not Adapter.start:
            adapter.start(full_weight(site))
        with torch.no_grad():
            for tensor in adapter.own_tensors().values():
                from_main(tensor.data)
    return adapter
