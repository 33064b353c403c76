"""Protocol ``likelihood``: each choice of an item is scored by the log-probability of its text after the context.

The definition is lm-evaluation-harness's (0.4.13): ``acc`` takes the choice with the largest sum over its tokens,
``acc_norm`` the largest sum divided by the choice's number of characters. What differs is how it is computed. The
choices of an item mostly begin alike, so an item is read as one row, a tree of depth one: the common beginning once,
then what each choice adds. A 4-d attention mask lets a choice see the beginning and itself, and its positions go on
from the beginning's, so every token sees exactly what it would see if its choice stood alone. The output head runs
only where a token is scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from subspace.declarations import Item, Task
from subspace.encoding import encode_pairs
from subspace.errors import UserError
from subspace.results import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = "1"


class Likelihood:
    """The items of a task, ready to be scored by this protocol."""

    name = "likelihood"

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, items: Sequence[Item]) -> None:
        self.task, self.items = task, items
        self.metrics = task.likelihood.metrics
        requests = [task.likelihood.requests(item) for item in items]
        self.prompts = [digest(pairs) for pairs in requests]
        encoded = iter(encode_pairs(tokenizer, [pair for pairs in requests for pair in pairs]))
        choices = [list(islice(encoded, len(pairs))) for pairs in requests]

        config: Any = model.config
        window = config.max_position_embeddings
        longest = max(len(ids) for item in choices for ids, _ in item)
        self.truncated = sum(any(len(ids) > window + 1 for ids, _ in item) for item in choices)
        # Sharing rests on a 4-d mask, which only these kernels take, and which takes the place of a sliding window.
        sliding = getattr(config, "sliding_window", None)
        share = config._attn_implementation in ("sdpa", "eager") and (sliding is None or longest <= sliding)
        self.rows = [rows_of(item, window, share=share) for item in choices]
        # For each item how many rows it is in a batch, and how many tokens the longest of them has.
        self.sizes = [(len(rows), max(len(row.ids) for row in rows)) for rows in self.rows]

    @property
    def ingredients(self) -> dict[str, str]:
        """What this protocol's numbers depend on besides task, items and tokenizer."""
        return {
            "protocol": f"{self.name} {VERSION}",
            "template": digest([self.task.likelihood.context, self.task.likelihood.choice]),
            "decoding": "none: log-probabilities of the choices",
        }

    def score(self, model: nn.Module, batch: Sequence[int]) -> list[dict[str, Any]]:
        """Score the items of these numbers together, in one forward pass; return the record of each."""
        flat = iter(choice_scores(model, [row for number in batch for row in self.rows[number]]))
        found = [[score for _ in self.rows[number] for score in next(flat)] for number in batch]
        return [self._record(number, scores) for number, scores in zip(batch, found, strict=True)]

    def _record(self, number: int, scores: list[float]) -> dict[str, Any]:
        item = self.items[number]
        characters = self.task.likelihood.normalizers(item)
        # Without a character a choice cannot win by acc_norm: the harness divides by zero, which gives minus infinity.
        per_character = [score / n if n else -math.inf for score, n in zip(scores, characters, strict=True)]
        by_metric = {"acc": scores, "acc_norm": per_character}
        prediction = {metric: by_metric[metric].index(max(by_metric[metric])) for metric in self.metrics}
        return {
            "id": item["id"],
            "prompt": self.prompts[number],
            "scores": scores,
            "characters": characters,
            "prediction": prediction,
            "label": item["label"],
            "correct": {metric: choice == item["label"] for metric, choice in prediction.items()},
        }


@dataclass(frozen=True)
class Row:
    """What the model reads of an item in one row, and where its choices are scored.

    ``branches[i]`` is 0 where token i belongs to the common beginning, else the number of the only choice that sees it.
    ``reads[c]`` are the tokens whose outputs predict ``targets[c]``, the tokens of choice c.
    """

    ids: list[int]
    positions: list[int]
    branches: list[int]
    reads: list[list[int]]
    targets: list[list[int]]


def rows_of(choices: Sequence[tuple[list[int], int]], window: int, *, share: bool) -> list[Row]:
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


def _tree(sequences: Sequence[tuple[list[int], list[int]]]) -> Row:
    inputs = [ids for ids, _ in sequences]
    shortest = min(map(len, inputs))
    alike = (len(set(column)) == 1 for column in zip(*inputs, strict=False))
    shared = next((i for i, same in enumerate(alike) if not same), shortest)

    row = Row(inputs[0][:shared], list(range(shared)), [0] * shared, [], [])
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


def choice_scores(model: nn.Module, rows: Sequence[Row]) -> list[list[float]]:
    """Return the log-probability of every choice of every row. The rows are one batch, padded on the right."""
    device = next(model.parameters()).device
    length = max(len(row.ids) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        values = [getattr(row, name) for row in rows]
        return torch.tensor([v + [fill] * (length - len(v)) for v in values], device=device)

    branches = padded("branches", -1)
    trees = bool((branches > 1).any())
    mask = _tree_mask(branches, model.config) if trees else (branches >= 0).long()

    # For each scored token: the choice it belongs to, where in the flattened batch it is predicted, and what it is.
    scored = [
        (choice, number * length + read, target)
        for choice, (number, reads, targets) in enumerate(
            (number, *pair) for number, row in enumerate(rows) for pair in zip(row.reads, row.targets, strict=True)
        )
        for read, target in zip(reads, targets, strict=True)
    ]
    choice, read, target = torch.tensor(scored, device=device).unbind(1)
    places, place = torch.unique(read, return_inverse=True)

    with head_at(model, places):
        logits = model(
            input_ids=padded("ids", 0), attention_mask=mask, position_ids=padded("positions", 0), use_cache=False
        ).logits[0]
    logits = logits.float()
    log_probabilities = logits[place, target] - logits.logsumexp(-1)[place]

    sums = torch.zeros(sum(len(row.targets) for row in rows), dtype=torch.float64, device=device)
    flat = iter(sums.index_add_(0, choice, log_probabilities.double()).tolist())
    return [list(islice(flat, len(row.targets))) for row in rows]


def _tree_mask(branches: Tensor, config: Any) -> Tensor:
    """Let each token see, of what stands before it, the common beginning and its own branch."""
    earlier = torch.ones(branches.shape[1], branches.shape[1], dtype=torch.bool, device=branches.device).tril()
    seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    mask = (seen & earlier)[:, None]
    if config._attn_implementation == "sdpa":
        return mask
    # Eager attention adds its mask to the logits, so a boolean one would be silently taken for zeros and ones.
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)


@contextmanager
def head_at(model: nn.Module, places: Tensor) -> Iterator[None]:
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
