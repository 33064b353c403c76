"""Log-probability of each choice of an item, given the context, with the shared prefix computed once.

The definition is lm-evaluation-harness's (0.4.13): the sum over the choice's tokens. Only the computation differs. The
choices of an item mostly share a prefix, so an item is one row, a tree of depth one: the common prefix once, then the
remaining tokens of each choice. A 4-d attention mask lets a choice attend to the prefix and to itself, and its
positions continue the prefix's, so every token sees exactly what it would see if its choice stood alone. The output
head runs only at positions that are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from subspace.adapters.virtual_tokens import num_virtual_tokens
from subspace.data.tokenization import common_prefix_length
from subspace.distributed.zero import requires_synchronized_forward
from subspace.errors import UserError
from subspace.evaluation.finite import require_finite
from subspace.models.context import (
    adds_distances,
    attention_window,
    has_recurrent_layers,
    max_positions,
    rotation_limit,
)
from subspace.models.lm_head import lm_head_on_positions
from subspace.models.transformers_compat import attention_kernel


def can_score_as_tree(model: Any, longest: int) -> bool:
    """Return True if a model can score rows of up to ``longest`` tokens as trees.

    Trees need a 4-d mask, which only these attention kernels accept, and which replaces the mask of a sliding window
    and ALiBi's distances. Recurrent layers read a tree as one text.
    """
    config = model.config
    if attention_kernel(config) not in ("sdpa", "eager") or has_recurrent_layers(model) or adds_distances(config):
        return False
    limits = [limit for limit in (attention_window(config), rotation_limit(config)) if limit is not None]
    return all(longest + num_virtual_tokens(model) <= limit for limit in limits)


@dataclass(frozen=True)
class ScoringRow:
    """One row of model input for an item, and the positions at which its choices are scored.

    ``branches[i]`` is 0 if token i belongs to the common prefix, else the number (from 1) of the choice it belongs to.
    ``reads[c]`` are the indices of the tokens whose outputs predict ``targets[c]``, the tokens of choice c.
    """

    ids: list[int]
    positions: list[int]
    branches: list[int]
    reads: list[list[int]]
    targets: list[list[int]]


def build_scoring_rows(choices: Sequence[tuple[list[int], int]], window: int, *, share: bool) -> list[ScoringRow]:
    """Return the rows of an item: one row whose choices share their prefix, or one row a choice.

    Args:
        choices: for each choice its token ids, and how many of them belong to the context.
        window: the maximum number of input tokens. A longer text loses its beginning, as in the harness.
        share: whether the choices may share a row.

    Raises:
        UserError: a context or a continuation has no token, or a continuation is longer than the window.
    """
    sequences = [_cut(ids, num_context, window) for ids, num_context in choices]
    return [_tree(sequences)] if share else [_tree([sequence]) for sequence in sequences]


def _cut(ids: list[int], num_context: int, window: int) -> tuple[list[int], list[int]]:
    """Return the input ids and the target ids. The last token is predicted, but never an input."""
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
        # The tokens of a choice come after those of the choices before it.
        moved = len(row.ids) - shared
        read = range(len(ids) - len(targets), len(ids))
        row.reads.append([i if i < shared else i + moved for i in read])
        row.targets.append(targets)
        row.ids.extend(ids[shared:])
        row.positions.extend(range(shared, len(ids)))
        row.branches.extend([choice] * (len(ids) - shared))
    return row


class Choices:
    """Choices of items, encoded as rows.

    Attributes:
        truncated: the number of items with a choice longer than the model's window.
        sizes: for each item the number of its rows in a batch, and the number of tokens of the longest.
    """

    def __init__(
        self, model: nn.Module, choices: Sequence[Sequence[tuple[list[int], int]]], *, share: bool = True
    ) -> None:
        """Build the rows.

        Args:
            model: the model.
            choices: for each item its choices, as token ids and the number of context tokens.
            share: whether the choices of an item may share a row, if the model can score such rows.
        """
        config: Any = model.config
        window = max_positions(config)
        longest = max(len(ids) for item in choices for ids, _ in item)
        self.truncated = sum(any(len(ids) > window + 1 for ids, _ in item) for item in choices)
        share = share and can_score_as_tree(model, longest)
        self.rows = [build_scoring_rows(item, window, share=share) for item in choices]
        self.sizes = [(len(rows), max(len(row.ids) for row in rows)) for rows in self.rows]

    def scores(self, model: nn.Module, batch: Sequence[int]) -> list[list[float]]:
        """Return for each of these items the log-probabilities of its choices, in nats, by one forward pass.

        Raises:
            NonFiniteOutput: one of them is NaN or infinite.
        """
        rows = iter(_score_rows(model, [row for number in batch for row in self.rows[number]]))
        # The choices of an item are in one row, or in one row each.
        scores = [list(chain.from_iterable(islice(rows, len(self.rows[number])))) for number in batch]
        require_finite(scores)
        return scores


def _score_rows(model: Any, rows: Sequence[ScoringRow]) -> list[list[float]]:
    """Return ``score_choices`` of all rows; those whose positions depend on their length are scored one by one."""
    limit = rotation_limit(model.config)
    long = [] if limit is None else [i for i, r in enumerate(rows) if len(r.ids) + num_virtual_tokens(model) > limit]
    if not long:
        return score_choices(model, rows)
    if requires_synchronized_forward(model):
        raise UserError(
            f"a text of {max(len(rows[i].ids) for i in long)} tokens was to be scored under ZeRO-3, but beyond {limit} "
            "this model's positions depend on each text's length, and ranks would make unequal numbers of passes. "
            "Score it without evaluate.engine"
        )
    rest = [i for i in range(len(rows)) if i not in long]
    groups = [*([rest] if rest else []), *([i] for i in long)]
    scored = {
        i: scores
        for group in groups
        for i, scores in zip(group, score_choices(model, [rows[i] for i in group]), strict=True)
    }
    return [scored[i] for i in range(len(rows))]


def score_choices(model: nn.Module, rows: Sequence[ScoringRow]) -> list[list[float]]:
    """Return for each row the log-probabilities of its choices, in nats. The batch of rows is padded on the right."""
    device = next(model.parameters()).device
    length = max(len(row.ids) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        values = [getattr(row, name) for row in rows]
        return torch.tensor([v + [fill] * (length - len(v)) for v in values], device=device)

    branches = padded("branches", -1)
    context: dict[str, Tensor] = {}
    if (branches > 1).any():
        context = {"attention_mask": _tree_mask(branches, model.config), "position_ids": padded("positions", 0)}
    # Otherwise causal attention is all that is needed, and padding on the right is never attended to: without an
    # explicit mask the attention kernels skip the masked half.

    # For each scored token: its choice, the index in the flattened batch that predicts it, and its id.
    owners: list[int] = []
    reads: list[int] = []
    targets: list[int] = []
    num_choices = 0
    for number, row in enumerate(rows):
        for indices, tokens in zip(row.reads, row.targets, strict=True):
            owners += [num_choices] * len(tokens)
            reads += [number * length + read for read in indices]
            targets += tokens
            num_choices += 1
    owner, read, target = torch.tensor([owners, reads, targets], device=device)
    # The last token of the prefix predicts the first token of several choices: its logits are computed once.
    places, place = torch.unique(read, return_inverse=True)

    with lm_head_on_positions(model, places):
        logits = model(input_ids=padded("ids", 0), use_cache=False, **context).logits[0]
    # A few rows at a time stay in a CPU's caches.
    chunks = logits.split(8 if device.type == "cpu" else 1024)
    normalizers = torch.cat([chunk.float().logsumexp(-1) for chunk in chunks])
    log_probabilities = logits[place, target].float() - normalizers[place]

    sums = torch.zeros(num_choices, dtype=torch.float64, device=device)
    flat = iter(sums.index_add_(0, owner, log_probabilities.double()).tolist())
    return [list(islice(flat, len(row.targets))) for row in rows]


def _tree_mask(branches: Tensor, config: Any) -> Tensor:
    """Return a mask ``(rows, 1, tokens, tokens)`` that lets a token attend to the prefix and its own branch before it.

    It is boolean for SDPA, and additive for eager attention.
    """
    earlier = torch.ones(branches.shape[1], branches.shape[1], dtype=torch.bool, device=branches.device).tril()
    seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    mask = (seen & earlier)[:, None]
    if attention_kernel(config) == "sdpa":
        return mask
    # Eager attention adds the mask to its scores, so a boolean one would silently act as zeros and ones.
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
