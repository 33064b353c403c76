"""Part of penalties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# A penalty is charged where the adapter runs, because only there does ZeRO-3 hold its tensors whole, and once per
# backward pass also when activations are recomputed. Its gradient must carry the factors that the engine puts on the
# loss (loss scale, 1 / accumulation). Those factors are the gradient that arrives at the loss itself, which is
# computed before any other.
_gradient_at_loss: list[Tensor] = []


class _LossTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        _gradient_at_loss[:] = [gradients[0].detach()]
        return gradients[0]


class _Charge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, penalty: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        factor = _gradient_at_loss[0] if _gradient_at_loss else torch.ones((), device=gradients[0].device)
        return gradients[0], factor.to(torch.float32)


def with_penalties(loss: Tensor) -> Tensor:
    """Return the loss, by whose own gradient the adapters' penalties will scale theirs. Its value is unchanged.

    A loop that scales its loss, for accumulation or float16, needs this where a method has a penalty.
    """
    tapped: Tensor = _LossTap.apply(loss)  # type: ignore[no-untyped-call]
    return tapped


def _charge_penalty(adapter: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    if not (adapter.training and torch.is_grad_enabled()):
        return output
    penalty = adapter.penalty()  # type: ignore[operator]
    if penalty is None:
        return output
    charged: Tensor = _Charge.apply(output, penalty)  # type: ignore[no-untyped-call]
    return charged
