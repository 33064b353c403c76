"""The norm that training on a CPU takes: that of transformers, with its gradient."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subspace.kernels.rms_norm import patch_rms_norm
from tests.helpers.tiny_models import tiny

WIDTH = 24
#: Norms that the kernel must know: if one is not patched any more, transformers has changed it.
KINDS = ("LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Phi3RMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


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
        assert "forward" in vars(norm), f"transformers has changed {kind}: it is not known as an RMS norm any more"
        ours = results(norm, dtype)
        for one, other, right in zip(ours, theirs, exact, strict=True):
            assert apart(one, right) < most
            assert apart(one, right) < 2 * apart(other, right) + 1e-7


def test_another_norm_is_left_alone() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    norm = GemmaRMSNorm(WIDTH)
    patch_rms_norm(norm)
    assert "forward" not in vars(norm)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_every_norm_of_a_known_model_is_patched(architecture: str) -> None:
    model = tiny(architecture)
    patch_rms_norm(model)
    norms = [module for name, module in model.named_modules() if name.rpartition(".")[2].endswith("norm")]
    assert len(norms) > 2
    assert all("forward" in vars(norm) for norm in norms)


class Renamed(nn.Module):
    """The norm under another name, and variants of it."""

    def __init__(self, shift: float = 0.0, centred: bool = False) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(WIDTH), requires_grad=False), 1e-6
        type(self).shift, type(self).centred = shift, centred

    shift, centred = 0.0, False

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True) if Renamed.centred else 0.0
        x = x - mean
        scale: Tensor = (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return (Renamed.shift + self.weight) * x * scale


@pytest.mark.parametrize(("shift", "centred", "known"), [(0.0, False, True), (1.0, False, False), (0.0, True, False)])
def test_a_norm_is_known_by_what_it_computes_and_not_by_its_name(shift: float, centred: bool, known: bool) -> None:
    norm = Renamed(shift, centred)
    state = torch.random.get_rng_state()
    patch_rms_norm(norm)
    assert ("forward" in vars(norm)) == known
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_norm_that_needs_more_than_weight_and_epsilon_is_left_alone() -> None:
    class Gated(Renamed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gate  # type: ignore[operator]

    norm = Gated()
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
