"""Score the choices of an item, each by the log-probability of its text after the context.

The definition is lm-evaluation-harness's (0.4.13): the sum over the choice's tokens. What differs is how it is
computed. The choices of an item mostly begin alike, so an item is read as one row, a tree of depth one: the
common beginning once, then what each choice adds. A 4-d attention mask lets a choice see the beginning and itself,
and its positions go on from the beginning's, so every token sees exactly what it would see if its choice stood alone.
The output head runs only where a token is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from subspace.data.tokenization import common_prefix_length
from subspace.errors import UserError
from subspace.models.lm_head import lm_head_on_positions
from subspace.models.transformers_compat import attention_kernel


def can_score_as_tree(config: Any, longest: int) -> bool:
    """Return True if a model reads texts of up to ``longest`` tokens as trees.

    That rests on a 4-d mask, which only these kernels take, and which takes the place of a sliding window.
    """
    sliding = getattr(config, "sliding_window", None)
    return attention_kernel(config) in ("sdpa", "eager") and (sliding is None or longest <= sliding)


@dataclass(frozen=True)
class ScoringRow:
    """What the model reads of an item in one row, and where its choices are scored.

    ``branches[i]`` is 0 where token i belongs to the common beginning, else the number of the only choice that sees it.
    ``reads[c]`` are the tokens whose outputs predict ``targets[c]``, the tokens of choice c.
    """

    ids: list[int]
    positions: list[int]
    branches: list[int]
    reads: list[list[int]]
    targets: list[list[int]]


def build_scoring_rows(choices: Sequence[tuple[list[int], int]], window: int, *, share: bool) -> list[ScoringRow]:
    """Lay an item out: as one row whose choices share their beginning, or as one row a choice.

    Args:
        choices: each choice's token ids, and how many of them belong to the context.
        window: the most tokens that the model reads at once. A longer text loses its beginning, as in the harness.
        share: whether the choices may share a row.
    """
    sequences = [_cut(ids, num_context, window) for ids, num_context in choices]
    return [_tree(sequences)] if share else [_tree([sequence]) for sequence in sequences]


def _cut(ids: list[int], num_context: int, window: int) -> tuple[list[int], list[int]]:
    """Return what is read and what is predicted. The last token is predicted, but never read."""
    targets = ids[num_context:]
    if not targets or not num_context:
        raise UserError("a choice was to be scored whose context or continuation has no token: likelihood needs both")
    if len(targets) > window:
        raise UserError(
            f"a choice of {len(targets)} tokens was to be scored, but the model reads only {window} at once"
        )
    return ids[-(window + 1) : -1], targets


def _tree(sequences: Sequence[tuple[list[int], list[int]]]) -> ScoringRow:
    inputs = [ids for ids, _ in sequences]
    shared = common_prefix_length(inputs)

    row = ScoringRow(inputs[0][:shared], list(range(shared)), [0] * shared, [], [])
    for choice, (ids, targets) in enumerate(sequences, start=1):
        # What choice adds stands behind what the choices before it added.
        moved = len(row.ids) - shared
        read = range(len(ids) - len(targets), len(ids))
        row.reads.append([i if i < shared else i + moved for i in read])
        row.targets.append(targets)
        row.ids.extend(ids[shared:])
        row.positions.extend(range(shared, len(ids)))
        row.branches.extend([choice] * (len(ids) - shared))
    return row


class Choices:
    """The choices of items, laid out as rows.

    Attributes:
        truncated: how many items have a choice that the model cannot read whole.
        sizes: for each item how many rows it is in a batch, and how many tokens the longest of them has.
    """

    def __init__(self, model: nn.Module, choices: Sequence[Sequence[tuple[list[int], int]]]) -> None:
        """Lay them out; given are each item's choices, each as its token ids and how many are the context's."""
        config: Any = model.config
        window = config.max_position_embeddings
        longest = max(len(ids) for item in choices for ids, _ in item)
        self.truncated = sum(any(len(ids) > window + 1 for ids, _ in item) for item in choices)
        self.rows = [build_scoring_rows(item, window, share=can_score_as_tree(config, longest)) for item in choices]
        self.sizes = [(len(rows), max(len(row.ids) for row in rows)) for rows in self.rows]

    def scores(self, model: nn.Module, batch: Sequence[int]) -> list[list[float]]:
        """Return the log-probability of every choice of the items of these numbers, in one forward pass."""
        rows = iter(score_choices(model, [row for number in batch for row in self.rows[number]]))
        # An item's choices are in one row, or in a row each.
        return [list(chain.from_iterable(islice(rows, len(self.rows[number])))) for number in batch]


def score_choices(model: nn.Module, rows: Sequence[ScoringRow]) -> list[list[float]]:
    """Return the log-probability of every choice of every row. The rows are one batch, padded on the right."""
    device = next(model.parameters()).device
    length = max(len(row.ids) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        values = [getattr(row, name) for row in rows]
        return torch.tensor([v + [fill] * (length - len(v)) for v in values], device=device)

    branches = padded("branches", -1)
    context: dict[str, Tensor] = {}
    if (branches > 1).any():
        context = {"attention_mask": _tree_mask(branches, model.config), "position_ids": padded("positions", 0)}
    # Else every token sees all that stand before it, and no token sees the padding, which stands behind all: without a
    # mask the attention kernels leave out what is not seen, half of it.

    # For each scored token: the choice it belongs to, where in the flattened batch it is predicted, and what it is.
    owners: list[int] = []
    reads: list[int] = []
    targets: list[int] = []
    num_choices = 0
    for number, row in enumerate(rows):
        for of_choice, tokens in zip(row.reads, row.targets, strict=True):
            owners += [num_choices] * len(tokens)
            reads += [number * length + read for read in of_choice]
            targets += tokens
            num_choices += 1
    owner, read, target = torch.tensor([owners, reads, targets], device=device)
    # Tokens of several choices may be predicted at one place, the last of what they share: its logits are taken once.
    places, place = torch.unique(read, return_inverse=True)

    with lm_head_on_positions(model, places):
        logits = model(input_ids=padded("ids", 0), use_cache=False, **context).logits[0]
    # A few rows at a time stay in a CPU's caches.
    several = logits.split(8 if device.type == "cpu" else 1024)
    normalizers = torch.cat([some.float().logsumexp(-1) for some in several])
    log_probabilities = logits[place, target].float() - normalizers[place]

    sums = torch.zeros(num_choices, dtype=torch.float64, device=device)
    flat = iter(sums.index_add_(0, owner, log_probabilities.double()).tolist())
    return [list(islice(flat, len(row.targets))) for row in rows]


def _tree_mask(branches: Tensor, config: Any) -> Tensor:
    """Let each token see, of what stands before it, the common beginning and its own branch."""
    earlier = torch.ones(branches.shape[1], branches.shape[1], dtype=torch.bool, device=branches.device).tril()
    seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    mask = (seen & earlier)[:, None]
    if attention_kernel(config) == "sdpa":
        return mask
    # Eager attention adds its mask to the logits, so a boolean one would be silently taken for zeros and ones.
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
