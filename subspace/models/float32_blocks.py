"""Forward passes in float32 of a model that holds its weights in 16 bits, with the memory of those 16 bits.

float32 holds every float16 and bfloat16 number exactly, so a 16-bit weight that is raised to float32 when it is needed
gives the same results, to the bit, as a model opened in float32, which takes twice the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from subspace.models.transformers_compat import decoder_layers


def blocks(model: Any) -> list[nn.Module]:
    """Return the modules that hold all of a model's weights between them: its decoder layers, and those outside."""
    layers = set(decoder_layers(model))

    def search(module: nn.Module) -> Iterator[nn.Module]:
        if module in layers or any(True for _ in module.parameters(recurse=False)):
            yield module
        else:
            for child in module.children():
                yield from search(child)

    return list(search(model))


def _nothing(block: nn.Module) -> None:
    pass


@contextmanager
def float32_blocks(
    model: Any, enter: Callable[[nn.Module], None] = _nothing, leave: Callable[[nn.Module], None] = _nothing
) -> Iterator[None]:
    """Inside the context, let the model's forward passes compute in float32, whatever it holds its weights in.

    The weights of one of the model's :func:`blocks` at a time are float32, while it runs. Without gradients.

    Args:
        model: weights in float32 are used as they are.
        enter: called with a block before its weights are raised.
        leave: called with a block when its weights are as before.
    """
    held: dict[int, Tensor] = {}

    def raise_(block: nn.Module, inputs: Any) -> None:
        enter(block)
        for parameter in block.parameters():
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                held[id(parameter)] = parameter.data
                parameter.data = parameter.data.float()

    def lower(block: nn.Module, inputs: Any, output: Any) -> None:
        for parameter in block.parameters():
            if id(parameter) in held:
                parameter.data = held.pop(id(parameter))
        leave(block)

    with ExitStack() as stack:
        for block in blocks(model):
            stack.callback(block.register_forward_pre_hook(raise_, prepend=True).remove)
            stack.callback(block.register_forward_hook(lower, always_call=True).remove)
        yield
