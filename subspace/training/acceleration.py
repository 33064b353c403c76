"""Optional accelerations: compiled layers, Liger kernels, activations offloaded to CPU memory.

They change results by rounding only.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

import torch
from torch import Tensor, nn

from subspace.errors import UserError
from subspace.models.transformers_compat import decoder_layers

SMALL = 1024  # elements; smaller tensors are not worth moving


def check_accelerations(*, compiled: bool, liger: bool, gpu: bool) -> None:
    """Raise UserError for unavailable accelerations."""
    if compiled and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise UserError(
            "train.compile needs a C++ compiler, and neither g++ nor clang++ is here. Install one (apt-get install "
            "g++), or set train.compile=false"
        )
    if liger and not gpu:
        raise UserError("train.liger asks for kernels of a GPU, and there is none here. Set train.liger=false")
    if liger and importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "train.liger needs the package liger-kernel, which is not installed. Install it (pip install "
            "liger-kernel), or set train.liger=false"
        )


def compile_layers(model: Any) -> None:
    """Compile each decoder layer at its first forward pass.

    Not the whole model, as DeepSpeed's ``engine.compile`` does: that would recompile for every batch
    length, while identical layers share one compilation.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UserError(f"train.compile knows no layers of {type(model).__name__}. Set train.compile=false")
    for layer in layers:
        layer.compile(dynamic=True)


def offload_activations() -> torch.autograd.graph.saved_tensors_hooks:
    """Return a context that offloads tensors saved for the backward pass, except weights, to CPU memory."""
    return torch.autograd.graph.saved_tensors_hooks(_to_host, _from_host)


def is_weight(tensor: Tensor) -> bool:
    """Return True for a parameter or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    if tensor.device.type == "cpu" or tensor.numel() < SMALL or is_weight(tensor):
        return tensor.device, tensor
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return tensor.device, copy.copy_(tensor, non_blocking=True)  # ordered by the stream, so complete before it is read


def _from_host(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = packed
    return tensor.to(device, non_blocking=True)
