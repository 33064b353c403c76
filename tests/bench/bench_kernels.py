"""Time what training on a CPU runs in place of what torch and transformers have: attention, norm, a branch's additions.

    python -m tests.bench.bench_kernels

Prints milliseconds of forward and backward together, medians of rounds in which the two sides alternate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from subspace.common.host_memory import manage_malloc, set_malloc_trim
from subspace.kernels import attention
from subspace.kernels.low_rank import lora_down, lora_up_add
from subspace.kernels.rms_norm import patch_rms_norm

ROUNDS = 15
ATTENTIONS = [(16, 64, 9, 3, 64), (16, 96, 9, 3, 64), (16, 256, 9, 3, 64), (4, 128, 32, 8, 128), (2, 1024, 9, 3, 64)]
LAYERS = [(576, 576), (576, 192), (576, 1536), (1536, 576)]
Side = Callable[..., Tensor]


def main() -> None:
    """Print all of them."""
    manage_malloc()
    set_malloc_trim(False)
    attention.LONGEST = 4096  # to see where it stops to gain
    for shape in ATTENTIONS:
        rows, tokens, heads, key_heads, width = shape
        module: Any = SimpleNamespace(is_causal=True, num_key_value_groups=heads // key_heads)
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(rows, 1, tokens, tokens).contiguous()
        theirs, ours = (
            lambda q, k, v, of=of, module=module, mask=mask: of(module, q, k, v, mask)[0]
            for of in (sdpa_attention_forward, partial(attention.row_blocked_attention, sdpa_attention_forward))
        )
        for dtype in (torch.bfloat16, torch.float32):
            given = [torch.randn(rows, tokens, n, width, dtype=dtype) for n in (heads, key_heads, key_heads)]
            tell(f"attention {shape} {dtype}", theirs, ours, [tensor.transpose(1, 2) for tensor in given])
    for dtype in (torch.bfloat16, torch.float32):
        plain, light = (LlamaRMSNorm(576).to(dtype).requires_grad_(False) for _ in "ab")
        patch_rms_norm(light)
        tell(f"norm {dtype}", plain, light, [torch.randn(16, 96, 576, dtype=dtype)])
        for n_in, n_out in LAYERS:
            layer = nn.Linear(n_in, n_out, bias=False, dtype=dtype).requires_grad_(False)
            given = [torch.randn(16, 96, n_in, dtype=dtype), torch.randn(32, n_in), torch.randn(n_out, 32)]
            tell(f"LoRA {n_in} to {n_out} {dtype}", partial(by_autograd, layer), partial(by_branch, layer), given)


def by_autograd(layer: nn.Linear, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Add an update as autograd differentiates it."""
    h = F.linear(x, A.to(x.dtype))
    y = layer(x)
    return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B.to(x.dtype).T, alpha=2.0).view(y.shape)


def by_branch(layer: nn.Linear, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Add it as this project does."""
    x, h = lora_down(x, A)
    return lora_up_add(layer(x), h, B, 2.0)


def tell(what: str, theirs: Side, ours: Side, given: Sequence[Tensor]) -> None:
    """Print the times of two sides."""
    inputs = [tensor.requires_grad_() for tensor in given]
    seen = torch.randn_like(theirs(*inputs))
    times: dict[Side, list[float]] = {theirs: [], ours: []}
    for _, side in ((n, side) for n in range(2 + ROUNDS) for side in times):
        began = time.perf_counter()
        torch.autograd.grad(side(*inputs), inputs, seen)
        times[side].append(1000 * (time.perf_counter() - began))
    one, other = (statistics.median(found[2:]) for found in times.values())
    print(f"{what}: {one:.2f}, here {other:.2f}", flush=True)


if __name__ == "__main__":
    main()
