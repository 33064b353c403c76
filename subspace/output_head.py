"""The output head, run only where its logits are wanted: it is as wide as the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def head_at(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Let the output head see only these places of the flattened batch: logits become ``(1, len(places), vocabulary)``.

    A hook, and not a call of decoder and head by hand, so that what a model does to its logits (soft caps) stays done.
    """

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].flatten(0, 1)[places][None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()
