r"""The root-mean-square norm as training on a CPU wants it: in half as many passes over the hidden values.

With frozen weights w, ``y = w r x`` for :math:`r = (\mathrm{mean}(x^2) + \epsilon)^{-1/2}`. What arrives at x is
:math:`r\,(g - x\,r^2\,\mathrm{mean}(g x))` for ``g = w`` times what arrives at y. In bfloat16, means are float32.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

#: transformers' norms that are this one, with ``weight`` and ``variance_epsilon``.
KINDS = ("LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Phi3RMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def patch_rms_norm(model: nn.Module) -> None:
    """Let the model's norms, where they are known, take fewer passes in training."""
    for norm in model.modules():
        if type(norm).__name__ in KINDS:
            norm.forward = MethodType(_forward, norm)


def _forward(norm: Any, x: Tensor) -> Tensor:
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    plain = plain or x.dtype == torch.float16  # whose range the products of large values and gradients leave
    if plain or norm.weight.requires_grad or norm.weight.dtype != x.dtype:
        out: Tensor = type(norm).forward(norm, x)
    else:
        out = _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        out: Tensor = (x * r).to(x.dtype).mul_(weight)
        return out

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor, None, None]:
        x, weight, r = ctx.saved_tensors
        g = of_y * weight
        along = (g * x).sum(-1, keepdim=True, dtype=torch.float32).mul_(r).mul_(r).div_(-x.shape[-1])
        return g.addcmul_(x, along.to(x.dtype)).mul_(r.to(x.dtype)), None, None
