"""Greedy decoding of a batch, with as few passes over as few tokens as give the same text."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subspace.data.tokenization import common_prefix_length
from subspace.distributed.collectives import all_reduce_sum
from subspace.distributed.zero import requires_synchronized_forward
from subspace.models.lm_head import lm_head_on_positions


@dataclass(frozen=True)
class SharedPrefix:
    """What prompts begin with, ``ids``, and a model's keys and values of it in one row."""

    ids: list[int]
    cache: Any

    def rows(self, count: int) -> Any:
        """Return keys and values for so many rows to go on from."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(count)
        return cache


def prefill_shared_prefix(model: nn.Module, prompts: Sequence[Sequence[int]]) -> SharedPrefix | None:
    """Let a model read what all prompts begin with; None where nothing is to be gained.

    Under ZeRO-3 a pass gathers all weights, which costs more than it saves.
    """
    count = min(common_prefix_length(prompts), min(map(len, prompts)) - 1) if len(prompts) > 1 else 0
    if not count or requires_synchronized_forward(model):
        return None
    ids = torch.tensor([prompts[0][:count]], device=next(model.parameters()).device)
    return SharedPrefix([*prompts[0][:count]], _read(model, ids, torch.ones_like(ids), None, 1)[1])


def decode_greedily(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    finished: Callable[[list[int]], bool],
    max_new_tokens: int,
    *,
    prefix: SharedPrefix | None = None,
    draft: Sequence[int] = (),
    fixed: bool = False,
) -> list[list[int]]:
    """Return what the model writes after each prompt. The prompts are one batch, padded on the left.

    A draft is read behind each prompt, in the same pass, and a row keeps as much of it as the model writes there
    itself: all of it at the price of one token, and the same text as without (Leviathan et al., arXiv:2211.17192, for a
    greedy model). Under ZeRO-3 every process makes as many passes as the one that has most to write.

    Args:
        model: the model.
        prompts: token ids.
        finished: tells by what a row has written, the last token included, whether it is at its end.
        max_new_tokens: where a row ends at the latest.
        prefix: what this model, as it is now, has read of all prompts.
        draft: token ids that an answer may well begin with.
        fixed: whether a row's place in the batch means something, as where rows are several subjects'. Then none leaves
            before the end.
    """
    device = next(model.parameters()).device
    together = requires_synchronized_forward(model)
    cache, shared = (prefix.rows(len(prompts)), len(prefix.ids)) if prefix else (None, 0)
    texts = [[*prompt[shared:], *draft] for prompt in prompts]
    padding = [max(map(len, texts)) - len(text) for text in texts]
    ids = torch.tensor([[0] * pad + text for pad, text in zip(padding, texts, strict=True)], device=device)
    mask = torch.tensor(
        [[1] * shared + [0] * pad + [1] * len(text) for pad, text in zip(padding, texts, strict=True)], device=device
    )
    guess = torch.tensor(draft, dtype=torch.long, device=device)
    written: list[list[int]] = [[] for _ in prompts]
    rows, over = list(range(len(prompts))), set[int]()

    while True:
        tokens, cache = _read(model, ids, mask, cache, len(guess) + 1)
        right = (tokens[:, :-1] == guess).cumprod(1)
        mask[:, mask.shape[1] - len(guess) :] *= right  # what was guessed wrong is never looked at
        for row, several, kept in zip(rows, tokens.tolist(), right.sum(1).tolist(), strict=True):
            for token in several[: kept + 1]:
                if row not in over:
                    written[row].append(token)
                    if finished(written[row]) or len(written[row]) == max_new_tokens:
                        over.add(row)

        going_on = [i for i, row in enumerate(rows) if row not in over]
        left = len(going_on) if not together else int(all_reduce_sum(torch.tensor(len(going_on), device=device)))
        if not left:
            return written
        ids = tokens.gather(1, right.sum(1, keepdim=True))
        guess = guess[:0]
        if not fixed and 0 < len(going_on) < len(rows):
            rows = [rows[i] for i in going_on]
            stay = torch.tensor(going_on, device=device)
            ids, mask = ids[stay], mask[stay]
            cache.batch_select_indices(stay)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def _read(model: nn.Module, ids: Tensor, mask: Tensor, cache: Any, last: int) -> tuple[Tensor, Any]:
    """Let the model read on; return which token it holds for likeliest after each of the last ones, and the cache.

    ``ids`` are ``(rows, tokens)``, ``mask`` ``(rows, tokens read before + tokens)``; returned are ``(rows, last)``.
    """
    rows, width = ids.shape
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
    places = torch.arange(rows * width, device=ids.device).view(rows, width)[:, -last:].flatten()
    with lm_head_on_positions(model, places):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return out.logits[0].argmax(-1).view(rows, last), out.past_key_values
