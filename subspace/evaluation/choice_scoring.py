"""Protocol ``likelihood``: each choice of an item is scored by the log-probability of its text after the context.

The definition is lm-evaluation-harness's (0.4.13): ``acc`` takes the choice with the largest sum over its tokens,
``acc_norm`` the largest sum divided by the choice's number of characters, ``acc_bytes`` by its bytes. What differs is
how it is computed. The choices of an item mostly begin alike, so an item is read as one row, a tree of depth one: the
common beginning once, then what each choice adds. A 4-d attention mask lets a choice see the beginning and itself,
and its positions go on from the beginning's, so every token sees exactly what it would see if its choice stood alone.
The output head runs only where a token is scored.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from subspace.declarations import ITEM_FIELDS, Item, Task
from subspace.encoding import encode_pairs, num_alike
from subspace.errors import UserError
from subspace.output_head import head_at
from subspace.results import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = "1"
EXAMPLES_SEED = 1234  # the harness's


class Likelihood:
    """The items of a task, ready to be scored by this protocol."""

    name = "likelihood"
    writes = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        items: Sequence[Item],
        *,
        examples: Sequence[Sequence[Item]] = (),
        by_bytes: bool = False,
    ) -> None:
        if not task.likelihood.metrics:
            raise UserError(
                f"protocol {self.name} was asked for {task.name}, which is not declared for it. "
                "Use evaluate.protocol=llm-adapters, or add 'likelihood:' to its file"
            )
        self.task, self.items = task, items
        self.metrics: tuple[str, ...] = (*task.likelihood.metrics, *(["acc_bytes"] if by_bytes else []))
        self.num_examples = len(examples[0]) if examples else 0
        requests = [task.likelihood.requests(item) for item in items]
        if examples:
            begins = ["".join(map(self._example, several)) for several in examples]
            requests = [
                [(begin + context, choice) for context, choice in pairs]
                for begin, pairs in zip(begins, requests, strict=True)
            ]
        self.requests = requests
        self.prompts = [digest(pairs) for pairs in requests]
        encoded = iter(encode_pairs(tokenizer, [pair for pairs in requests for pair in pairs]))
        choices = [list(islice(encoded, len(pairs))) for pairs in requests]

        self.choices = Choices(model, choices)
        self.truncated, self.sizes = self.choices.truncated, self.choices.sizes

    @property
    def ingredients(self) -> dict[str, str]:
        """What this protocol's numbers depend on besides task, items and tokenizer."""
        return {
            "protocol": f"{self.name} {VERSION}",
            "template": digest([self.task.likelihood.context, self.task.likelihood.choice]),
            "decoding": "none: log-probabilities of the choices",
            **({"examples": f"{self.num_examples} of train, seed {EXAMPLES_SEED}"} if self.num_examples else {}),
        }

    def _example(self, item: Item) -> str:
        """Return an item with its right answer, to stand before a question."""
        return f"{''.join(self.task.likelihood.requests(item)[item['label']])}\n\n"

    def score(self, model: nn.Module, batch: Sequence[int]) -> list[dict[str, Any]]:
        """Score the items of these numbers together, in one forward pass; return the record of each."""
        found = self.choices.scores(model, batch)
        return [self._record(number, scores) for number, scores in zip(batch, found, strict=True)]

    def _record(self, number: int, scores: list[float]) -> dict[str, Any]:
        item = self.items[number]
        characters = self.task.likelihood.normalizers(item)
        # Without a character a choice cannot win by acc_norm: the harness divides by zero, which gives minus infinity.
        per_character = [score / n if n else -math.inf for score, n in zip(scores, characters, strict=True)]
        by_metric = {"acc": scores, "acc_norm": per_character}
        if "acc_bytes" in self.metrics:
            lengths = self.task.likelihood.normalizers(item, by_bytes=True)
            by_metric["acc_bytes"] = [score / n if n else -math.inf for score, n in zip(scores, lengths, strict=True)]
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


def draw_examples(
    pool: Sequence[Item], items: Sequence[Item], positions: Sequence[int], count: int, *, own_test_split: bool
) -> list[list[Item]]:
    """Return the examples that the harness, in one process, puts before these items of a split.

    Args:
        pool: the items to draw from.
        items: those that are asked.
        positions: where each of them stands in its split.
        count: how many examples each has.
        own_test_split: whether the task has a test split with labels. Where it has none, the harness draws one example
            more, leaves out what equals the item itself, and takes the first ``count``.
    """
    draw, more = random.Random(EXAMPLES_SEED), 0 if own_test_split else 1
    drawn = [draw.sample(range(len(pool)), count + more) for _ in range(max(positions) + 1)]

    def text(item: Item) -> list[Any]:
        return [item[field] for field in ITEM_FIELDS if field != "id"]

    found = []
    for item, position in zip(items, positions, strict=True):
        examples = [pool[number] for number in drawn[position]]
        found.append([one for one in examples if own_test_split or text(one) != text(item)][:count])
    return found


def reads_trees(config: Any, longest: int) -> bool:
    """Tell whether a model reads texts of up to ``longest`` tokens as trees.

    That rests on a 4-d mask, which only these kernels take, and which takes the place of a sliding window.
    """
    sliding = getattr(config, "sliding_window", None)
    return config._attn_implementation in ("sdpa", "eager") and (sliding is None or longest <= sliding)


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
    shared = num_alike(inputs)

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
        self.rows = [rows_of(item, window, share=reads_trees(config, longest)) for item in choices]
        self.sizes = [(len(rows), max(len(row.ids) for row in rows)) for rows in self.rows]

    def scores(self, model: nn.Module, batch: Sequence[int]) -> list[list[float]]:
        """Return the log-probability of every choice of the items of these numbers, in one forward pass."""
        flat = iter(choice_scores(model, [row for number in batch for row in self.rows[number]]))
        return [[score for _ in self.rows[number] for score in next(flat)] for number in batch]


def choice_scores(model: nn.Module, rows: Sequence[Row]) -> list[list[float]]:
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
        logits = model(input_ids=padded("ids", 0), use_cache=False, **context).logits[0]
    # A few rows at a time stay in a CPU's caches.
    several = logits.split(8 if device.type == "cpu" else 1024)
    normalizers = torch.cat([some.float().logsumexp(-1) for some in several])
    log_probabilities = logits[place, target].float() - normalizers[place]

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
