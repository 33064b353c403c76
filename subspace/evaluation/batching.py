"""Batching, memory budgets and out-of-memory recovery for scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from subspace.distributed.collectives import world_size
from subspace.distributed.device import on_gpu
from subspace.distributed.zero import is_sharded
from subspace.errors import RunFailed

Batch = list[int]
Sizes = Sequence[tuple[int, int]]
"""For each item the number of its rows in a batch, and the number of tokens of its longest row."""

Records = list[Any]

MEMORY_SHARE = 0.6
"""Fraction of a device's free memory that one batch may fill, by the estimate in ``token_budget``."""

MOST_TOKENS, FEWEST_TOKENS = 65536, 256


def plan_batches(sizes: Sizes, budget: int) -> list[Batch]:
    """Return batches of at most ``budget`` tokens, longest items first; a larger item is a batch by itself.

    A batch that has reached an eighth of the budget takes no items that would be padded by more than a fifth.

    Args:
        sizes: rows and tokens of the items.
        budget: tokens, padding included.
    """
    plan: list[Batch] = []
    for number in sorted(range(len(sizes)), key=lambda number: sizes[number][1], reverse=True):
        batch = plan[-1] if plan else []
        padded = bool(batch) and sizes[number][1] < 0.8 * sizes[batch[0]][1]
        worth = padded and count_tokens(sizes, batch) < budget / 8
        if batch and (worth or not padded) and count_tokens(sizes, [*batch, number]) <= budget:
            batch.append(number)
        else:
            plan.append([number])
    return plan


def count_tokens(sizes: Sizes, batch: Batch) -> int:
    """Return the number of tokens of a batch, padding included."""
    return sum(sizes[number][0] for number in batch) * max(sizes[number][1] for number in batch)


def assign_to_ranks(plan: Sequence[Batch]) -> Iterator[list[Batch]]:
    """Yield one batch for each rank at a time. In the last round, ranks left without a batch repeat the last one.

    So all ranks make the same number of forward passes, as ZeRO-3 needs: each pass gathers the weights collectively.
    """
    ranks = world_size()
    for first in range(0, len(plan), ranks):
        yield [plan[min(first + offset, len(plan) - 1)] for offset in range(ranks)]


def token_budget(model: Any, *, writes: bool) -> int:
    """Return the number of tokens that a batch may have, padding included.

    On a GPU it follows from an estimate of the memory needed; :class:`OOMSplitter` handles what the estimate misses.
    On a CPU small batches stay in the caches and have less padding; but where tokens are generated one by one, every
    step reads all weights whatever the number of rows, so larger batches are cheaper.

    Args:
        model: the model, on its device.
        writes: whether the protocol generates text.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return 4096 if writes else 512
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    c, width = model.config, model.dtype.itemsize
    # Activations of one layer besides the residual stream; logits exist in float32 as well.
    layer = width * (8 * c.hidden_size + 4 * c.intermediate_size)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    cache = width * 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim
    per_token = layer + (cache if writes else c.vocab_size * (width + 8))
    return max(FEWEST_TOKENS, min(MOST_TOKENS, int(MEMORY_SHARE * free / per_token)))


class OOMSplitter:
    """Scorer of batches that splits one that does not fit into memory in two, and all later ones of its size.

    The score of an item does not depend on its batch, so results do not change.
    """

    def __init__(self, model: nn.Module, score: Callable[[Batch], Records], sizes: Sizes) -> None:
        self.model, self.attempt, self.sizes = model, score, sizes
        self.limit: float = float("inf")

    def score(self, batch: Batch) -> Records:
        """Return the record of each item of the batch."""
        tokens = count_tokens(self.sizes, batch)
        if len(batch) == 1 or tokens <= self.limit:
            try:
                return self.attempt(batch)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._raise_if_final(batch, tokens)
                self.limit = tokens // 2
            # Outside the handler the tensors of the failed pass are no longer referenced.
            if on_gpu():
                torch.cuda.empty_cache()
        half = len(batch) // 2
        return self.score(batch[:half]) + self.score(batch[half:])

    def _raise_if_final(self, batch: Batch, tokens: int) -> None:
        """Raise RunFailed if a smaller batch cannot help, or if the other ranks wait inside the failed pass."""
        sharded = any(is_sharded(parameter) for parameter in self.model.parameters())
        if sharded:
            raise RunFailed(
                f"a batch of {tokens} tokens did not fit into memory under ZeRO-3, where one process alone cannot try "
                f"a smaller one. Score again with evaluate.batch_tokens={tokens // 2}; it resumes where it stopped"
            ) from None
        if len(batch) == 1:
            raise RunFailed(
                f"one item of {tokens} tokens does not fit into memory by itself. Free some memory, or quantise the "
                "base (model.quantize=nf4); scoring again resumes where it stopped"
            ) from None


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "out of memory" in text
        or "can't allocate memory" in text
    )
