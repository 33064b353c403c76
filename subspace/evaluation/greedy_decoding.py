"""Greedy decoding of a batch, with a shared prefix cache and speculative decoding of a fixed draft."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subspace.adapters.virtual_tokens import num_virtual_tokens
from subspace.data.tokenization import common_prefix_length
from subspace.distributed.collectives import all_reduce_sum
from subspace.distributed.zero import requires_synchronized_forward
from subspace.evaluation.finite import NonFiniteOutput
from subspace.models.lm_head import lm_head_on_positions
from subspace.models.transformers_compat import attention_window

NOT_FINITE = -1


@dataclass(frozen=True)
class SharedPrefix:
    """Common token prefix of prompts, ``ids``, and its key-value cache with one row."""

    ids: list[int]
    cache: Any

    def rows(self, count: int) -> Any:
        """Return a copy of the cache, repeated for ``count`` rows."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(count)
        return cache


def prefill_shared_prefix(model: nn.Module, prompts: Sequence[Sequence[int]]) -> SharedPrefix | None:
    """Return the prefilled common prefix of all prompts, or None if that saves nothing.

    Under ZeRO-3 it does not: a pass gathers all weights, which costs more than the prefix saves.
    """
    count = min(common_prefix_length(prompts), min(map(len, prompts)) - 1) if len(prompts) > 1 else 0
    if not count or requires_synchronized_forward(model):
        return None
    ids = torch.tensor([prompts[0][:count]], device=next(model.parameters()).device)
    return SharedPrefix([*prompts[0][:count]], _forward(model, ids, torch.ones_like(ids), None, 1)[1])


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
    """Return the token ids that the model generates after each prompt. The prompts are one batch, padded on the left.

    The draft is appended to each prompt in the first pass, and a row accepts the part of it that greedy decoding
    generates as well: up to the whole draft for the price of one pass, and the same text as without it (Leviathan et
    al., arXiv:2211.17192, for greedy decoding). Under ZeRO-3 every process makes as many passes as the one that
    generates longest.

    Where a text may become longer than the model's sliding window, neither prefix nor draft is used: the window counts
    places, and padding in the middle of a row would take some.

    Args:
        model: a causal language model.
        prompts: the token ids of each prompt.
        finished: returns True if a row is complete, given the tokens generated so far.
        max_new_tokens: the maximum number of generated tokens a row.
        prefix: result of ``prefill_shared_prefix`` for this model, unchanged since, and these prompts.
        draft: token ids that an answer is likely to begin with.
        fixed: keep finished rows in the batch until the end, because the model treats rows by their index (adapters of
            several subjects).

    Raises:
        NonFiniteOutput: the logits after an unfinished row are NaN or infinite.
    """
    device = next(model.parameters()).device
    synchronized = requires_synchronized_forward(model)
    if _may_pass_the_window(model, max(map(len, prompts)) + len(draft) + max_new_tokens):
        # Padding behind the shared prefix and rejected draft tokens would take places of the window.
        prefix, draft = None, ()
    cache, shared = (prefix.rows(len(prompts)), len(prefix.ids)) if prefix else (None, 0)
    texts = [[*prompt[shared:], *draft] for prompt in prompts]
    padding = [max(map(len, texts)) - len(text) for text in texts]
    ids = torch.tensor([[0] * pad + text for pad, text in zip(padding, texts, strict=True)], device=device)
    mask = torch.tensor(
        [[1] * shared + [0] * pad + [1] * len(text) for pad, text in zip(padding, texts, strict=True)], device=device
    )
    guess = torch.tensor(draft, dtype=torch.long, device=device)
    written: list[list[int]] = [[] for _ in prompts]
    rows, complete = list(range(len(prompts))), set[int]()

    while True:
        tokens, cache = _forward(model, ids, mask, cache, len(guess) + 1)
        accepted = (tokens[:, :-1] == guess).cumprod(1)
        mask[:, mask.shape[1] - len(guess) :] *= accepted  # rejected draft tokens are never attended to
        for row, new_tokens, num_accepted in zip(rows, tokens.tolist(), accepted.sum(1).tolist(), strict=True):
            for token in new_tokens[: num_accepted + 1]:
                if row not in complete:
                    if token == NOT_FINITE:
                        raise NonFiniteOutput(row)
                    written[row].append(token)
                    if finished(written[row]) or len(written[row]) == max_new_tokens:
                        complete.add(row)

        active = [i for i, row in enumerate(rows) if row not in complete]
        num_active = len(active)
        if synchronized:
            num_active = int(all_reduce_sum(torch.tensor(num_active, device=device)))
        if not num_active:
            return written
        ids = tokens.gather(1, accepted.sum(1, keepdim=True)).clamp(min=0)  # a finished row's may be NOT_FINITE
        guess = guess[:0]
        if not fixed and 0 < len(active) < len(rows):
            rows = [rows[i] for i in active]
            indices = torch.tensor(active, device=device)
            ids, mask = ids[indices], mask[indices]
            cache.batch_select_indices(indices)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def _may_pass_the_window(model: Any, tokens: int) -> bool:
    """Return True if a token of a text this long may not see all that is before it."""
    window = attention_window(model.config)
    return window is not None and tokens + num_virtual_tokens(model) > window


def _forward(model: nn.Module, ids: Tensor, mask: Tensor, cache: Any, last: int) -> tuple[Tensor, Any]:
    """Return the argmax token after each of the last ``last`` positions, and the extended cache.

    Where the largest logit is NaN or infinite the token is ``NOT_FINITE``, so that telling needs no read of its own.

    Shapes: ``ids`` ``(rows, tokens)``, ``mask`` ``(rows, cached tokens + tokens)``, result ``(rows, last)``.
    """
    rows, width = ids.shape
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
    indices = torch.arange(rows * width, device=ids.device).view(rows, width)[:, -last:].flatten()
    with lm_head_on_positions(model, indices):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    largest, tokens = out.logits[0].max(-1)  # NaN is the largest of all
    return tokens.where(largest.isfinite(), NOT_FINITE).view(rows, last), out.past_key_values
