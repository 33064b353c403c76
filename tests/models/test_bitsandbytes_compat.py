"""Canaries: every internal of bitsandbytes that the project uses is still there, and means what it is taken for.

A failure names the upstream change; mend `subspace/models/bitsandbytes_compat.py`, and nothing else.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from subspace.adapters.multi_adapter import share_weights
from subspace.models import bitsandbytes_compat as compat

VERSION = f"bitsandbytes {bitsandbytes.__version__}"
bnb: Any = bitsandbytes.nn
optim: Any = bitsandbytes.optim
IN, OUT = 128, 96


def quantized_layer(kind: str, *, double_quant: bool = False) -> tuple[Any, Tensor]:
    """Return one of bitsandbytes' layers, on a CPU, and the weight that it was made of."""
    torch.manual_seed(0)
    weight = torch.randn(OUT, IN)
    if kind == "int8":
        layer: Any = bnb.Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False)
        layer.weight = bnb.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.Linear4bit(IN, OUT, bias=False, quant_type=kind, compress_statistics=double_quant)
        layer.weight = bnb.Params4bit(
            weight.clone(), requires_grad=False, quant_type=kind, compress_statistics=double_quant
        )
    return layer.to("cpu"), weight


@pytest.mark.parametrize(("kind", "stored"), [("nf4", "4bit"), ("fp4", "4bit"), ("int8", "int8")])
def test_a_quantised_layer_is_known_by_the_class_of_its_weight(kind: str, stored: str) -> None:
    layer, _ = quantized_layer(kind)
    assert compat.storage_format(layer) == stored, f"{VERSION} renamed {type(layer.weight).__name__}"
    assert compat.storage_format(nn.Linear(1, 1)) == "plain"


@pytest.mark.parametrize(("kind", "double_quant"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_a_4_bit_weight_is_what_its_layer_multiplies_by(kind: str, double_quant: bool) -> None:
    layer, weight = quantized_layer(kind, double_quant=double_quant)
    values = compat.dequantize_4bit(layer.weight)
    compat.keep_4bit_weights_intact(layer)
    with torch.no_grad():
        by_layer = layer(torch.eye(IN)).T
    assert torch.allclose(values, by_layer, atol=1e-5), f"{VERSION} changed quant_state or dequantize_4bit"
    assert (values - weight).norm() < 0.2 * weight.norm()
    assert compat.num_weights(layer.weight) == OUT * IN, f"{VERSION} changed quant_state.shape"
    held = sum(tensor.nbytes for tensor in compat.scale_tensors(layer.weight))
    assert held > 0, f"{VERSION} changed absmax, code or state2 of quant_state"


def test_an_int8_weight_is_what_its_layer_multiplies_by_before_and_after_a_forward_pass() -> None:
    layer, weight = quantized_layer("int8")
    assert layer.weight.SCB is not None, f"{VERSION} no longer keeps the row scales at the parameter"
    before = compat.dequantize_int8(layer)
    with torch.no_grad():
        layer(torch.eye(IN))
    assert layer.weight.SCB is None, f"{VERSION} no longer moves the row scales to the layer's state"
    assert torch.equal(compat.dequantize_int8(layer), before)
    assert (before - weight).norm() < 0.02 * weight.norm()
    assert len([*compat.int8_tensors(layer.state)]) == 2, f"{VERSION} changed CB or SCB of the layer's state"


def test_int8_layers_that_share_a_weight_compute_the_same_whichever_is_first() -> None:
    layer, _ = quantized_layer("int8")
    values, x = compat.dequantize_int8(layer), torch.linspace(-1, 1, 3 * IN).view(3, IN)
    compat.make_int8_shareable(layer)
    assert layer.state.SCB is not None, f"{VERSION} changed init_8bit_state"
    twin = share_weights(layer)
    assert twin.weight is layer.weight
    outputs = [each(x).detach() for each in (twin, layer, twin)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert torch.allclose(outputs[0], x @ values.T, atol=0.05)
    assert torch.equal(compat.dequantize_int8(twin), values)


def test_an_int8_layer_made_zero_3_compatible_computes_the_same_and_retains_no_weight() -> None:
    plain, _ = quantized_layer("int8")
    ours, _ = quantized_layer("int8")
    compat.make_int8_zero3_compatible(ours)
    results = []
    for layer in (plain, ours):
        x = torch.linspace(-1, 1, 3 * IN).view(3, IN).requires_grad_()
        y = layer(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y.detach(), grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5), f"{VERSION} changed autograd._functions.matmul"
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-2, atol=1e-2)
    assert ours.state.CB is None
    assert ours.weight.CB is None


def test_the_fast_path_that_destroys_4_bit_weights_has_its_switch() -> None:
    layer, _ = quantized_layer("nf4")
    assert hasattr(layer, "support_avx512bf16_for_cpu"), (
        f"{VERSION} renamed the switch of the repacking in place: look in Linear4bit.forward whether it still does that"
    )
    layer.support_avx512bf16_for_cpu = True
    compat.keep_4bit_weights_intact(nn.Sequential(layer))
    assert layer.support_avx512bf16_for_cpu is False


def test_int8_products_have_a_form_that_needs_no_kernel() -> None:
    from bitsandbytes.autograd import _functions as functions

    _functions: Any = functions
    own = _functions.MatMul8bitLt
    with compat.int8_products_on_meta():
        assert _functions.MatMul8bitLt is _functions.MatMul8bitFp, f"{VERSION} renamed MatMul8bitFp"
    assert _functions.MatMul8bitLt is own


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_weights_of_shapes_only_are_as_large_as_real_ones(kind: str) -> None:
    real, _ = quantized_layer(kind)
    with torch.device("meta"):
        shape: Any = (
            bnb.Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False)
            if kind == "int8"
            else bnb.Linear4bit(IN, OUT, bias=False, quant_type=kind, compress_statistics=False)
        )
        compat.quantize_meta_weights(nn.Sequential(shape), kind, double_quant=False)
    assert shape.weight.is_meta
    assert shape.weight.nbytes == real.weight.nbytes
    scales = [sum(t.nbytes for t in compat.scale_tensors(layer.weight)) for layer in (shape, real)]
    assert scales[0] == scales[1]


def test_a_moment_in_8_bits_is_read_and_cleared() -> None:
    parameter = nn.Parameter(torch.zeros(5000))
    optimizer = optim.AdamW8bit([parameter])
    parameter.grad = torch.linspace(-1, 1, 5000)
    optimizer.step()
    state, places = optimizer.state[parameter], torch.tensor([0, 255, 256, 2500, 4999])
    assert state["state1"].dtype == torch.uint8
    for name, expected in (("state1", 0.1 * parameter.grad), ("state2", 0.001 * parameter.grad.square())):
        found = compat.read_moment(state, name, torch.arange(5000))
        assert (found - expected).norm() < 0.05 * expected.norm(), f"{VERSION} changed qmap, absmax or the blocks"
        compat.clear_moment(state, name, places)
        cleared = compat.read_moment(state, name, torch.arange(5000))
        assert not cleared[places].any(), f"{VERSION} has no code for zero"
        cleared[places] = found[places]
        assert torch.equal(cleared, found)
