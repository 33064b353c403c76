"""All uses of bitsandbytes' internals: how it stores quantised linear layers and optimizer states, and computes.

Of layers, everything else asks :mod:`subspace.models.frozen_weights`. Each line of the table has a canary in
`tests/models/test_bitsandbytes_compat.py`, which fails with the reason below when an upstream release changes the name.

| internal name | checked with | what breaks without it | why it is used |
| --- | --- | --- | --- |
| `nn.Params4bit`, `quant_state` with `absmax code state2 shape` | 0.50.2 | reading 4-bit weights | no reader |
| `nn.Int8Params`, `SCB CB`, `layer.state` with `SCB CB is_training` | 0.50.2 | reading int8 weights; ZeRO-3 | same |
| `layer.init_8bit_state` | 0.50.2 | int8 in runs that share a base | as the first pass does |
| `autograd._functions.matmul` | 0.50.2 | int8 under ZeRO-3 | a product with a given state |
| `autograd._functions.MatMul8bitLt`, `MatMul8bitFp` | 0.50.2 | planning for int8 | what the meta device can run |
| `functional.name2qmap`, `create_dynamic_map` | 0.50.2 | `double_quant` after a plan or check | kept without values |
| `layer.support_avx512bf16_for_cpu` | 0.50.2 | 4-bit weights are destroyed on some CPUs | no switch |
| an optimizer state's `qmap1 qmap2 absmax1 absmax2`, blocks of 256 | 0.50.2 | schedules with 8-bit AdamW | no reader |

The scales of an int8 weight, ``SCB``, are one float for each row; a weight's value is ``row scale / 127 * int8``. They
are attributes of the parameter until the layer's first forward pass, which moves them to the layer's state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from subspace.common.patching import patched

#: Elements of an optimizer's state that share a scale.
BLOCK = 256


def storage_format(layer: Any) -> str:
    """Return the storage format of the layer's weight: ``plain``, ``int8`` or ``4bit``."""
    return weight_format(getattr(layer, "weight", None))


def weight_format(weight: Any) -> str:
    """Return a weight's storage format. By class name, so that bitsandbytes is not imported without need."""
    return {"Params4bit": "4bit", "Int8Params": "int8"}.get(type(weight).__name__, "plain")


def quantization_kind(weight: Any) -> str:
    """Return a weight's value of ``model.quantize``: ``nf4``, ``fp4``, ``int8``, or ``none``."""
    kind = weight_format(weight)
    return str(weight.quant_type) if kind == "4bit" else {"plain": "none"}.get(kind, kind)


def dequantize_4bit(weight: Any) -> Tensor:
    """Return the values of a 4-bit weight, ``(out, in)``, in the dtype that it was quantised from."""
    from bitsandbytes import functional

    values: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
    return values


def dequantize_int8(layer: Any) -> Tensor:
    """Return the values of a layer's int8 weight, ``(out, in)``, float32."""
    weight = layer.weight
    row_scales = weight.SCB if weight.SCB is not None else layer.state.SCB
    values: Tensor = weight.data.float() * (row_scales.float() / 127).unsqueeze(1)
    return values


def num_weights(parameter: Any) -> int | None:
    """Return the number of elements of a 4-bit weight (two are packed in a byte), or None for any other."""
    state = getattr(parameter, "quant_state", None)
    return None if state is None else int(state.shape.numel())


def scale_tensors(parameter: Any) -> Iterator[Tensor]:
    """Yield the tensors that a quantised weight needs besides its data: scales, scales of the scales, code books."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:  # with double quantisation the scales are quantised too
        yield from (state.absmax, state.code)
        state = state.state2
    if getattr(parameter, "SCB", None) is not None:
        yield parameter.SCB


def int8_tensors(holder: Any) -> Iterator[Tensor]:
    """Yield the tensors of an int8 weight or its layer's state besides the parameter: a view of the data, scales."""
    for name in ("CB", "SCB"):
        if (tensor := getattr(holder, name, None)) is not None:
            yield tensor


def make_int8_shareable(model: nn.Module) -> None:
    """Move the scales of int8 weights to their layers' states, as each layer's first forward pass would.

    Of several layers that share a weight, the first pass of one takes the scales; the others find none and quantise the
    int8 values once more, as if they were the weights, without a word.
    """
    layer: Any
    for layer in model.modules():
        if storage_format(layer) == "int8" and layer.weight.CB is not None:
            layer.init_8bit_state()


def keep_4bit_weights_intact(model: nn.Module) -> None:
    """Switch off a CPU fast path that destroys weights.

    On CPUs with AVX512-BF16, a 4-bit layer of bitsandbytes that runs in eval mode without gradients repacks its weight
    in place, for good; afterwards backward passes and dequantisation give garbage, under ZeRO-3 without an error.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def make_int8_zero3_compatible(model: nn.Module) -> None:
    """Make int8 layers ZeRO-3-compatible; bitsandbytes' own retain an unsharded copy of the weight.

    That copy is ``CB``, at the parameter and at the layer's state, an alias of the data until ZeRO-3 replaces the data
    by a shard. Here no copy is retained: each pass reads the parameter, which DeepSpeed gathers for the layer.
    """
    for layer in model.modules():
        if storage_format(layer) == "int8":
            weight: Any = layer.weight
            state: Any = layer.state
            state.SCB, state.CB = weight.SCB if weight.SCB is not None else state.SCB, None
            weight.CB = weight.SCB = None
            layer.forward = partial(_Int8Product.apply, layer)


class _Int8Product(torch.autograd.Function):
    """Autograd function of an int8 layer that reads the weight in forward and backward and saves no copy."""

    @staticmethod
    def forward(ctx: Any, layer: Any, x: Tensor) -> Tensor:
        from bitsandbytes.autograd._functions import matmul

        ctx.layer = layer
        state = copy.copy(layer.state)  # the shared state must not reference the gathered weight after this call
        state.CB, state.is_training = layer.weight.data, layer.training
        out: Tensor = matmul(x, layer.weight, bias=layer.bias, state=state)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0] @ dequantize_int8(ctx.layer).to(gradients[0].dtype)


def quantize_meta_weights(model: nn.Module, kind: str, *, double_quant: bool) -> None:
    """Quantise the weights of bitsandbytes' layers on the meta device: shapes and dtypes as after loading, no values.

    Args:
        model: with bitsandbytes' linears, whose weights are not quantised yet.
        kind: ``int8``, ``nf4`` or ``fp4``.
        double_quant: whether the scales of 4-bit weights are quantised too.
    """
    from bitsandbytes.functional import create_dynamic_map, name2qmap, quantize_4bit
    from bitsandbytes.nn import Int8Params, Params4bit  # type: ignore[attr-defined]

    with torch.device("cpu"):
        # The table of values for scales, which it would keep for all models as it is for the first one: without values.
        name2qmap.setdefault("dynamic", create_dynamic_map())  # type: ignore[no-untyped-call]
    layer: Any
    for layer in model.modules():
        if type(layer).__name__ == "Linear8bitLt":
            scales, values = torch.empty(layer.out_features), torch.empty(layer.weight.shape, dtype=torch.int8)
            layer.weight = Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
        elif type(layer).__name__ == "Linear4bit":
            packed, state = quantize_4bit(
                layer.weight.data, blocksize=64, quant_type=kind, compress_statistics=double_quant
            )
            layer.weight = Params4bit(
                packed, False, state, 64, compress_statistics=double_quant, quant_type=kind, bnb_quantized=True
            )


@contextmanager
def int8_products_on_meta() -> Iterator[None]:
    """Inside the block, compute int8 products by operations that the meta device supports; a CPU runs the same ones."""
    from bitsandbytes.autograd import _functions

    with patched(_functions, "MatMul8bitLt", _functions.MatMul8bitFp):
        yield


def read_moment(state: Mapping[str, Any], name: str, index: Tensor) -> Tensor:
    """Return some values, float32, of a moment that an optimizer keeps in 8 bits: ``state1`` or ``state2``.

    ``index (n,)`` has their places in the flattened moment.
    """
    codes, scales, values = _coded(state, name)
    places = index.to(codes.device)
    found: Tensor = values[codes.view(-1)[places].long().to(values.device)] * scales[index // BLOCK]
    return found


def clear_moment(state: Mapping[str, Any], name: str, index: Tensor) -> None:
    """Set values of a moment that an optimizer keeps in 8 bits to zero; arguments as of :func:`read_moment`."""
    codes, _, values = _coded(state, name)
    zero = values.abs().argmin()
    codes.view(-1)[index.to(codes.device)] = zero.to(codes.device, codes.dtype)


def _coded(state: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return a moment's codes, the scale of each block, and the value of each code."""
    number = name.removeprefix("state")
    return state[name], state[f"absmax{number}"], state[f"qmap{number}"]
