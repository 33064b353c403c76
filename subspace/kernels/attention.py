"""Row-blocked attention for bfloat16 training on a CPU.

When: on a CPU, in bfloat16, where `model.attention` is `sdpa`, gradients are wanted, and sequences have at most LONGEST
tokens. Otherwise the attention that transformers would have used runs.

Gain: forward and backward, 9 heads that share 3 keys, width 64, 16 rows of 64 and 96 tokens: 5.2 and 9.8 ms instead of
torch's 12.2 and 18.9; 32 heads that share 8 keys, width 128, 4 rows of 128 tokens: 16.5 instead of 32.3. At 256 tokens
it loses, 50.7 instead of 42.0, hence LONGEST; in float32 it gains nothing (`tests/bench/RESULTS.md`).

Why: torch's kernel works through short sequences in blocks of 32 queries, whose products are too small to be fast in
bfloat16, and its backward pass takes many times as long as its forward pass. Here a product covers a few whole rows of
the batch, and the query heads that share keys are stacked into it without repeating the keys. The scores exist for
those rows only, in float32, and are computed again in the backward pass; what is saved is query, key, value and mask.

Not for float16: products are rounded to the dtype before they are scaled, which may leave its range.

Shapes: (B) rows, (b) rows of a block, (T) tokens, (K) keys, (N) query heads, (G) key heads, (S) query heads that share
a key head, so N = G S, (D) width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Its name in transformers' registry of attention functions.
ATTENTION_NAME = "rows_at_a_time"
#: From 192 tokens on torch's kernel uses blocks of 64 queries and is faster.
LONGEST = 191
#: Largest number of scores at a time: 1 MiB of float32, which fits the CPU's cache.
MAX_SCORES = 1 << 18

Attention = Callable[..., tuple[Tensor, Any]]


def row_blocked_attention(
    fallback: Attention,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, Any]:
    """Return the output of attention, ``(B, T, N, D)``, and None in place of its weights; transformers' interface.

    Args:
        fallback: attention used without gradients or when unsupported.
        module: the model's attention layer.
        query: ``(B, N, T, D)``.
        key: ``(B, G, K, D)``.
        value: of key's shape.
        attention_mask: ``(B or 1, N or 1, T, K)``, boolean, True where attended, or a float added to the scores.
        dropout: probability on the attention weights; supported by the fallback only.
        scaling: factor on the scores; None is ``D ** -0.5``.
        is_causal: causal attention where there is no mask; None takes the module's ``is_causal``.
        **more: further arguments of transformers.
    """
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    tokens, keys = query.shape[2], key.shape[2]
    unknown = dropout or any(more.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if not trained or unknown or tokens > LONGEST or key.shape != value.shape or torch.compiler.is_compiling():
        known = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **more}
        return fallback(module, query, key, value, attention_mask, **known)
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        attention_mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril_()[None, None]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = _RowBlocked.apply(query, key, value, attention_mask, scale)  # type: ignore[no-untyped-call]
    return out, None


class _RowBlocked(torch.autograd.Function):
    """Autograd function of attention over blocks of a few rows of the batch.

    Inside a block every tensor is a stack of ``b G`` matrices, one for each row and key head: keys and values
    ``(b G, K, D)``; queries, outputs and their gradients ``(b G, S T, D)``, the S query heads of a key head one below
    the other. That one product then does what S products over repeated keys would do, and the gradients of keys and
    values come out summed over the S heads.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        rows, heads, tokens, width = query.shape
        out = query.new_empty(rows, tokens, heads, width)
        for block in _blocks(query, key):
            q, k, v = (_stacked(tensor[block], key) for tensor in (query, key, value))
            p = _softmax(q, k, _mask_of(mask, block), scale, query.shape).to(q.dtype)  # (b, N, T, K)
            out[block] = (p.view(*q.shape[:2], -1) @ v).view(-1, heads, tokens, width).transpose(1, 2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, mask = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        grad_out = grad_out.transpose(1, 2)  # (B, N, T, D), as the query
        for block in _blocks(query, key):
            q, k, v, grad_o = (_stacked(tensor[block], key) for tensor in (query, key, value, grad_out))
            # Recompute the forward pass up to the weights p = softmax(scale q k^T + mask), (b G, S T, K), float32.
            p = _softmax(q, k, _mask_of(mask, block), ctx.scale, query.shape).view(*q.shape[:2], -1)
            # o = p v, so grad_v = p^T grad_o and grad_p = grad_o v^T.
            grad_value[block] = (p.to(q.dtype).mT @ grad_o).view(value[block].shape)
            grad_p = (grad_o @ v.mT).float()
            # Through the softmax: grad_scores = p (grad_p - sum_K p grad_p), which torch computes in one pass in
            # float32, where the difference of two nearly equal numbers needs it. Masked scores have p = 0, hence no
            # gradient. The scale of scores = scale q k^T is applied here, once for both products below.
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype).mul_(ctx.scale).to(q.dtype)
            grad_query[block] = (grad_scores @ k).view(query[block].shape)
            grad_key[block] = (grad_scores.mT @ q).view(key[block].shape)
        return grad_query, grad_key, grad_value, None, None


def _blocks(query: Tensor, key: Tensor) -> list[slice]:
    """Return the slices of rows to process at a time, so that at most MAX_SCORES scores exist."""
    rows, heads, tokens, _ = query.shape
    count = max(1, MAX_SCORES // (heads * tokens * key.shape[2]))
    return [slice(begin, begin + count) for begin in range(0, rows, count)]


def _stacked(block: Tensor, key: Tensor) -> Tensor:
    """Return ``(b, N or G, T or K, D)`` as ``(b G, S T or K, D)``."""
    return block.reshape(len(block) * key.shape[1], -1, block.shape[-1])


def _mask_of(mask: Tensor | None, block: slice) -> Tensor | None:
    """Return the block's part of a mask, which may be None or shared by all rows."""
    return mask if mask is None or len(mask) == 1 else mask[block]


def _softmax(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, shape: torch.Size) -> Tensor:
    """Return the attention weights of stacked queries and keys, ``(b, N, T, K)``, float32; ``shape`` is the query's."""
    scores = (q @ k.mT).float().view(-1, *shape[1:3], k.shape[1]).mul_(scale)
    if mask is not None:
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)  # not -inf: for padding, all scores may be masked
        else:
            scores.add_(mask)
    return torch.softmax(scores, -1)
