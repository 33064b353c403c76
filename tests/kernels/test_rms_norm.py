"""The norm that training on a CPU takes: that of transformers, with its gradient."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from subspace.kernels.rms_norm import KINDS, patch_rms_norm

WIDTH = 24


def norm_of(kind: str, dtype: torch.dtype) -> Any:
    """Return a norm of transformers' with weights of its own."""
    family = kind.removesuffix("RMSNorm").lower()
    cls = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), kind)
    norm = cls(WIDTH, eps=0.1)
    torch.manual_seed(0)
    norm.weight.data = (torch.rand(WIDTH) + 0.5).to(dtype)
    return norm.requires_grad_(False)


def results(norm: Any, dtype: torch.dtype, *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Return what a norm makes of rows of unlike size in a dtype, and what arrives at them."""
    torch.manual_seed(1)
    x = (torch.randn(3, 5, WIDTH) * torch.tensor([0.1, 1.0, 30.0])[:, None, None]).to(dtype)
    g = torch.randn(3, 5, WIDTH).to(dtype)
    x, g = (x.double(), g.double()) if exact else (x, g)
    out = norm(x.requires_grad_())
    return out.detach(), torch.autograd.grad(out, x, g)[0]


def apart(some: Tensor, other: Tensor) -> float:
    """Return the largest relative distance of a row."""
    distance, size = ((t.double()).norm(dim=-1) for t in (some.double() - other.double(), other))
    return float((distance / size).max())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_transformers(kind: str) -> None:
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        norm = norm_of(kind, dtype)
        weight = norm.weight.double()
        exact = results(
            lambda x, w=weight: w * x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt(), dtype, exact=True
        )
        theirs = results(norm, dtype)
        patch_rms_norm(norm)
        ours = results(norm, dtype)
        for one, other, right in zip(ours, theirs, exact, strict=True):
            assert apart(one, right) < most
            assert apart(one, right) < 2 * apart(other, right) + 1e-7


def test_another_norm_is_left_alone() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    norm = GemmaRMSNorm(WIDTH)
    patch_rms_norm(norm)
    assert "forward" not in vars(norm)


def test_a_trained_weight_gets_its_gradient() -> None:
    norm = norm_of("LlamaRMSNorm", torch.float32)
    patch_rms_norm(norm)
    norm.weight.requires_grad_(True)
    x = torch.randn(4, WIDTH)
    norm(x).sum().backward()
    rows = x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt()
    assert torch.allclose(norm.weight.grad, rows.sum(0), atol=1e-5)


def test_scoring_has_transformers_own() -> None:
    norm, plain = norm_of("LlamaRMSNorm", torch.float32), norm_of("LlamaRMSNorm", torch.float32)
    patch_rms_norm(norm)
    x = torch.randn(4, WIDTH)
    with torch.no_grad():
        assert torch.equal(norm(x), plain(x))


def test_float16_has_the_range_of_transformers_own() -> None:
    """A large value meets a gradient that the loss scale has made large: their product is more than float16 holds."""
    norm = norm_of("LlamaRMSNorm", torch.float16)
    patch_rms_norm(norm)
    x = torch.ones(1, WIDTH, dtype=torch.float16)
    x[0, 3] = 3000
    norm(x.requires_grad_()).backward(torch.full((1, WIDTH), 100.0, dtype=torch.float16))
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
