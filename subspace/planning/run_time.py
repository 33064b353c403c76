"""Estimate of a run's time: from a device's published rates, or from a clock of this machine's matrix products."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from subspace.models.experts.weights import stacks_of_experts
from subspace.models.frozen_weights import is_linear, layer_sizes
from subspace.models.transformers_compat import experts_per_token
from subspace.planning.devices import DeviceSpec

#: Upper end of the time range on this machine, as a multiple of the time of the matrix products alone.
SLOWEST = 5.0
#: Share of a GPU's published rates that a run attains, from the best to a poor one. Well-fed training of whole models
#: is reported between 0.3 and 0.6; small micro-batches leave the GPU waiting for launches.
UTILIZATION = (0.6, 0.15)
#: The width of the matrices that the clock multiplies, and how many products it queues before it waits. One product of
#: 1024 columns takes a GPU microseconds: that would time launches.
CLOCKS = {"cpu": (1024, 1), "cuda": (8192, 20)}


def matrix_work(model: Any, tokens: int, *, recomputed: bool) -> float:
    """Return the floating-point operations of the frozen products in training on so many tokens.

    Of a mixture's routed experts, each token has the products of a few.
    """
    numbers = sum(math.prod(layer_sizes(module)) for module in model.modules() if is_linear(module))
    for stack in stacks_of_experts(model):
        used = min(experts_per_token(model.config, stack.num_experts), stack.num_experts)
        numbers += used * stack.in_features * stack.out_features
    return 2.0 * numbers * tokens * _passes(recomputed)


def seconds_on(
    spec: DeviceSpec, work: float, dtype: str, weights: int, micro_batches: int, processes: int, *, recomputed: bool
) -> tuple[float, float]:
    """Return the range of a run's time on GPUs with these figures.

    Args:
        spec: the GPU.
        work: floating-point operations of the run.
        dtype: in which the model computes.
        weights: bytes that a pass over the model moves to read its weights.
        micro_batches: of each process in the run.
        processes: of the run, one GPU each.
        recomputed: whether activations are recomputed in the backward pass.
    """
    products = work / spec.rate(dtype) / processes
    traffic = weights * _passes(recomputed) * micro_batches / (spec.bandwidth * 1e9)
    fast, slow = UTILIZATION
    return max(products, traffic) / fast, (products + traffic) / slow


def seconds_here(work: float, dtype: torch.dtype, device: torch.device, processes: int) -> tuple[float, float]:
    """Return the range of a run's time on this machine, whose processes share a CPU but not a GPU."""
    speed = matmul_rate(device, dtype) * (processes if device.type == "cuda" else 1)
    return work / speed, SLOWEST * work / speed


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the floating-point operations per second that this device attains in products of large matrices."""
    width, queued = CLOCKS[device.type]
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in "ab")
    _multiply(a, b, 1)  # the first one loads kernels
    done, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds or not done:
        _multiply(a, b, queued)
        done += queued
    return done * 2 * width**3 / spent


def _multiply(a: Any, b: Any, count: int) -> None:
    """Compute so many products, and wait for the last."""
    for _ in range(count):
        out = a @ b
    out[0, 0].item()  # products are computed in order


def _passes(recomputed: bool) -> int:
    """Return the passes over the weights: forward, the gradient of the input, and a second forward if recomputed."""
    return 3 if recomputed else 2
