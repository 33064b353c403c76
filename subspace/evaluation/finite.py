"""Outputs of a model that are not finite: no answer can be read from them, so they end a scoring.

The largest of NaNs is by chance the first, so without this a broken model would have an accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from subspace.distributed.zero import local_shard
from subspace.errors import RunFailed


class NonFiniteOutput(Exception):
    """The outputs of an item are not finite; ``index`` is the item's place in the batch that was scored."""

    def __init__(self, index: int) -> None:
        super().__init__(f"the outputs of item {index} of a batch are not finite")
        self.index = index


def require_finite(scores: Sequence[Sequence[float]]) -> None:
    """Raise NonFiniteOutput for the first item whose scores are not all finite."""
    for index, values in enumerate(scores):
        if not all(map(math.isfinite, values)):
            raise NonFiniteOutput(index)


def non_finite_failure(model: nn.Module, item: str, place: str) -> RunFailed:
    """Return the error for a model whose outputs are not finite, with the likely cause.

    Args:
        model: the model, which may be spread over ranks; the tensors of this one are looked at.
        item: the first such item's id.
        place: the task and the protocol.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    broken = [(name, tensor) for name, tensor in named if not _is_finite(tensor)]
    # An adapter is the likelier cause, and the one that can be taken away.
    broken.sort(key=lambda pair: not pair[1].requires_grad)
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    if broken:
        more = f" and {len(broken) - 1} more tensors hold" if len(broken) > 1 else " holds"
        cause = f"{broken[0][0]}{more} values that are not finite. Take another checkpoint or base"
    elif dtype == "float16":
        cause = (
            "its weights are finite, so its activations exceed float16's range (65,504). "
            "Score with model.dtype=bfloat16, or float32"
        )
    else:
        cause = f"its weights are finite, so something overflows between them (dtype {dtype})"
    return RunFailed(
        f"{place}, item '{item}': the model's outputs are NaN or infinite, so there is no answer and no score was "
        f"written: {cause}"
    )


def _is_finite(tensor: Tensor) -> bool:
    shard = local_shard(tensor)
    values = tensor if shard is None else shard
    return not values.is_floating_point() or bool(torch.isfinite(values.detach()).all())
