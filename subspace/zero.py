"""Parameters that DeepSpeed's ZeRO has taken apart: how to see one whole, and how to change one for good.

Under ZeRO-3 a parameter is an empty tensor that carries ``ds_id`` and its true shape in ``ds_shape``; every rank
holds a part. Under ZeRO-1 and -2 the parameter is whole, but the number that the optimizer works on is a float32 copy
in ``_hp_mapping``. Outside DeepSpeed all of this is an ordinary tensor, and the same functions work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(parameter: Tensor) -> bool:
    """Tell whether ZeRO-3 owns the parameter."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, sharded or not."""
    return torch.Size(getattr(parameter, "ds_shape", ())) if is_sharded(parameter) else parameter.shape


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


def whole_copies(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return whole CPU copies of the named parameters, on every rank. All ranks must call it."""
    copies = {}
    for name, parameter in parameters:
        with gathered([parameter]):
            copies[name] = parameter.detach().cpu().clone().contiguous()
    return copies


class Access:
    """What a method's schedule may do to trained tensors, whatever ZeRO stage holds them. All ranks call alike."""

    def __init__(self, engine: Any = None) -> None:
        self.engine = engine

    def grad(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole gradient, averaged over ranks, without the loss scale of float16.

        Valid between the last backward and the step.
        """
        gradient: Tensor | None = parameter.grad
        if is_sharded(parameter) or hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_get_full_grad

            gradient = safe_get_full_grad(parameter)
        if gradient is None:
            return torch.zeros_like(parameter)
        scaled = self.engine is not None and self.engine.fp16_enabled()
        return gradient.detach() / self.engine.optimizer.cur_scale if scaled else gradient.detach()

    def value(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole parameter."""
        if not is_sharded(parameter):
            return parameter.detach()
        with gathered([parameter]):
            return parameter.detach().clone()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the whole parameter, in the model and in the optimizer's float32 copy."""
        if is_sharded(parameter):
            with gathered([parameter], modified_by_main=True):
                parameter.data.copy_(value)
        else:
            parameter.data.copy_(value)
        if is_sharded(parameter) or hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value.to(torch.float32))
