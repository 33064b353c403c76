"""Read a frozen linear layer's weight, however it is stored: plain, 8-bit, 4-bit, sharded by ZeRO-3, or both.

A method never asks how W is stored; it is handed W as an ``(out, in)`` tensor from here, and for products it calls
the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subspace.zero import gathered


def storage(layer: Any) -> str:
    """Return how the layer's weight is stored: ``plain``, ``int8`` or ``4bit`` (bitsandbytes)."""
    kind = type(layer.weight).__name__
    return {"Params4bit": "4bit", "Int8Params": "int8"}.get(kind, "plain")


def frozen_weight(layer: Any) -> Tensor:
    """Return W, ``(out, in)``, in the dtype it has or dequantises to. For use inside a forward pass, without gradient.

    Under ZeRO-3 the layer must be gathered: within a forward pass, reading ``layer.weight`` through DeepSpeed's hooks
    does that.
    """
    weight = layer.weight
    kind = storage(layer)
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
    values = weight.CB if weight.CB is not None else layer.state.CB
    whole = values.float() * (rows.float() / 127).unsqueeze(1)
    return whole


def full_weight(layer: Any) -> Tensor:
    """Return a float32 copy of the whole W, ``(out, in)``. For use outside a forward pass; all ranks must call it."""
    with gathered([layer.weight]):
        return frozen_weight(layer).to(torch.float32, copy=True)
