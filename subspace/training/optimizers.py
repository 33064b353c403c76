"""The optimizers that a run may name: torch's AdamW, and bitsandbytes' with a state of 8 bits or in pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from subspace.errors import UserError

#: The bytes of state for each trained number: two float32 values, or two of 8 bits with a float32 scale for 256.
STATE_BYTES: Mapping[str, float] = {
    "adamw": 8,
    "adamw8bit": 2 + 2 * 4 / 256,
    "paged_adamw": 8,
    "paged_adamw8bit": 2 + 2 * 4 / 256,
}
CLASSES = {"adamw8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw8bit": "PagedAdamW8bit"}


def check_optimizer(name: str, *, gpu: bool, offloaded: bool) -> None:
    """Refuse an optimizer that cannot run there."""
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
    """Build it over the groups of :func:`subspace.train.parameter_groups`."""
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    import bitsandbytes

    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, CLASSES[name])(groups)
    return optimizer
