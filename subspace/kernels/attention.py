"""Attention as training in bfloat16 on a CPU wants it.

torch's kernel there works through short sequences in blocks of 32 queries, whose products are too small to be fast in
it: its backward pass takes many times as long as its forward pass. Here the products are those of a few whole rows
at a time, and query heads that share keys are one product, without repeating the keys. Scores are held for those rows
only, in float32, and computed again in the backward pass; what is saved is query, key and value.
Not for float16: products are rounded to the dtype before they are scaled, which may leave its range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: What it is called among transformers' attentions.
ATTENTION_NAME = "rows_at_a_time"
#: From 192 tokens on torch's kernel takes blocks of 64 queries, and is the faster one.
LONGEST = 191
#: Scores that are held at a time: a megabyte of float32, which caches hold.
MAX_SCORES = 1 << 18

Attention = Callable[..., tuple[Tensor, Any]]


def row_blocked_attention(
    otherwise: Attention,
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
    """Return what attention makes, ``(rows, tokens, heads, width)``, and None; for transformers to call.

    Args:
        otherwise: the attention to take where gradients are not wanted, or this one does not apply.
        module: the model's.
        query: ``(rows, heads, tokens, width)``.
        key: ``(rows, key heads, keys, width)``.
        value: of key's shape.
        attention_mask: ``(rows or 1, heads or 1, tokens, keys)``, True where seen or else to be added to the scores.
        dropout: of the scores' softmax.
        scaling: of the scores; None is one over the root of the width.
        is_causal: without a mask, a token sees none that follow; None is as the module says.
        **more: what else transformers has to say.
    """
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    tokens, keys = query.shape[2], key.shape[2]
    unknown = dropout or any(more.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if not trained or unknown or tokens > LONGEST or key.shape != value.shape or torch.compiler.is_compiling():
        known = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **more}
        return otherwise(module, query, key, value, attention_mask, **known)
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        attention_mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril_()[None, None]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = _Rows.apply(query, key, value, attention_mask, scale)  # type: ignore[no-untyped-call]
    return out, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        rows, heads, tokens, width = query.shape
        out = query.new_empty(rows, tokens, heads, width)
        for some in _few(query, key):
            q, k, v = (_together(tensor[some], key) for tensor in (query, key, value))
            seen = _softmax(q, k, _of(mask, some), scale, query.shape).to(q.dtype)
            out[some] = (seen.view(*q.shape[:2], -1) @ v).view(-1, heads, tokens, width).transpose(1, 2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, mask = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        grad_out = grad_out.transpose(1, 2)
        for some in _few(query, key):
            q, k, v, of = (_together(tensor[some], key) for tensor in (query, key, value, grad_out))
            p = _softmax(q, k, _of(mask, some), ctx.scale, query.shape).view(*q.shape[:2], -1)
            grad_value[some] = (p.to(q.dtype).mT @ of).view(value[some].shape)
            grad_p = (of @ v.mT).float()
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype).mul_(ctx.scale).to(q.dtype)
            grad_query[some] = (grad_scores @ k).view(query[some].shape)
            grad_key[some] = (grad_scores.mT @ q).view(key[some].shape)
        return grad_query, grad_key, grad_value, None, None


def _few(query: Tensor, key: Tensor) -> list[slice]:
    """Return the rows to work on at a time."""
    rows, heads, tokens, _ = query.shape
    count = max(1, MAX_SCORES // (heads * tokens * key.shape[2]))
    return [slice(begin, begin + count) for begin in range(0, rows, count)]


def _together(some: Tensor, key: Tensor) -> Tensor:
    """Return ``(rows * key heads, heads that share a key * tokens, width)``."""
    return some.reshape(len(some) * key.shape[1], -1, some.shape[-1])


def _of(mask: Tensor | None, some: slice) -> Tensor | None:
    return mask if mask is None or len(mask) == 1 else mask[some]


def _softmax(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, shape: torch.Size) -> Tensor:
    """Return how much each query sees of each key, float32, ``(rows, heads, tokens, keys)``."""
    scores = (q @ k.mT).float().view(-1, *shape[1:3], k.shape[1]).mul_(scale)
    if mask is not None:
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)  # and not -inf: padding may see nothing at all
        else:
            scores.add_(mask)
    return torch.softmax(scores, -1)
