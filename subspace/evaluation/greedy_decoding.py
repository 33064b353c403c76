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
from subspace.errors import UserError
from subspace.evaluation.finite import NonFiniteOutput
from subspace.models.context import attention_window, has_recurrent_layers, rotation_limit
from subspace.models.lm_head import lm_head_on_positions

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

    Under ZeRO-3 it does not: a pass gathers all weights, which costs more than the prefix saves. Recurrent layers would
    read the padding behind it.
    """
    if has_recurrent_layers(model):
        return None
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
    places, and padding in the middle of a row would take some. Nor with recurrent layers, which cannot take back what
    they have read. Texts whose rotary positions may depend on the longest of a batch are read alone and anew for each
    token, the only way in which what they say does not depend on what was cached.

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
        UserError: rows are to be read alone, but the model is sharded or ``fixed``.
    """
    limited = _may_pass_the_window(model, max(map(len, prompts)) + len(draft) + max_new_tokens)
    if limited or has_recurrent_layers(model):
        prefix, draft = None, ()
    alone = _to_read_alone(model, prompts, max_new_tokens)
    if alone and (fixed or requires_synchronized_forward(model)):
        raise UserError(
            f"a text of {max(len(prompts[row]) for row in alone)} tokens is to be continued, where this model's "
            "positions depend on the longest text of a batch, so that it must be read alone. Score with "
            "evaluate.batch_adapters=false and without evaluate.engine"
        )
    done = {row: _decode_alone(model, prompts[row], finished, max_new_tokens, row) for row in alone}
    if rest := [row for row in range(len(prompts)) if row not in done]:
        try:
            written = _decode_batch(
                model, [prompts[row] for row in rest], finished, max_new_tokens, prefix, draft, fixed
            )
        except NonFiniteOutput as error:
            raise NonFiniteOutput(rest[error.index]) from None
        done |= zip(rest, written, strict=True)
    return [done[row] for row in range(len(prompts))]


def _decode_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    finished: Callable[[list[int]], bool],
    max_new_tokens: int,
    prefix: SharedPrefix | None,
    draft: Sequence[int],
    fixed: bool,
) -> list[list[int]]:
    """Return what ``decode_greedily`` does, of prompts that can be one batch."""
    device = next(model.parameters()).device
    synchronized = requires_synchronized_forward(model)
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


def _to_read_alone(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """Return the rows whose positions may come to depend on the longest text of a batch."""
    limit = rotation_limit(model.config)
    if limit is None:
        return []
    longest = limit - max_new_tokens - num_virtual_tokens(model)
    return [row for row, prompt in enumerate(prompts) if len(prompt) > longest]


def _decode_alone(
    model: nn.Module, prompt: Sequence[int], finished: Callable[[list[int]], bool], max_new_tokens: int, row: int
) -> list[int]:
    """Return the token ids that the model generates after a prompt, reading the whole text anew for each."""
    written: list[int] = []
    device = next(model.parameters()).device
    while not written or not (finished(written) or len(written) == max_new_tokens):
        ids = torch.tensor([[*prompt, *written]], device=device)
        token = int(_forward(model, ids, torch.ones_like(ids), None, 1, cached=False)[0])
        if token == NOT_FINITE:
            raise NonFiniteOutput(row)
        written.append(token)
    return written


def _may_pass_the_window(model: Any, tokens: int) -> bool:
    """Return True if a token of a text this long may not see all that is before it."""
    window = attention_window(model.config)
    return window is not None and tokens + num_virtual_tokens(model) > window


def _forward(
    model: nn.Module, ids: Tensor, mask: Tensor, cache: Any, last: int, *, cached: bool = True
) -> tuple[Tensor, Any]:
    """Return the argmax token after each of the last ``last`` positions, and the extended cache.

    Where the largest logit is NaN or infinite the token is ``NOT_FINITE``, so that telling needs no read of its own.

    Shapes: ``ids`` ``(rows, tokens)``, ``mask`` ``(rows, cached tokens + tokens)``, result ``(rows, last)``.
    """
    rows, width = ids.shape
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
    indices = torch.arange(rows * width, device=ids.device).view(rows, width)[:, -last:].flatten()
    with lm_head_on_positions(model, indices):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=cached)
    largest, tokens = out.logits[0].max(-1)  # NaN is the largest of all
    return tokens.where(largest.isfinite(), NOT_FINITE).view(rows, last), out.past_key_values
