"""Read a frozen linear layer's weight W, ``(out, in)``, however it is stored: plain, 8-bit, 4-bit, sharded, or both.

Methods are independent of how W is stored: they get W from here, and for products they call the layer. Four functions
read it, and :func:`subspace.adapters.inject._weight` chooses for a method that starts from W:

| function | returns | dtype | valid where |
| --- | --- | --- | --- |
| `dequantized_weight(layer)` | W, maybe the layer's own memory | its own | inside a forward pass |
| `gather_weight_fp32(layer)` | a copy, on every rank | float32 | outside one; collective |
| `gather_weight_on_rank(owner, layer)` | a copy on one rank, else None | float32, or own | outside one; collective |
| `read_checkpoint_weight(folder, name)` | W before quantisation, from its file | float32 | anywhere |

A linear layer is one of torch's, one of bitsandbytes', which derive from these, or transformers' ``Conv1D``, GPT-2's,
which computes the same of a weight that it holds transposed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from subspace.distributed.collectives import rank
from subspace.distributed.zero import full_shape, gathered, is_sharded, local_shard, shard_as
from subspace.models.bitsandbytes_compat import (
    dequantize_4bit,
    dequantize_int8,
    int8_tensors,
    num_weights,
    scale_tensors,
    storage_format,
)
from subspace.models.files import read_json


def is_linear(module: nn.Module) -> bool:
    """Return True for a linear layer."""
    return isinstance(module, nn.Linear) or _is_conv1d(type(module))


def layer_sizes(layer: Any) -> tuple[int, int]:
    """Return the number of features that a linear layer reads, and of those that it puts out."""
    return (layer.nx, layer.nf) if _is_conv1d(type(layer)) else (layer.in_features, layer.out_features)


def as_stored(layer: Any, W: Tensor) -> Tensor:
    """Return a W, ``(out, in)``, as the layer holds its weight."""
    return W.T if _is_conv1d(type(layer)) else W


def _is_conv1d(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and hasattr(kind, "forward")


def dequantized_weight(layer: Any) -> Tensor:
    """Return W, ``(out, in)``, in the dtype it has or dequantises to, without gradient; may share memory with it.

    For use inside a forward pass: under ZeRO-3 the layer must be gathered, and reading ``layer.weight`` there through
    DeepSpeed's hooks does that. A plain weight is returned without a copy, so do not write into it.
    """
    weight = layer.weight
    kind = storage_format(layer)
    if kind == "4bit":
        return dequantize_4bit(weight)
    if kind == "int8":
        return dequantize_int8(layer)
    return as_stored(layer, weight.detach())


def gather_weight_fp32(layer: Any) -> Tensor:
    """Return a float32 copy of the whole W, ``(out, in)``, on every rank. All ranks must call it, outside a forward."""
    with gathered([layer.weight]):
        return dequantized_weight(layer).to(torch.float32, copy=True)


def gather_weight_on_rank(owner: int, layer: Any, dtype: torch.dtype | None = torch.float32) -> Tensor | None:
    """Return a copy of the whole W on rank ``owner``, None on others. All ranks must call it, outside a forward.

    ``dtype`` None is W's own.
    """
    with gathered([layer.weight]):
        W = dequantized_weight(layer)
        return W.to(dtype or W.dtype, copy=True) if owner == rank() else None


def read_checkpoint_weight(folder: str | Path, name: str, layer: Any = None) -> Tensor | None:
    """Return a weight from the model's files, float32, or None if they store it quantised or not at all.

    The one source of W before quantisation, for methods that need directions smaller than the quantisation noise. A
    quantised ``layer`` that took the place of a ``Conv1D`` says that its file has W transposed.
    """
    file = find_weight_file(folder, name)
    if file is None:
        return None
    with safe_open(file, framework="pt") as stored:
        weight: Tensor = stored.get_tensor(name)
    return (weight.T if _is_conv1d(getattr(layer, "source_cls", type(None))) else weight).float()


def find_weight_file(folder: str | Path, name: str) -> Path | None:
    """Return the file in a model's folder that stores a weight unquantised, or None."""
    folder = Path(folder)
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        file = folder / read_json(index)["weight_map"].get(name, "no file")
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as stored:
        names = set(stored.keys())
        return file if name in names and stored.get_slice(name).get_dtype() in ("F32", "F16", "BF16", "F64") else None


def weight_memory_bytes(model: nn.Module) -> int:
    """Return this process's memory for the model's weights in bytes, quantisation state included."""
    tensors: list[Any] = []
    for parameter in model.parameters():
        tensors += [parameter.data, local_shard(parameter)]
        tensors += [*scale_tensors(parameter), *int8_tensors(parameter)]
    for module in model.modules():
        tensors += [*module.buffers(recurse=False), *int8_tensors(getattr(module, "state", None))]
    # Tensors with two names count once.
    held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None}
    return sum(held.values())


def num_parameters(parameter: nn.Parameter) -> int:
    """Return a parameter's number of elements, also if it is sharded or packed."""
    return num_weights(parameter) or int(full_shape(parameter).numel())


def trainable_copy(parameter: nn.Parameter) -> nn.Parameter:
    """Return a float32 trainable copy of a frozen parameter, sharded if that one is. All ranks must call it."""
    with gathered([parameter]):
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        copy = nn.Parameter(parameter.detach().to(dtype, copy=True))
    if is_sharded(parameter):
        shard_as(parameter, [copy])
    return copy


def is_matrix(parameter: nn.Parameter) -> bool:
    """Return True if the parameter, sharded or not, has more than one dimension."""
    return len(full_shape(parameter)) > 1


def offload_to_cpu(parameter: nn.Parameter) -> nn.Parameter:
    """Move a frozen parameter that is not used in computation to CPU memory; ZeRO-3 shards stay on their device."""
    if not (is_sharded(parameter) or parameter.is_meta):
        parameter.data = parameter.data.cpu()
    return parameter
