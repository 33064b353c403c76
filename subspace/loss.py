"""The loss of a batch: cross entropy where a token carries a label, and no more of the output head than it needs.

A vocabulary is wide: float32 logits of 4,096 tokens over 128,256 words are 2.1 GB, and a backward pass holds them
three times. Here the head runs on the columns with a label only; where those are many, as with the loss on all
tokens, it runs on a few tokens at a time, and their logits are computed again in the backward pass.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from subspace.encoding import IGNORE

#: Logits that are held at a time: 64 MiB of float32.
AT_ONCE = 1 << 24

#: Stands beside the loss where a model expects logits: a model that scales or bends its logits changes it.
MARK = 96.0

_bent: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # heads whose model changes what comes out of them
_straight: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def summed_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the cross entropy summed over labelled tokens, in nats, of a model or of an engine that holds one."""
    targets = batch["labels"][:, 1:]
    columns = (targets != IGNORE).any(dim=0).nonzero().squeeze(1)
    wanted = targets[:, columns].flatten()
    labelled = (wanted != IGNORE).nonzero().squeeze(1)
    return loss_at(model, batch["input_ids"], batch["attention_mask"], columns, wanted, labelled)


def loss_at(
    model: Any, ids: Tensor, mask: Tensor, columns: Tensor, targets: Tensor, labelled: Tensor, *, sure: bool = False
) -> Tensor:
    """Return the summed cross entropy of ``targets``, which follow the tokens in ``columns``, row by row.

    ``labelled`` are the places of the targets that count. Where the caller is ``sure``, the mark is not looked at.
    """

    def logits() -> Tensor:
        out: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=columns).logits
        return out

    head = getattr(model, "module", model).get_output_embeddings()
    width = getattr(head, "out_features", 0)
    if targets.numel() * width > AT_ONCE and head not in _bent:
        with _ends_in(head, lambda run, hidden: _in_parts(run, hidden, targets, labelled, AT_ONCE // width)):
            loss, mark = logits().unbind()
        if sure or head in _straight or bool(mark == MARK):
            _straight.add(head)
            return loss
        _bent.add(head)
    return _cross_entropy(logits().flatten(0, 1), targets)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")


def _in_parts(
    run: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, labelled: Tensor, tokens: int
) -> Tensor:
    """Return the loss and the mark; ``run`` makes logits of hidden values, ``tokens`` labelled ones at a time."""
    hidden, wanted = hidden.flatten(0, 1)[labelled], targets[labelled]

    def part(some: Tensor, of: Tensor) -> Tensor:
        return _cross_entropy(run(some), of)

    losses = [
        checkpoint(part, some, of, use_reentrant=False)
        for some, of in zip(hidden.split(tokens), wanted.split(tokens), strict=True)  # type: ignore[no-untyped-call]
    ]
    total = torch.stack(losses).sum() if losses else hidden.float().sum()
    return torch.stack([total, torch.full_like(total, MARK)])


@contextlib.contextmanager
def _ends_in(head: nn.Module, ending: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> Iterator[None]:
    """Let the model's head return ``ending`` of itself and its input.

    It happens within the model's own forward pass, because only there does ZeRO-3 hold the head whole.
    """
    run, own = head.forward, vars(head).get("forward")
    head.forward = lambda hidden: ending(run, hidden)
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own
