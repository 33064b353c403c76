"""Helpers for ZeRO-sharded parameters.

Under ZeRO-3 a parameter is an empty tensor, and every rank has a shard of its values. Under ZeRO-1 and -2 it is
complete, but the optimizer updates a float32 copy that is sharded over the ranks. Without DeepSpeed a parameter is an
ordinary tensor, and the same functions work.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from subspace.distributed.collectives import all_reduce_sum, world_size
from subspace.distributed.deepspeed_compat import (
    full_shape,
    has_spread_gradient,
    has_zero_optimizer,
    is_sharded,
    local_gradient,
    local_shard,
    shard_as,
)

__all__ = [
    "full_gradients",
    "full_shape",
    "gather_copies",
    "gathered",
    "has_zero_optimizer",
    "is_sharded",
    "local_shard",
    "requires_synchronized_forward",
    "shard_as",
    "write_parameter",
]


def requires_synchronized_forward(model: nn.Module) -> bool:
    """Return True if all processes must make equally many forward passes: ZeRO-3 gathers weights from all of them."""
    return world_size() > 1 and any(is_sharded(parameter) for parameter in model.parameters())


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor], *, modified_by_main: bool = False) -> Iterator[None]:
    """Gather sharded parameters inside the block, on every rank. All ranks must enter it.

    With ``modified_by_main``, rank 0's in-place changes inside the block are broadcast to every rank.

    Not for use inside a forward pass: there DeepSpeed's own hooks gather, and leaving this block would free the weights
    that they gathered.
    """
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if modified_by_main else None):
        yield


def gather_copies(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return full CPU copies of the named parameters, on every rank. All ranks must call it."""
    copies = {}
    for name, parameter in parameters:
        with gathered([parameter]):
            copies[name] = parameter.detach().cpu().clone().contiguous()
    return copies


def full_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Return the full gradients, averaged over ranks, between the last backward pass and the step. Collective.

    One all-reduce for all of them: a method may ask for hundreds of small ones in every step.
    """
    spread = [p for p in parameters if has_spread_gradient(p)]
    sizes = [full_shape(parameter).numel() for parameter in spread]
    begins = itertools.accumulate(sizes, initial=0)
    flat = torch.zeros(sum(sizes), device=spread[0].device if spread else None)
    for begin, parameter in zip(begins, spread, strict=False):
        if (part := local_gradient(parameter)) is not None:
            start, values = part
            flat[begin + start : begin + start + len(values)] = values
    if world_size() > 1 and spread:
        # No two ranks have the same value. Added up as integers, also -0.0 and NaN stay what they are.
        flat = all_reduce_sum(flat.view(torch.int32)).view(torch.float32)
    whole = {id(p): part.view(full_shape(p)) for p, part in zip(spread, torch.split(flat, sizes), strict=True)}
    return [whole.get(id(parameter), parameter.grad) for parameter in parameters]


def write_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a full parameter, in the model and in the optimizer's float32 copy. Collective."""
    with gathered([parameter], modified_by_main=True):
        parameter.data.copy_(value)
    if has_zero_optimizer(parameter):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.to(torch.float32))
