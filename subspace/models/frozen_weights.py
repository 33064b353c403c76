"""Read a frozen linear layer's weight, however it is stored: plain, 8-bit, 4-bit, sharded by ZeRO-3, or both.

A method never asks how W is stored; it is handed W as an ``(out, in)`` tensor from here, and for products it calls
the layer.
"""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from subspace.distributed.collectives import rank
from subspace.distributed.zero import full_shape, gathered, is_sharded


def storage_format(layer: Any) -> str:
    """Return how the layer's weight is stored: ``plain``, ``int8`` or ``4bit`` (bitsandbytes)."""
    kind = type(layer.weight).__name__
    return {"Params4bit": "4bit", "Int8Params": "int8"}.get(kind, "plain")


def dequantized_weight(layer: Any) -> Tensor:
    """Return W, ``(out, in)``, in the dtype it has or dequantises to. For use inside a forward pass, without gradient.

    Under ZeRO-3 the layer must be gathered: within a forward pass, reading ``layer.weight`` through DeepSpeed's hooks
    does that.
    """
    weight = layer.weight
    kind = storage_format(layer)
    whole: Tensor
    if kind == "plain":
        whole = weight.detach()
        return whole
    if kind == "4bit":
        from bitsandbytes.functional import dequantize_4bit

        whole = dequantize_4bit(weight.data, weight.quant_state)
        return whole
    # The row scales move from the parameter to the layer's state at the first forward pass.
    rows = weight.SCB if weight.SCB is not None else layer.state.SCB
    whole = weight.data.float() * (rows.float() / 127).unsqueeze(1)
    return whole


def make_int8_zero3_compatible(model: nn.Module) -> None:
    """Make layers in 8 bits fit for ZeRO-3: bitsandbytes' own keep the whole weight beside what ZeRO takes apart."""
    for layer in model.modules():
        weight: Any = getattr(layer, "weight", None)
        if type(weight).__name__ == "Int8Params":
            state: Any = layer.state
            state.SCB, state.CB = weight.SCB if weight.SCB is not None else state.SCB, None
            weight.CB = weight.SCB = None
            layer.forward = partial(_Int8Product.apply, layer)


class _Int8Product(torch.autograd.Function):
    """A layer in 8 bits, whose weight is read for the pass at hand, forward or backward, and kept by neither."""

    @staticmethod
    def forward(ctx: Any, layer: Any, x: Tensor) -> Tensor:
        from bitsandbytes.autograd._functions import matmul

        ctx.layer = layer
        state = copy.copy(layer.state)
        state.CB, state.is_training = layer.weight.data, layer.training
        out: Tensor = matmul(x, layer.weight, bias=layer.bias, state=state)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0] @ dequantized_weight(ctx.layer).to(gradients[0].dtype)


def weight_memory_bytes(model: nn.Module) -> int:
    """Return how much of the model's weights, with what their quantisation needs, this process holds in memory."""
    tensors: list[Any] = []
    for parameter in model.parameters():
        tensors += [parameter.data, getattr(parameter, "ds_tensor", None)]
        state: Any = getattr(parameter, "quant_state", None)
        while state is not None:
            tensors += [state.absmax, state.code]
            state = state.state2
        tensors += [getattr(parameter, "CB", None), getattr(parameter, "SCB", None)]
    for module in model.modules():
        state = getattr(module, "state", None)
        tensors += [*module.buffers(recurse=False), getattr(state, "CB", None), getattr(state, "SCB", None)]
    # What is held under two names counts once.
    held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None}
    return sum(held.values())


def trainable_copy(parameter: nn.Parameter) -> nn.Parameter:
    """Return a float32 parameter with the values of a frozen one, in parts where that is. All ranks must call it."""
    with gathered([parameter]):
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        copy = nn.Parameter(parameter.detach().to(dtype, copy=True))
    if is_sharded(parameter):
        parameter.convert_to_zero_parameters(param_list=[copy])  # type: ignore[attr-defined]
    return copy


def is_matrix(parameter: nn.Parameter) -> bool:
    """Tell whether a parameter, in parts or not, has more than one dimension."""
    return len(full_shape(parameter)) > 1


def offload_to_cpu(parameter: nn.Parameter) -> nn.Parameter:
    """Move a frozen parameter that nothing computes with to the host's memory; ZeRO-3's parts stay where they are."""
    if not (is_sharded(parameter) or parameter.is_meta):
        parameter.data = parameter.data.cpu()
    return parameter


def gather_weight_fp32(layer: Any) -> Tensor:
    """Return a float32 copy of the whole W, ``(out, in)``. For use outside a forward pass; all ranks must call it."""
    with gathered([layer.weight]):
        return dequantized_weight(layer).to(torch.float32, copy=True)


def gather_weight_on_rank(owner: int, layer: Any) -> Tensor | None:
    """Return what :func:`gather_weight_fp32` does on one rank, and None on the others, which must call it too."""
    with gathered([layer.weight]):
        return dequantized_weight(layer).to(torch.float32, copy=True) if owner == rank() else None


def read_checkpoint_weight(folder: str | Path, name: str) -> Tensor | None:
    """Return a weight as a model's folder stores it, float32, or None where that holds it quantised or not at all."""
    file = find_weight_file(folder, name)
    if file is None:
        return None
    with safe_open(file, framework="pt") as stored:
        weight: Tensor = stored.get_tensor(name)
    return weight.float()


def find_weight_file(folder: str | Path, name: str) -> Path | None:
    """Return the file in a model's folder that holds a weight unquantised, or None."""
    folder = Path(folder)
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        file = folder / json.loads(index.read_text())["weight_map"].get(name, "no file")
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as stored:
        names = set(stored.keys())
        return file if name in names and stored.get_slice(name).get_dtype() in ("F32", "F16", "BF16", "F64") else None
