r"""RMSNorm with frozen weights for training on CPU, with half as many passes over the hidden states.

When: on a CPU, in training, in float32 and bfloat16, for every RMSNorm module of a model.

Gain: forward and backward of 16 x 96 x 576 values take 1.11 ms instead of transformers' 2.11 in float32, 1.70 instead
of 2.81 in bfloat16 (`tests/bench/RESULTS.md`).

The mathematics, for a row x of H values, its frozen weights w, and the output's gradient ``grad_y``:

.. math:: y = w\,r\,x, \qquad r = \left(\tfrac1H \textstyle\sum x^2 + \epsilon\right)^{-1/2}

Since :math:`\partial r / \partial x = -r^3 x / H`, the gradient of x is, with :math:`g = w \cdot grad_y`,

.. math:: grad_x = r \left(g - x\, r^2\, \tfrac1H \textstyle\sum g x\right)

autograd goes through the square, the mean, the root and two products one by one, each a pass over a tensor of x's size,
saves five tensors, and computes an unused gradient for w. In bfloat16 the means are float32.

Shapes: (B) rows, (T) tokens, (H) hidden size.
"""

from __future__ import annotations

import logging
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


def patch_rms_norm(model: nn.Module) -> None:
    """Replace the forward method of the model's RMSNorm instances by this one.

    A norm is recognised by its behaviour, not by its class name: it has ``weight`` and ``variance_epsilon``, and its
    forward computes the formula above, which is tested once for each class.
    """
    classes: dict[type, bool] = {}
    for module in model.modules():
        kind = type(module)
        if not (hasattr(module, "variance_epsilon") and isinstance(getattr(module, "weight", None), Tensor)):
            continue
        if kind not in classes:
            classes[kind] = _computes_rms_norm(kind)
            if not classes[kind]:
                log.info("%s looks like an RMS norm but computes something else: it stays as it is", kind.__name__)
        if classes[kind]:
            module.forward = MethodType(_forward, module)


def _computes_rms_norm(kind: Any) -> bool:
    """Return True if a class's forward computes RMSNorm.

    It runs on test values with a stand-in for ``self``, since a model's weights may be sharded or on ``meta``. The
    values are constants, so that no random state changes.
    """
    x = torch.linspace(-2, 3, 24, device="cpu", dtype=torch.float32).view(3, 8)
    weight, epsilon = torch.linspace(0.5, 1.5, 8, device="cpu", dtype=torch.float32), 0.1
    expected = weight * x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    try:
        found = kind.forward(SimpleNamespace(weight=weight, variance_epsilon=epsilon), x)
    except (AttributeError, TypeError):  # it needs other attributes, so it is another norm
        return False
    return isinstance(found, Tensor) and found.shape == x.shape and torch.allclose(found, expected, rtol=1e-5)


def _forward(norm: Any, x: Tensor) -> Tensor:
    """Replacement of the norm's ``forward``, ``(B, T, H) -> (B, T, H)``; calls the original where it does not apply."""
    own = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    own = own or x.dtype == torch.float16  # products of large values and gradients overflow it
    if own or norm.weight.requires_grad or norm.weight.dtype != x.dtype:
        out: Tensor = type(norm).forward(norm, x)
    else:
        out = _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        # The vector norm reads x once and allocates nothing of its size, unlike x.square().mean().
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # (B, T, 1)
        r = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        out: Tensor = (x * r).to(x.dtype).mul_(weight)  # rounded before the weight, as transformers does
        return out

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        x, weight, r = ctx.saved_tensors
        g = grad_y * weight
        # -r^2 mean(g x), (B, T, 1): the component along x is removed from the gradient.
        along_x = (g * x).sum(-1, keepdim=True, dtype=torch.float32).mul_(r).mul_(r).div_(-x.shape[-1])
        return g.addcmul_(x, along_x.to(x.dtype)).mul_(r.to(x.dtype)), None, None
