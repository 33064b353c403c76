"""How items become batches, how many tokens a batch has, and what happens when one does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from subspace.distributed.collectives import world_size
from subspace.distributed.zero import is_sharded
from subspace.errors import RunFailed

Batch = list[int]
Sizes = Sequence[tuple[int, int]]
"""For each item how many rows it is in a batch, and how many tokens its longest row has."""

Records = list[Any]

MEMORY_SHARE = 0.6
"""How much of a device's free memory one batch may fill by the estimate below."""

MOST_TOKENS, FEWEST_TOKENS = 65536, 256


def plan_batches(sizes: Sizes, budget: int) -> list[Batch]:
    """Cut items into batches of at most ``budget`` tokens, longest items first; an item that is larger comes alone.

    A batch that has an eighth of the budget takes no items that would be padded by more than a fifth.

    Args:
        sizes: of the items.
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
    """Return the tokens of a batch, padding included."""
    return sum(sizes[number][0] for number in batch) * max(sizes[number][1] for number in batch)


def assign_to_ranks(plan: Sequence[Batch]) -> Iterator[list[Batch]]:
    """Deal the batches out, one for each rank at a time. The last one goes to all ranks that would have none.

    So each rank makes equally many forward passes, which ZeRO-3 needs: every one of them gathers the weights together.
    """
    ranks = world_size()
    for first in range(0, len(plan), ranks):
        yield [plan[min(first + other, len(plan) - 1)] for other in range(ranks)]


def token_budget(model: Any, *, writes: bool) -> int:
    """Return how many tokens a batch may have, padding included.

    On a GPU, what fits by a generous estimate; :class:`OOMSplitter` takes care of what the estimate does not see. Small
    batches stay in a CPU's caches and have less padding. But where tokens are written one by one, each reads all
    weights for however few rows, so there more rows are cheaper.

    Args:
        model: the model.
        writes: whether the protocol lets it write.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return 4096 if writes else 512
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    c, width = model.config, model.dtype.itemsize
    # What one layer holds at once, besides the residual stream; logits are there in float32 too.
    layer = width * (8 * c.hidden_size + 4 * c.intermediate_size)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    cache = width * 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim
    per_token = layer + (cache if writes else c.vocab_size * (width + 8))
    return max(FEWEST_TOKENS, min(MOST_TOKENS, int(MEMORY_SHARE * free / per_token)))


class OOMSplitter:
    """Scores batches; one that does not fit into memory is cut in two, and so are all later ones of its size.

    What is scored does not depend on the batch it is in, so the results stay what they are.
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
                self._refuse(batch, tokens)
                self.limit = tokens // 2
            # Outside the handler nothing holds the failed pass's tensors any longer.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        half = len(batch) // 2
        return self.score(batch[:half]) + self.score(batch[half:])

    def _refuse(self, batch: Batch, tokens: int) -> None:
        """End the run where a smaller batch cannot help, or where the other ranks wait inside the failed pass."""
        sharded = any(is_sharded(parameter) for parameter in self.model.parameters())
        if sharded:
            raise RunFailed(
                f"a batch of {tokens} tokens did not fit into memory under ZeRO-3, where one process alone cannot try "
                f"a smaller one. Score again with evaluate.batch_tokens={tokens // 2}: it goes on where it was"
            ) from None
        if len(batch) == 1:
            raise RunFailed(
                f"one item of {tokens} tokens does not fit into memory by itself. Free some memory, or quantise the "
                "base (model.quantize=nf4); scoring again goes on where it was"
            ) from None


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "out of memory" in text
        or "can't allocate memory" in text
    )
