"""Padding and packing of token rows into the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that carries no loss."""


class TokenRow(NamedTuple):
    """Token ids of prompt and answer, and the index of the answer's first token."""

    input_ids: list[int]
    answer_start: int


def collate(
    batch: Sequence[TokenRow], pad_id: int, loss_on: str = "answer", pad_to_multiple: int = 8, room: int | None = None
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
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    mask, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for i, sequence in enumerate(sequences):
        begin = 0
        for row in sequence:
            end = begin + len(row.input_ids)
            # A row's first token has none before it to be predicted from.
            start = begin + (1 if loss_on == "all" else row.answer_start)
            ids[i, begin:end] = torch.tensor(row.input_ids)
            mask[i, begin:end] = 1
            labels[i, start:end] = ids[i, start:end]
            positions[i, begin:end] = torch.arange(end - begin)
            begin = end
        positions[i, begin:] = torch.arange(shape[1] - begin)
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return tensors if room is None else {**tensors, "position_ids": positions}


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
