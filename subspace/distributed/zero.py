"""Parameters that DeepSpeed's ZeRO has taken apart: how to see one whole, and how to change one for good.

Under ZeRO-3 a parameter is an empty tensor that carries ``ds_id`` and its true shape in ``ds_shape``; every rank
holds a part. Under ZeRO-1 and -2 the parameter is whole, but the number that the optimizer works on is a float32 copy
in ``_hp_mapping``. Outside DeepSpeed all of this is an ordinary tensor, and the same functions work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from subspace.distributed.collectives import world_size


def is_sharded(parameter: Tensor) -> bool:
    """Tell whether ZeRO-3 owns the parameter."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, sharded or not."""
    return torch.Size(getattr(parameter, "ds_shape", ())) if is_sharded(parameter) else parameter.shape


def requires_synchronized_forward(model: nn.Module) -> bool:
    """Tell whether every process must make as many forward passes: ZeRO-3 gathers the weights of each from all."""
    return world_size() > 1 and any(is_sharded(parameter) for parameter in model.parameters())


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor], *, modified_by_main: bool = False) -> Iterator[None]:
    """Make sharded parameters whole inside the block, on every rank. All ranks must enter it.

    With ``modified_by_main``, what rank 0 writes in place inside the block is what every rank keeps.

    Not for use inside a forward pass: there DeepSpeed's own hooks gather, and leaving this block would free what they
    hold.
    """
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if modified_by_main else None):
        yield


def gather_copies(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return whole CPU copies of the named parameters, on every rank. All ranks must call it."""
    copies = {}
    for name, parameter in parameters:
        with gathered([parameter]):
            copies[name] = parameter.detach().cpu().clone().contiguous()
    return copies
