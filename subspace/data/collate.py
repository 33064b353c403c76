"""Padding and packing of token rows into the tensors of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that carries no loss."""


class TokenRow(NamedTuple):
    """Token ids of a row, and which of them carry loss where not all do.

    Attributes:
        input_ids: with the end token.
        answer_start: the index of the first token that carries loss.
        spans: the first token of each part that carries loss, and the one behind it; without any, all from
            ``answer_start`` on do.
    """

    input_ids: list[int]
    answer_start: int
    spans: tuple[tuple[int, int], ...] = ()


def trained_spans(row: TokenRow, loss_on: str) -> list[tuple[int, int]]:
    """Return the first token of each part that carries loss, and the one behind it."""
    if loss_on == "all":  # a row's first token has none before it to be predicted from
        return [(1, len(row.input_ids))]
    return list(row.spans) or [(row.answer_start, len(row.input_ids))]


@dataclass(frozen=True)
class Sequences:
    """The bounds of the rows in a batch of one sequence, as flash attention takes them.

    ``starts``, ``(rows + 1,)``, int32, has the index of each row's first token and the number of all tokens; padding
    counts as rows. ``longest`` is the number of tokens of the longest row.
    """

    starts: Tensor
    longest: int


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Whatever depends on the tokens' values, so also every shape, is computed before it is copied.

    A GPU that is asked for the value of a tensor, or for a shape that depends on values, has to finish all its work
    first. So counts are Python's numbers, and the places of the labels are given instead of the labels.

    Shapes: (B) sequences, (T) tokens of each with its padding, (C) columns in which any sequence has a label, (N)
    labelled tokens. All are int64.

    Attributes:
        input_ids: ``(B, T)``.
        attention_mask: ``(B, T)``, 1 for tokens and 0 for padding, which is on the right.
        columns: ``(C,)``, the columns of ``input_ids`` that are followed by a label in some sequence.
        targets: ``(B * C,)``, what follows the tokens of these columns, sequence by sequence, or IGNORE_INDEX.
        labelled: ``(N,)``, where ``targets`` is not IGNORE_INDEX.
        num_tokens: tokens without padding.
        position_ids: ``(B, T)`` for packed rows, else None. They restart with each row and with the padding.
        sequences: the bounds of the rows in a single sequence, if they were asked for.
    """

    input_ids: Tensor
    attention_mask: Tensor
    columns: Tensor
    targets: Tensor
    labelled: Tensor
    num_tokens: int
    position_ids: Tensor | None = None
    sequences: Sequences | None = None

    @property
    def num_labelled(self) -> int:
        """The number of tokens with loss."""
        return len(self.labelled)

    @classmethod
    def from_labels(cls, tensors: Mapping[str, Tensor], *, one_sequence: bool = False) -> Self:
        """Return the batch of tensors as :func:`collate` returns them. Reads values.

        With ``one_sequence``, packed rows are put one after another into a single sequence, and the bounds of the rows
        in a single sequence are given.
        """
        input_ids, labels, position_ids = tensors["input_ids"], tensors["labels"], tensors.get("position_ids")
        sequences = None
        if position_ids is not None and one_sequence:
            input_ids, labels, position_ids = (t.reshape(1, -1) for t in (input_ids, labels, position_ids))
        if len(input_ids) == 1 and one_sequence:
            sequences = _find_sequences(input_ids.shape[1], position_ids)
        targets = labels[:, 1:]  # a token's target is the next token
        columns = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
        targets = targets[:, columns].flatten()
        return cls(
            input_ids=input_ids,
            attention_mask=tensors["attention_mask"],
            columns=columns,
            targets=targets,
            labelled=(targets != IGNORE_INDEX).nonzero().squeeze(1),
            num_tokens=int(tensors["attention_mask"].sum()),
            position_ids=position_ids,
            sequences=sequences,
        )

    def pinned(self) -> Self:
        """Return the batch in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._with_each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Self:
        bounds = self.sequences
        return replace(
            self,
            input_ids=change(self.input_ids),
            attention_mask=change(self.attention_mask),
            columns=change(self.columns),
            targets=change(self.targets),
            labelled=change(self.labelled),
            position_ids=None if self.position_ids is None else change(self.position_ids),
            sequences=None if bounds is None else replace(bounds, starts=change(bounds.starts)),
        )


@dataclass(frozen=True)
class JoinedBatch:
    """The micro-batches of several runs in one, each run's sequences after the other's.

    Attributes:
        batch: all of them.
        rows: sequences of each.
        labelled: tokens with loss of each.
    """

    batch: Batch
    rows: tuple[int, ...]
    labelled: tuple[int, ...]

    def to(self, device: torch.device) -> Self:
        """Return them on a device."""
        return replace(self, batch=self.batch.to(device))


def join_batches(batches: Sequence[Batch]) -> JoinedBatch:
    """Return batches that are in CPU memory as one, padded on the right to the longest sequence. Reads values."""
    import torch
    from torch.nn.functional import pad

    longest = max(batch.input_ids.shape[1] for batch in batches)
    columns = torch.unique(torch.cat([batch.columns for batch in batches]))
    targets, positions = [], []
    for batch in batches:
        rows, tokens = batch.input_ids.shape
        own = torch.full((rows, len(columns)), IGNORE_INDEX)
        own[:, torch.searchsorted(columns, batch.columns)] = batch.targets.view(rows, -1)
        targets.append(own.flatten())
        if batch.position_ids is not None:
            padding = torch.arange(longest - tokens).expand(rows, -1)  # rows of their own, as collate has them
            positions.append(torch.cat([batch.position_ids, padding], dim=1))
    wide = [[pad(t, (0, longest - t.shape[1])) for t in (b.input_ids, b.attention_mask)] for b in batches]
    ids, mask = (torch.cat(parts) for parts in zip(*wide, strict=True))
    target = torch.cat(targets)
    joined = Batch(
        input_ids=ids,
        attention_mask=mask,
        columns=columns,
        targets=target,
        labelled=(target != IGNORE_INDEX).nonzero().squeeze(1),
        num_tokens=sum(batch.num_tokens for batch in batches),
        position_ids=torch.cat(positions) if positions else None,
    )
    return JoinedBatch(joined, tuple(len(b.input_ids) for b in batches), tuple(b.num_labelled for b in batches))


def collate(
    batch: Sequence[TokenRow], pad_id: int, loss_on: str = "answers", pad_to_multiple: int = 8, room: int | None = None
) -> dict[str, Tensor]:
    """Return ``input_ids``, ``attention_mask`` and ``labels``, int64 ``(sequences, tokens)``, padded on the right.

    Padding is masked by position, so ``pad_id`` may occur in the text too. With ``room``, rows are packed one after
    another into sequences of at most that many tokens, and ``position_ids``, which restart with each row and with the
    padding, are returned as well.
    """
    import torch

    sequences = [[row] for row in batch] if room is None else pack_rows(batch, room)
    longest = max(sum(len(row.input_ids) for row in sequence) for sequence in sequences)
    shape = (len(sequences), -(-longest // pad_to_multiple) * pad_to_multiple)
    # In NumPy, whose small assignments take a fraction of the time of torch's.
    ids, labels = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
    mask, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for i, sequence in enumerate(sequences):
        begin = 0
        for row in sequence:
            end = begin + len(row.input_ids)
            ids[i, begin:end] = row.input_ids
            mask[i, begin:end] = 1
            for start, stop in trained_spans(row, loss_on):
                labels[i, begin + start : begin + stop] = ids[i, begin + start : begin + stop]
            positions[i, begin:end] = np.arange(end - begin)
            begin = end
        positions[i, begin:] = np.arange(shape[1] - begin)
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if room is not None:
        arrays["position_ids"] = positions
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def pack_rows(rows: Sequence[TokenRow], room: int) -> list[list[TokenRow]]:
    """Return sequences of rows of at most ``room`` tokens: longest first, each in the first sequence it fits into."""
    sequences: list[list[TokenRow]] = []
    left: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        size = len(row.input_ids)
        at = next((i for i, free in enumerate(left) if size <= free), len(left))
        if at == len(left):
            sequences.append([])
            left.append(room)
        sequences[at].append(row)
        left[at] -= size
    return sequences


def _find_sequences(tokens: int, position_ids: Tensor | None) -> Sequences:
    """Return the bounds of the rows in one sequence, each of which begins at position 0; one row without positions."""
    import torch

    begins = [0] if position_ids is None else (position_ids[0] == 0).nonzero().squeeze(1).tolist()
    starts = [*begins, tokens]
    longest = max(end - begin for begin, end in pairwise(starts))
    return Sequences(torch.tensor(starts, dtype=torch.int32), longest)
