"""Score a model, as it is or with adapters, on the suites; by any number of processes.

Each protocol knows how to lay out a task's items and how to score a batch of them; everything else is here. Batches are
cut from the items sorted by length, the same on every process, and dealt out to them. So a score does not depend on the
number of processes, each makes equally many forward passes (which ZeRO-3 needs), and each returns all results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from subspace.common.host_memory import set_malloc_trim
from subspace.common.progress import Progress, no_progress
from subspace.data.items import ITEM_FIELDS
from subspace.data.samples import Sample, select_samples
from subspace.data.tokenization import tokenizer_fingerprint
from subspace.distributed.collectives import broadcast_object, is_main, rank
from subspace.evaluation.batching import OOMSplitter, assign_to_ranks, plan_batches, token_budget
from subspace.evaluation.config import EvaluateConfig
from subspace.evaluation.fingerprint import weights_checksum
from subspace.evaluation.protocols import SCORERS
from subspace.evaluation.protocols.base import Scorer
from subspace.evaluation.records import ItemRecord
from subspace.evaluation.results import (
    TaskResult,
    accuracy,
    digest,
    find_result,
    items_file,
    write_items,
    write_results,
)
from subspace.evaluation.resume import ResumableResults

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """One task by one protocol, laid out. It serves every model that has this tokenizer and this configuration."""

    sample: Sample
    scorer: Scorer
    fingerprint_fields: Mapping[str, str]


def build_jobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig, progress: Progress = no_progress
) -> list[Job]:
    """Lay every task out by every protocol. What is missing is an error here, before anything is scored."""
    samples = select_samples(config.selection)
    wanted = [(protocol, sample) for protocol in config.protocols for sample in samples]
    encoded_by = tokenizer_fingerprint(tokenizer)[:12]
    jobs = []
    with (progress if is_main() else no_progress)("encode the items", len(wanted), "tasks") as at:
        for protocol, sample in wanted:
            scorer = SCORERS[protocol].build(model, tokenizer, sample, config)
            jobs.append(Job(sample, scorer, _fingerprint_fields(scorer, sample, encoded_by)))
            at(len(jobs))
    return jobs


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluateConfig,
    folder: Path | None = None,
    *,
    model_name: str = "",
    adapter: str = "",
    progress: Progress = no_progress,
    jobs: Sequence[Job] | None = None,
    checksum: str = "",
) -> list[TaskResult]:
    """Score a model on the tasks. All ranks call it, and each returns all results.

    Args:
        model: with or without adapters; under ZeRO-3 the engine's ``module``.
        tokenizer: the model's.
        config: what to score, and how.
        folder: the run's folder, where items and ``results.json`` are written as each task is done; or none. What it
            holds of this very model, whole or in part, is not scored again.
        model_name: what the results call the base model.
        adapter: what the results call the adapters; nothing for the base model.
        progress: what is told how far it is, on the first process.
        jobs: what ``build_jobs`` made of this configuration for a model of the same base.
        checksum: of base and adapters, where the model holds those of several subjects.
    """
    jobs = build_jobs(model, tokenizer, config, progress) if jobs is None else jobs
    subject = checksum or (weights_checksum(model) if folder else "")
    total, done = sum(_work(job.scorer, range(len(job.sample.items))) for job in jobs), 0
    results = []
    title = f"score {adapter or model_name or 'the model'} by {', '.join(config.protocols)}"
    with _scoring(model), (progress if is_main() else no_progress)(title, total, "tokens") as at:

        def tell(tokens: int, detail: str) -> None:
            nonlocal done
            done += tokens
            at(min(done, total), detail)

        for job in jobs:
            file = items_file(folder, job.scorer.name, job.sample.task.name) if folder else None
            result = None if config.overwrite else _scored_before(folder, job, subject)
            if result:
                tell(_work(job.scorer, range(len(job.sample.items))), f"{job.sample.task.title}, scored before")
                results.append(result)
                continue
            began = time.perf_counter()
            default = token_budget(model, writes=job.scorer.writes)
            with ResumableResults(
                file, digest([subject, dict(job.fingerprint_fields)]), config.batch_tokens, default
            ) as partial:
                records = _score(model, job, partial, tell)
                result = TaskResult(
                    model=model_name,
                    adapter=adapter,
                    dtype=str(model.dtype).removeprefix("torch."),
                    protocol=job.scorer.name,
                    task=job.sample.task.name,
                    metrics={m: accuracy([record["correct"][m] for record in records]) for m in job.scorer.metrics},
                    n=len(records),
                    majority=job.sample.majority,
                    truncated=job.scorer.truncated,
                    seconds=time.perf_counter() - began,
                    fingerprint_fields=job.fingerprint_fields,
                    items=file,
                    subject=subject,
                )
                if folder and file and is_main():
                    write_items(file, records)
                    write_results(folder, [result])
                partial.remove()
            results.append(result)
    return results


def _scored_before(folder: Path | None, job: Job, subject: str) -> TaskResult | None:
    """Return what a folder holds of this task, this protocol and this very model, on every rank."""
    found = None
    if folder and is_main():
        found = find_result(folder, job.scorer.name, job.sample.task.name)
        if found and (found.subject, found.fingerprint) != (subject, digest(dict(job.fingerprint_fields))):
            found = None
    return broadcast_object(found) if folder else None


def _score(model: nn.Module, job: Job, partial: ResumableResults, tell: Callable[[int, str], None]) -> list[ItemRecord]:
    """Return the record of every item, on every rank; each scores its share of the batches that are left."""
    scorer, began, scored = job.scorer, time.perf_counter(), 0
    halving = OOMSplitter(model, lambda batch: scorer.score(model, batch), scorer.sizes)
    plan = plan_batches(scorer.sizes, partial.budget)
    left = [batch for batch in plan if not partial.records.keys() >= set(batch)]
    before = set(range(len(scorer.sizes))).difference(*left)
    tell(_work(scorer, before), f"{job.sample.task.title}, {len(before)} items scored before")
    with scorer.shared_prefix(model) if left else nullcontext():
        for turn in assign_to_ranks(left):
            mine = turn[rank()]
            partial.add(mine, halving.score(mine))
            scored += len({number for batch in turn for number in batch})
            speed = scored / (time.perf_counter() - began)
            tell(sum(_work(scorer, batch) for batch in turn), f"{job.sample.task.title}, {speed:.1f} items/s")
    partial.gather()
    return [partial.records[number] for number in range(len(scorer.sizes))]


def _work(scorer: Scorer, numbers: Iterable[int]) -> int:
    """Return the tokens of items, without padding."""
    return sum(rows * length for rows, length in (scorer.sizes[number] for number in numbers))


def _fingerprint_fields(scorer: Scorer, sample: Sample, tokenizer: str) -> dict[str, str]:
    return {
        **scorer.fingerprint_fields,
        "task": sample.task.name,
        "task version": sample.task.version,
        "items": digest([{field: item[field] for field in ITEM_FIELDS} for item in sample.items]),
        "metrics": ", ".join(scorer.metrics),
        "tokenizer": tokenizer,
    }


@contextmanager
def _scoring(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, without gradients, and afterwards back into the mode it was in.

    What a pass frees the next one wants again. Loading the model had it returned to the system, which clears each page
    that it gives back: a fifth to a third of the time, for a tenth less memory.
    """
    training = model.training
    set_malloc_trim(False)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
