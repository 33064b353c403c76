"""The loss of a batch: cross entropy where a token carries a label, and no more of the output head than it needs.

A vocabulary is wide: float32 logits of 4,096 tokens over 128,256 words are 2.1 GB, and a backward pass holds them
three times. Here the head runs on the labelled tokens only; where those are many, as with the loss on all tokens, it
runs on a few of them at a time, and their logits are computed again in the backward pass.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from subspace.data.collate import IGNORE_INDEX
from subspace.distributed.collectives import gather_objects
from subspace.distributed.zero import is_sharded

#: Logits that are held at a time: 64 MiB of float32.
MAX_LOGITS = 1 << 24

#: Stands beside the loss where a model expects logits: a model that scales or bends its logits changes it.
MARK = 96.0

_bent: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # heads whose model changes what comes out of them
_straight: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def summed_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the cross entropy summed over labelled tokens, in nats, of a model or of an engine that holds one."""
    ids, labels, positions = batch["input_ids"], batch["labels"], batch.get("position_ids")
    mask: Tensor | None = batch["attention_mask"]
    if positions is not None:
        # Packed rows. That they do not see each other, transformers takes from positions that begin again, if no mask
        # says otherwise; for flash attention only where all stand in one sequence.
        mask = None
        if getattr(model, "module", model).config._attn_implementation.startswith("flash"):
            ids, labels, positions = (tensor.reshape(1, -1) for tensor in (ids, labels, positions))
    targets = labels[:, 1:]
    columns = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    wanted = targets[:, columns].flatten()
    labelled = (wanted != IGNORE_INDEX).nonzero().squeeze(1)
    return loss_at(model, ids, mask, columns, wanted, labelled, positions=positions)


def loss_at(
    model: Any,
    ids: Tensor,
    mask: Tensor | None,
    columns: Tensor,
    targets: Tensor,
    labelled: Tensor,
    *,
    positions: Tensor | None = None,
    sure: bool = False,
) -> Tensor:
    """Return the summed cross entropy of ``targets``, which follow the tokens in ``columns``, row by row.

    ``labelled`` are the places of the targets that count. Where the caller is ``sure``, the mark is not looked at.
    """
    where = {"attention_mask": mask, "position_ids": positions}

    def logits() -> Tensor:
        out: Tensor = model(input_ids=ids, **where, use_cache=False, logits_to_keep=columns).logits
        return out

    head = getattr(model, "module", model).get_output_embeddings()
    width = getattr(head, "out_features", 0)
    if width and head not in _bent:
        parts = max(1, -(-len(labelled) // max(1, MAX_LOGITS // width)))
        if any(is_sharded(tensor) for inside in head.children() for tensor in inside.parameters()):
            # The frozen head inside an adapter is gathered for each part, which all processes must do equally often.
            parts = max(gather_objects(parts))
        with _ends_in(head, lambda run, hidden: _in_parts(run, hidden, targets, labelled, parts)):
            loss, mark = logits().unbind()
        if sure or head in _straight or bool(mark == MARK):
            _straight.add(head)
            return loss
        _bent.add(head)
    return _cross_entropy(logits().flatten(0, 1), targets)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def _in_parts(run: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, labelled: Tensor, parts: int) -> Tensor:
    """Return the loss and the mark; ``run`` makes logits of hidden values, of the labelled ones in so many parts."""
    hidden, wanted = hidden.flatten(0, 1)[labelled], targets[labelled]

    def part(some: Tensor, of: Tensor) -> Tensor:
        return _cross_entropy(run(some), of)

    if parts == 1:
        total = part(hidden, wanted)
    else:
        pieces = zip(hidden.tensor_split(parts), wanted.tensor_split(parts), strict=True)
        total = torch.stack([checkpoint(part, some, of, use_reentrant=False) for some, of in pieces]).sum()
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


@contextmanager
def lm_head_on_positions(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Let the output head see only these places of the flattened batch: logits become ``(1, len(places), vocabulary)``.

    A hook, and not a call of decoder and head by hand, so that what a model does to its logits (soft caps) stays done.
    """

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].flatten(0, 1)[places][None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()
