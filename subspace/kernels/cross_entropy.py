"""Cross entropy of an output head's logits, computed a few tokens at a time.

Why: a vocabulary is wide. Float32 logits of 4,096 tokens over 128,256 words are 2.1 GB, and a backward pass needs
three copies. In chunks, the logits of one chunk at a time exist; the backward pass computes them again.

When: always in training, through :mod:`subspace.models.lm_head`, in as many chunks as :func:`num_chunks` says (one, and
nothing is computed twice, where the labelled tokens are few).

Gain: memory, not time. `tests/models/test_lm_head.py` checks that no tensor is as large as all tokens' logits.

Shapes: (N) labelled tokens of a batch, (H) hidden size, (V) vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from subspace.data.collate import IGNORE_INDEX

#: Largest number of logits at a time: 64 MiB of float32.
MAX_LOGITS = 1 << 24
#: The same on a GPU, 512 MiB. A chunk reads the head's whole weight, which only many tokens at a time are worth there.
MAX_LOGITS_GPU = 1 << 27


def num_chunks(tokens: int, vocabulary: int, device: str = "cpu") -> int:
    """Return the number of chunks in which to compute the logits, so that each has at most as many as the device takes.

    ``device`` is the type of the device that computes them.
    """
    tokens_at_a_time = max(1, (MAX_LOGITS_GPU if device == "cuda" else MAX_LOGITS) // vocabulary)
    return max(1, -(-tokens // tokens_at_a_time))


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy in nats, summed over the targets that are not IGNORE_INDEX, float32.

    Args:
        logits: ``(N, V)``, any floating dtype; the loss is computed in float32.
        targets: ``(N,)``, token ids.
    """
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def cross_entropy_each(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    counts: Sequence[int],
    chunks: Callable[[int], int],
) -> Tensor:
    """Return :func:`summed_cross_entropy` of each of several parts of the tokens, ``(parts,)``.

    Args:
        head: maps hidden states ``(n, H)`` to logits ``(n, V)``: of all parts in one call, where their logits may all
            be there at a time.
        hidden: ``(N, H)``.
        targets: ``(N,)``.
        counts: the tokens of each part, one after the other.
        chunks: the number of chunks for so many tokens.
    """
    of_parts = targets.split_with_sizes(list(counts))
    if chunks(len(hidden)) == 1:
        logits = head(hidden).split_with_sizes(list(counts))
        return torch.stack([summed_cross_entropy(*part) for part in zip(logits, of_parts, strict=True)])
    parts = zip(hidden.split_with_sizes(list(counts)), of_parts, strict=True)
    return torch.stack([chunked_cross_entropy(head, h, t, chunks(len(h))) for h, t in parts])


def chunked_cross_entropy(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunks: int) -> Tensor:
    """Return :func:`summed_cross_entropy` of ``head(hidden)``, without materialising all logits at once.

    Args:
        head: maps hidden states ``(n, H)`` to logits ``(n, V)``. With several chunks it runs twice on each.
        hidden: ``(N, H)``.
        targets: ``(N,)``.
        chunks: number of chunks, some of them empty if N is smaller: under ZeRO-3 every process must call the head
            equally often.
    """

    def chunk_loss(chunk: Tensor, chunk_targets: Tensor) -> Tensor:
        return summed_cross_entropy(head(chunk), chunk_targets)

    if chunks == 1:
        return chunk_loss(hidden, targets)
    pieces = zip(hidden.tensor_split(chunks), targets.tensor_split(chunks), strict=True)
    losses = [checkpoint(chunk_loss, chunk, chunk_targets, use_reentrant=False) for chunk, chunk_targets in pieces]
    return torch.stack(losses).sum()
