"""Terms that adapters add to the loss, charged where the adapter runs.

Only there does ZeRO-3 hold an adapter's tensors whole, and so the term counts once per backward pass also when
activations are recomputed. Its gradient has to carry the factors that an engine puts on the loss (loss scale,
1 / accumulation). Those factors are the gradient that arrives at the loss itself, which autograd computes before any
other; a :class:`LossTap`, shared by all adapters of a model, hands it on to them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LossTap:
    """The gradient that arrived at a model's loss in the present backward pass; None where no loss is tapped.

    A loop that taps no loss may set it once, to one over the number of backward passes of a step.
    """

    gradient: Tensor | None = None


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, tap: LossTap) -> Tensor:
        ctx.tap = tap
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.tap.gradient = gradients[0].detach()
        return gradients[0], None


class _Charge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, penalty: Tensor, tap: LossTap) -> Tensor:
        ctx.tap = tap
        # Not a view of the output, which autograd would not let the model write into, as some do (Falcon, Llama 4).
        if output._is_view() or torch.compiler.is_compiling():
            return output.clone()
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        factor = ctx.tap.gradient
        if factor is None:
            factor = torch.ones((), device=gradients[0].device)
        return gradients[0], factor.to(torch.float32), None


def with_penalties(loss: Tensor, model: nn.Module) -> Tensor:
    """Return a model's loss, whose own gradient will scale that of the adapters' penalties; its value is unchanged.

    A loop that scales its loss, for accumulation or float16, needs this where a method has a penalty.
    """
    taps = (getattr(module, "loss_tap", None) for module in model.modules())
    tap = next((tap for tap in taps if tap is not None), None)  # all adapters of the model have the same one
    if tap is None:
        return loss
    tapped: Tensor = _Tap.apply(loss, tap)  # type: ignore[no-untyped-call]
    return tapped


def charge_penalty(output: Tensor, penalty: Tensor, tap: LossTap) -> Tensor:
    """Return an adapter's output, whose backward pass adds the penalty's gradient, scaled as the loss is."""
    charged: Tensor = _Charge.apply(output, penalty, tap)  # type: ignore[no-untyped-call]
    return charged
