"""Optimizers (torch's AdamW; bitsandbytes' with 8-bit or paged state), parameter groups and learning rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from subspace.adapters.inject import adapters, parameter_roles, trained_parameters
from subspace.distributed.zero import full_shape
from subspace.errors import UserError
from subspace.training.config import TrainConfig

CLASSES = {"adamw8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw8bit": "PagedAdamW8bit"}


def check_optimizer(name: str, *, gpu: bool, offloaded: bool) -> None:
    """Raise UserError for an optimizer that cannot run on the device or with an offloaded state."""
    if name.startswith("paged") and not gpu:
        raise UserError(
            f"train.optimizer is {name}, whose pages move between a GPU and the host, and there is no GPU here. "
            f"Use train.optimizer={name.removeprefix('paged_')}"
        )
    if name != "adamw" and offloaded:
        raise UserError(
            f"train.optimizer is {name}, and the engine's file moves the optimizer to the host (offload_optimizer), "
            "which works with torch's own alone. Use train.optimizer=adamw, or a file without offload_optimizer"
        )


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimizer over the groups of :func:`parameter_groups`."""
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    import bitsandbytes

    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, CLASSES[name])(groups)
    return optimizer


def allocate_state(optimizer: torch.optim.Optimizer, key: torch.Tensor) -> dict[str, Any]:
    """Return an optimizer's state for a tensor that it updates, allocated by the optimizer itself if it can do that.

    bitsandbytes' optimizers can. What they allocate is the only memory that is right for them: state in pages is in
    CUDA's managed memory, which moves to the host when the GPU is full, and no copy to a device makes such memory.
    torch's allocate in their first step; their state is returned as it is, empty before that.
    """
    state: dict[str, Any] = optimizer.state[key]
    if not state and hasattr(optimizer, "init_state"):
        # At stage 3 DeepSpeed shows the optimizer one tensor at a time, so it may be in no group now. The group decides
        # rates, not the state's form.
        places = [
            (number, group, place)
            for number, group in enumerate(optimizer.param_groups)
            for place, parameter in enumerate(group["params"])
            if parameter is key
        ]
        number, group, place = places[0] if places else (0, optimizer.param_groups[0], 0)
        optimizer.init_state(group, key, number, place)
        state = optimizer.state[key]
    return state


DECAYED_ROLES = ("down", "up", "core", "weight")  # decay towards zero would pull a scale away from one


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups by role: those with weight decay, and those with LoRA+'s learning rate."""
    roles = parameter_roles(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(model).items():
        decay = config.weight_decay if roles[name] in DECAYED_ROLES else 0.0
        # PEFT decides by name and dimension; its diagonal cores are not 1-d.
        as_peft = config.lora_plus_rule == "peft" and roles[name] != "core" and len(full_shape(parameter)) == 1
        rate = config.learning_rate * (config.lora_plus_lr_ratio if roles[name] == "up" or as_peft else 1.0)
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]


def ineffective_settings(model: nn.Module, config: TrainConfig) -> list[str]:
    """Return messages on settings of the optimizer that apply to none of a method's tensors."""
    roles: dict[str, set[str]] = {}
    one_dimensional: dict[str, bool] = {}
    for adapter in adapters(model).values():
        trained = adapter.trained()
        roles.setdefault(adapter.name, set()).update(adapter.roles[name] for name in trained)
        flat = any(len(full_shape(p)) == 1 and adapter.roles[name] != "core" for name, p in trained.items())
        one_dimensional[adapter.name] = flat or one_dimensional.get(adapter.name, False)
    messages = []
    for method, own in roles.items():
        what = f"method {method}, which trains {', '.join(sorted(own))} tensors"
        if config.weight_decay and not own.intersection(DECAYED_ROLES):
            messages.append(f"train.weight_decay={config.weight_decay:g} has no effect on {what}: only factors decay")
        as_peft = config.lora_plus_rule == "peft" and one_dimensional[method]
        if config.lora_plus_lr_ratio != 1 and "up" not in own and not as_peft:
            ratio = f"train.lora_plus_lr_ratio={config.lora_plus_lr_ratio:g}"
            messages.append(f"{ratio} has no effect on {what}: it applies to up factors")
    return messages


def lr_factor(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate factor of optimizer step ``step``, counted from 0, in a run of so many steps."""
    warmup = config.warmup(steps)
    if step < warmup:
        return (step + 1) / warmup
    passed = min(1.0, (step - warmup) / max(1, steps - warmup))
    return {"linear": 1 - passed, "cosine": (1 + math.cos(math.pi * passed)) / 2, "constant": 1.0}[config.schedule]
