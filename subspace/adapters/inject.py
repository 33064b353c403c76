"""Injection of adapters into a model, and access to the injected ones."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subspace.adapters.base import Adapter, MethodConfig
from subspace.adapters.exchange.pretrained import prepare_saving
from subspace.adapters.experts.adapter import ExpertsAdapter, experts_refusal
from subspace.adapters.penalties import LossTap
from subspace.adapters.registry import configure, list_methods, resolve_method
from subspace.adapters.targets import ends_sublayer, find_target_modules, matches_target
from subspace.common.progress import Progress, no_progress
from subspace.common.random_state import seeded
from subspace.common.settings import check_settings
from subspace.distributed.collectives import broadcast_, rank, world_size
from subspace.distributed.zero import is_sharded
from subspace.errors import UserError
from subspace.kernels.working_copies import WorkingCopies
from subspace.models.base_record import note_base
from subspace.models.bitsandbytes_compat import storage_format
from subspace.models.experts.weights import ExpertWeight, replace_site
from subspace.models.frozen_weights import (
    find_weight_file,
    gather_weight_on_rank,
    read_checkpoint_weight,
)

logger = logging.getLogger("subspace")


def initialize_distributed(
    adapters: Sequence[Adapter], look: Callable[[Any, Tensor], None], progress: Progress = no_progress, title: str = ""
) -> None:
    """Call ``look(adapter, W)`` for each adapter, on one process each; then all have the tensors that it changed.

    The adapters are dealt out to the processes in turn, which work side by side. W is whole, float32, ``(out, in)``,
    and no process holds more than one of them. All ranks must call it.
    """
    ranks = world_size()
    name = adapters[0].name if adapters else ""
    with progress(title or f"reading the weights for {name}", len(adapters), "layers") as at:
        for first in range(0, len(adapters), ranks):
            wave = adapters[first : first + ranks]
            weights = [_weight(adapter, owner) for owner, adapter in enumerate(wave)]
            mine = [(adapter, W) for adapter, W in zip(wave, weights, strict=True) if W is not None]
            for adapter, W in mine:
                with torch.no_grad():
                    look(adapter, W)
            for owner, adapter in enumerate(wave):
                for tensor in (*adapter.trained().values(), *adapter.buffers(recurse=False)):
                    if not is_sharded(tensor):
                        broadcast_(tensor.data, owner)
            at(first + len(wave))


def _weight(adapter: Adapter, owner: int) -> Tensor | None:
    """Return the adapter's W on its owner, None elsewhere."""
    if adapter.weight_source is None:
        # A stack of experts' matrices stays in its dtype; each is raised when it is its turn.
        dtype = None if isinstance(adapter.base, ExpertWeight) else torch.float32
        return gather_weight_on_rank(owner, adapter.base, dtype)
    if owner != rank():
        return None
    W = read_checkpoint_weight(*adapter.weight_source, adapter.base)
    assert W is not None, adapter.weight_source  # inject has looked
    return W.to(next(adapter.buffers(recurse=False)).device)


def inject(
    model: nn.Module,
    method: str | type[Adapter],
    settings: Mapping[str, Any] | MethodConfig | None = None,
    *,
    targets: Sequence[str] | str | None = None,
    patterns: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    start: bool = True,
    progress: Progress = no_progress,
) -> dict[str, Adapter]:
    r"""Freeze the model, wrap the sites that the method's kind and ``targets`` choose, and return the adapters by site.

    Initial values depend on ``seed`` and the site's name alone, so not on the order of sites, on other adapters, or
    on the number of processes.

    Args:
        model: the model, with or without other adapters.
        method: its name, in any letter case, or an alias; a constraint may follow, as ``lora+mpc-o``. Or its class.
        settings: the method's own settings by name, where they differ from its defaults.
        targets: which sites; see :func:`subspace.adapters.targets.find_target_modules`.
        patterns: settings for some sites, by a regular expression for their names, as ``{r"layers\.0\..*": {"r": 8}}``;
            the last that matches counts.
        seed: of the initial values.
        start: False leaves out what is computed from the weights, for adapters that are to be overwritten.
        progress: shows how far the reading of the weights is.

    Raises:
        UserError: an unknown method, setting or target, or a method that these weights cannot serve.
    """
    cls, presets = resolve_method(method)
    if not adapters(model):
        note_base(model)
    if reason := cls.check_model(model):
        raise UserError(f"method {cls.name} does not fit {type(model).__name__}: {reason}")
    config = settings if isinstance(settings, MethodConfig) else configure(cls, {**presets, **(settings or {})})
    found = find_target_modules(
        model,
        cls.target_kind(config),
        targets if targets is not None else cls.default_targets(config),
        no_experts=_no_experts(cls),
    )
    check_module = {name: cls.check_module(config, site) for name, site in found.items()}
    sites = {name: site for name, site in found.items() if check_module[name] is None}
    if not sites:
        first = next(iter(found))
        raise UserError(
            f"method {cls.name} fits none of the {len(found)} sites it was asked for: {first} {check_module[first]}"
        )
    configs = {name: cls.config_for(_apply_patterns(cls, config, name, patterns or {}), name) for name in sites}
    checkpoints = {name: _weight_source(model, cls, configs[name], name, site) for name, site in sites.items()}
    for pattern in patterns or {}:
        if not any(matches_target(pattern, name) for name in sites):
            raise UserError(
                f"the pattern {pattern!r} matches none of the {len(sites)} sites, first {next(iter(sites))}"
            )

    kept = {id(parameter) for adapter in adapters(model).values() for parameter in adapter.trained().values()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    created = {name: _build_adapter(cls, configs[name], name, site, seed) for name, site in sites.items()}
    before = list(adapters(model).values())
    group = 1 + max((adapter.group for adapter in before), default=-1)
    matrices = sum(adapter.num_matrices for adapter in created.values())
    loss_tap, copies = (before[0].loss_tap, before[0].copies) if before else (LossTap(), WorkingCopies())
    for name, adapter in created.items():
        adapter.weight_source = checkpoints[name]
        adapter.group, adapter.num_siblings, adapter.loss_tap = group, matrices, loss_tap
        adapter.copies, adapter.ends_sublayer = copies, ends_sublayer(name)
        replace_site(model, name, adapter)
        adapter.train(model.training)
    copies.attach(model)
    for adapter in created.values():
        adapter.attach(model)
    if has_schedule(cls):
        next(iter(created.values())).register_forward_pre_hook(_notice_schedule)
    if not before:
        prepare_saving(model)
    _initialize(list(created.values()), progress, all_of_them=start)
    return created


def _no_experts(cls: type[Adapter]) -> str:
    """Return why a method is not put at experts' matrices, for a message; "" for one that is."""
    reason = experts_refusal(cls)
    if reason is None:
        return ""
    able = ", ".join(name for name, other in list_methods().items() if experts_refusal(other) is None)
    return f"method {cls.name} cannot train experts' matrices: {reason}. These can: {able}"


def _apply_patterns(
    cls: type[Adapter], config: MethodConfig, name: str, patterns: Mapping[str, Mapping[str, Any]]
) -> MethodConfig:
    """Return the settings for one site."""
    for pattern, changes in patterns.items():
        if matches_target(pattern, name):
            origin = f"the pattern {pattern!r}"
            if shared := sorted(cls.whole_run & set(changes)):
                raise UserError(
                    f"{origin} sets {shared[0]}, which has one value for all layers. Set method.{shared[0]}"
                )
            config = dataclasses.replace(config, **check_settings(type(config), changes, owner="method", origin=origin))
    return config


def _weight_source(
    model: Any, cls: type[Adapter], config: MethodConfig, name: str, site: nn.Module
) -> tuple[str, str] | None:
    """Return where to read W, if not in the model.

    Raises:
        UserError: a quantised W that cannot serve the method.
    """
    kind = storage_format(site) if hasattr(site, "weight") else "plain"
    if kind == "plain":
        return None
    if reason := cls.check_quantization(config, kind):
        raise UserError(f"method {cls.name} was asked for on a model whose linears are {kind}: {reason}")
    if cls.weight_access not in ("smallest", "late"):
        return None
    folder = str(getattr(model, "name_or_path", ""))
    if folder and find_weight_file(folder, f"{name}.weight"):
        return folder, f"{name}.weight"
    raise UserError(
        f"method {cls.name} was asked for on a model whose linears are {kind}, but it reads W's small singular "
        f"directions, which quantisation replaces by noise, and '{folder}' does not hold {name}.weight unquantised. "
        "Open that checkpoint in full precision (`model.quantize: none`), or take pissa or lora"
    )


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the model's adapters by the names of their sites, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def remove_adapters(model: nn.Module) -> None:
    """Replace the adapters by their frozen modules, which restores the model as it was before ``inject``."""
    for name, adapter in reversed(adapters(model).items()):  # an adapter may wrap a module that holds others
        adapter.detach()
        adapter.copies.detach()
        replace_site(model, name, adapter.base)


def adapter_groups(model: nn.Module) -> list[list[Adapter]]:
    """Return the model's adapters by the injection that made them: those that share a schedule and a penalty."""
    found: dict[int, list[Adapter]] = {}
    for adapter in adapters(model).values():
        found.setdefault(adapter.group, []).append(adapter)
    return list(found.values())


def assign_groups(model: nn.Module, group_of: Mapping[str, int]) -> None:
    """Set which adapters, by site, share a schedule and a penalty."""
    found = adapters(model)
    sizes = Counter[int]()
    for site, group in group_of.items():
        sizes[group] += found[site].num_matrices
    for site, adapter in found.items():
        if site in group_of:
            adapter.group, adapter.num_siblings = group_of[site], sizes[group_of[site]]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every trained tensor by its name in the model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def has_schedule(method: type[Adapter]) -> bool:
    """Return True if a method acts before or after steps of the optimizer, by how many there are."""
    return any({"before_step", "after_step"} & vars(cls).keys() for cls in method.__mro__ if cls is not Adapter)


def take_over_schedules(model: nn.Module) -> None:
    """Note that the caller tells the methods' schedules of the optimizer's steps, or has none: no notice is given."""
    for adapter in adapters(model).values():
        adapter.scheduled = True


def _notice_schedule(adapter: Adapter, inputs: Any) -> None:
    """Say once that a schedule does not act, where a model is trained and nobody has told it of steps."""
    if adapter.scheduled or not (adapter.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return
    if any(parameter.requires_grad and not parameter.is_meta for parameter in adapter.trained().values()):
        adapter.scheduled = True
        logger.warning(
            "note: method %s changes with the optimizer's steps, and nothing tells it of them: it trains without its "
            "schedule. Call subspace.follow_schedules(model, optimizer, steps=...) before the first step, or give HF "
            "Trainer the callback subspace.integrations.trainer.FollowSchedules()",
            adapter.name,
        )


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """Return the role of every trained tensor, by its name in the model."""
    of = {
        f"{site}.{name}": adapter.roles[name] for site, adapter in adapters(model).items() for name in adapter.trained()
    }
    return {name: of[name] for name in trained_parameters(model)}  # of a tensor that two sites share, the first name


def _build_adapter(cls: type[Adapter], config: MethodConfig, name: str, site: nn.Module, seed: int) -> Adapter:
    device = next(site.parameters()).device
    digest = hashlib.sha256(f"{seed} {name} {cls.name}".encode()).digest()
    # The CPU's generator is borrowed, so that methods may use torch.nn.init as everywhere else.
    seed = int.from_bytes(digest[:8], "little")
    with seeded(seed), torch.device("meta" if device.type == "meta" else "cpu"):
        adapter = ExpertsAdapter(site, config, cls) if isinstance(site, ExpertWeight) else cls(site, config)
    if device.type != "meta":
        for tensor in (*adapter.own_tensors().values(), *adapter.buffers(recurse=False)):
            tensor.data = tensor.data.to(device)
    return adapter


def _initialize(created: Sequence[Adapter], progress: Progress, *, all_of_them: bool) -> None:
    """Initialise adapters from their frozen weights, each on one rank, and broadcast the result to all ranks."""
    if not created or any(p.is_meta for p in created[0].parameters()):
        return
    if created[0].method_class.init_from_weight is not Adapter.init_from_weight:
        # What no file keeps has to be taken from W again, also where the rest will be overwritten.
        wanted = [a for a in created if all_of_them or a._non_persistent_buffers_set]
        initialize_distributed(wanted, lambda adapter, W: adapter.init_from_weight(W), progress)
    elif all_of_them:
        for adapter in created:
            for tensor in adapter.own_tensors().values():
                broadcast_(tensor.data)
