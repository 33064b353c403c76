"""Score a model, as it is or with adapters, on the suites; by any number of processes.

Each protocol knows how to lay out a task's items and how to score a batch of them; everything else is here. Batches are
cut from the items sorted by length, the same on every process, and dealt out to them. So a score does not depend on the
number of processes, each makes equally many forward passes (which ZeRO-3 needs), and each returns all results.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from subspace import declarations, encoding
from subspace.declarations import Item, Task
from subspace.distributed import gather_objects, is_main, rank, world_size
from subspace.generation import Generation
from subspace.likelihood import Likelihood
from subspace.prepare import task_items
from subspace.progress import Progress, silent
from subspace.results import TaskResult, accuracy, digest, items_file, write_items, write_results
from subspace.settings import Settings, setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROTOCOLS = (Likelihood.name, Generation.name)

Scorer = Likelihood | Generation
Batch = list[int]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """What to score, and how."""

    protocol: str = setting("likelihood", "how an answer is got out of the model", choices=PROTOCOLS)
    tasks: str | list[str] = setting("all", "which tasks: all, or their names")
    limit: int | None = setting(None, "items of each task, always the same ones; none is all", min=1)
    split: str = setting("test", "which split; test is the one that the literature reports")
    prompt: str = setting("alpaca-indented", "llm-adapters: the text round the instruction, as data.prompt")
    batch_tokens: int | None = setting(
        None, "tokens of a batch, padding included; none is what suits the device and the protocol", min=1
    )


@dataclass(frozen=True)
class Sample:
    """The items of a task that are scored. ``majority`` is the share of the split's most frequent label."""

    task: Task
    items: list[Item]
    majority: float


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluateConfig,
    folder: Path | None = None,
    *,
    model_name: str = "",
    adapter: str = "",
    progress: Progress = silent,
) -> list[TaskResult]:
    """Score a model on the tasks. All ranks call it, and each returns all results.

    Args:
        model: with or without adapters; under ZeRO-3 the engine's ``module``.
        tokenizer: the model's.
        config: what to score, and how.
        folder: the run's folder, where items and ``results.json`` are written as each task is done; or none.
        model_name: what the results call the base model.
        adapter: what the results call the adapters; nothing for the base model.
        progress: what is told how far it is, on the first process.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    # Small batches stay in a CPU's caches. But each token that is written reads all weights, for however few rows.
    budget = config.batch_tokens or (16384 if not on_cpu else 4096 if config.protocol == Generation.name else 512)
    stage = progress if is_main() else silent
    # Every task is laid out before the first is scored: what is missing is said now, and the time left is known.
    samples = [take_sample(task, config.split, config.limit) for task in find_tasks(config.tasks)]
    scorers: list[Scorer] = []
    with stage("encode the items", len(samples), "tasks") as at:
        for sample in samples:
            scorers.append(_scorer(model, tokenizer, sample, config))
            at(len(scorers))
    plans = [plan_batches(scorer.sizes, budget) for scorer in scorers]
    total = sum(count_tokens(s.sizes, batch) for s, plan in zip(scorers, plans, strict=True) for batch in plan)

    results, done = [], 0
    with _scoring(model), stage(f"score by {config.protocol}", total, "tokens") as at:

        def tell(tokens: int, detail: str) -> None:
            nonlocal done
            done += tokens
            at(min(done, total), detail)

        for sample, scorer, plan in zip(samples, scorers, plans, strict=True):
            began = time.perf_counter()
            records = _score(model, scorer, plan, tell)
            right = {metric: [record["correct"][metric] for record in records] for metric in scorer.metrics}
            file = items_file(folder, config.protocol, sample.task.name) if folder else None
            result = TaskResult(
                model=model_name,
                adapter=adapter,
                dtype=str(model.dtype).removeprefix("torch."),
                protocol=config.protocol,
                task=sample.task.name,
                metrics={metric: accuracy(correct) for metric, correct in right.items()},
                n=len(records),
                majority=sample.majority,
                truncated=scorer.truncated,
                seconds=time.perf_counter() - began,
                ingredients=_ingredients(scorer, sample, tokenizer),
                items=file,
            )
            results.append(result)
            if folder and file and is_main():
                write_items(file, records)
                write_results(folder, [result])
    return results


def find_tasks(names: str | Sequence[str]) -> list[Task]:
    """Return the tasks that a setting names, in the order of the literature's tables."""
    several = names.split(",") if isinstance(names, str) else names
    wanted = declarations.tasks() if names == "all" else {declarations.task(name.strip()).name for name in several}
    return [task for name, task in declarations.tasks().items() if name in wanted]


def take_sample(task: Task, split: str, limit: int | None) -> Sample:
    """Return the items of a split, or ``limit`` of them: those with the smallest hashes of their ids, in their order.

    Hashes, because the first items of a split need not be like the others; and so a smaller sample is part of a larger
    one, on every machine, for every protocol.
    """
    split_items = task_items(task.name, split)
    labels = Counter(split_items["label"])
    if limit is not None and limit < len(split_items):
        hashes = [hashlib.sha256(name.encode()).digest() for name in split_items["id"]]
        split_items = split_items.select(sorted(sorted(range(len(hashes)), key=hashes.__getitem__)[:limit]))
    return Sample(task, list(split_items), max(labels.values()) / labels.total())


def plan_batches(sizes: Sequence[tuple[int, int]], budget: int) -> list[Batch]:
    """Cut items into batches of at most ``budget`` tokens, longest items first; an item that is larger comes alone.

    Args:
        sizes: for each item how many rows it is in a batch, and how many tokens its longest row has.
        budget: tokens, padding included.
    """
    plan: list[Batch] = []
    for number in sorted(range(len(sizes)), key=lambda number: sizes[number][1], reverse=True):
        if plan and count_tokens(sizes, [*plan[-1], number]) <= budget:
            plan[-1].append(number)
        else:
            plan.append([number])
    return plan


def count_tokens(sizes: Sequence[tuple[int, int]], batch: Batch) -> int:
    """Return the tokens of a batch, padding included."""
    return sum(sizes[number][0] for number in batch) * max(sizes[number][1] for number in batch)


def _score(
    model: nn.Module, scorer: Scorer, plan: Sequence[Batch], tell: Callable[[int, str], None]
) -> list[dict[str, Any]]:
    """Return the record of every item, on every rank; each scores its share of the batches."""
    began = time.perf_counter()
    found: dict[int, dict[str, Any]] = {}
    for turn in _turns(plan):
        mine = turn[rank()]
        found.update(zip(mine, scorer.score(model, mine), strict=True))
        speed = len(found) * world_size() / (time.perf_counter() - began)
        tell(sum(count_tokens(scorer.sizes, batch) for batch in turn), f"{scorer.task.title}, {speed:.1f} items/s")
    for others in gather_objects(found):
        found.update(others)
    return [found[number] for number in range(len(scorer.items))]


def _budget(protocol: str, *, on_cpu: bool) -> int:
    if not on_cpu:
        return 16384
    # A CPU is busy with few tokens, and small batches have less padding. But each step of decoding reads all weights
    # for one token a row, so there more rows are cheaper.
    return 512 if protocol == Likelihood.name else 2048


def _turns(plan: Sequence[Batch]) -> Iterator[list[Batch]]:
    """Deal the batches out, one for each rank at a time. The last one goes to all ranks that would have none."""
    ranks = world_size()
    for first in range(0, len(plan), ranks):
        yield [plan[min(first + other, len(plan) - 1)] for other in range(ranks)]


def _scorer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, config: EvaluateConfig
) -> Scorer:
    if config.protocol == Generation.name:
        return Generation(model, tokenizer, sample.task, sample.items, config.prompt)
    return Likelihood(model, tokenizer, sample.task, sample.items)


def _ingredients(scorer: Scorer, sample: Sample, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {
        **scorer.ingredients,
        "task": sample.task.name,
        "task version": sample.task.version,
        "items": digest([{field: item[field] for field in declarations.ITEM_FIELDS} for item in sample.items]),
        "metrics": ", ".join(scorer.metrics),
        "tokenizer": encoding.fingerprint(tokenizer)[:12],
    }


@contextmanager
def _scoring(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, without gradients, and afterwards back into the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
