"""Evaluation of a model, with or without adapters, on tasks, by any number of processes.

Each protocol encodes a task's items and scores batches of them; everything else is here. Batches are cut from the items
sorted by length, identically on every process, and assigned to the ranks. So a score does not depend on the number of
processes, each makes the same number of forward passes (as ZeRO-3 needs), and each returns all results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from subspace.common.host_memory import set_malloc_trim
from subspace.common.progress import Progress, no_progress
from subspace.data.items import ITEM_FIELDS
from subspace.data.samples import Sample, select_samples
from subspace.data.tokenization import tokenizer_fingerprint
from subspace.distributed import watchdog
from subspace.distributed.collectives import broadcast_object, is_main, rank
from subspace.evaluation.batching import OOMSplitter, assign_to_ranks, plan_batches, token_budget
from subspace.evaluation.config import EvaluateConfig
from subspace.evaluation.fingerprint import weights_checksum
from subspace.evaluation.finite import NonFiniteOutput, non_finite_failure
from subspace.evaluation.protocols import SCORERS
from subspace.evaluation.protocols.base import Scorer
from subspace.evaluation.records import ItemRecord
from subspace.evaluation.results import (
    RESULTS,
    TaskResult,
    accuracy,
    digest,
    find_result,
    items_checksum,
    items_file,
    read_results,
    save_result,
)
from subspace.evaluation.resume import ResumableResults

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """One task encoded for one protocol. It serves every model with this tokenizer and model configuration."""

    sample: Sample
    scorer: Scorer
    fingerprint_fields: Mapping[str, str]

    def fits(self, number: int, record: Mapping[str, Any]) -> bool:
        """Return True if a record from a file is one of the item of this number."""
        items, correct = self.sample.items, record.get("correct")
        return (
            0 <= number < len(items)
            and record.get("id") == items[number]["id"]
            and isinstance(record.get("prompt"), str)
            and {"prediction", "label"} <= record.keys()
            and isinstance(correct, dict)
            and all(isinstance(correct.get(metric), bool) for metric in self.scorer.metrics)
        )


def build_jobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluateConfig,
    progress: Progress = no_progress,
    samples: Sequence[Sample] | None = None,
) -> list[Job]:
    """Return a job for every protocol and task. Missing data raises UserError here, before anything is scored.

    ``samples`` are the items of ``config.selection``; None reads them.
    """
    samples = select_samples(config.selection) if samples is None else samples
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
    base: Mapping[str, str] | None = None,
) -> list[TaskResult]:
    """Score a model on the tasks. Collective: all ranks call it, and each returns all results.

    Args:
        model: with or without adapters; under ZeRO-3 the engine's ``module``.
        tokenizer: the model's.
        config: the evaluation settings.
        folder: the run's folder, where items and ``results.json`` are written after each task; None writes nothing.
            Results that it already has of this very model, complete or partial, are not computed again.
        model_name: name of the base model in the results.
        adapter: name of the adapters in the results; empty for the base model.
        progress: progress display, used on the first process.
        jobs: result of ``build_jobs`` for these settings and a model of the same base; None builds them.
        checksum: checksum of base and adapters, needed if the model has adapters of several subjects.
        base: the base's record, to be kept beside the numbers.

    Returns:
        One result for each protocol and task, in the order of the jobs.
    """
    jobs = build_jobs(model, tokenizer, config, progress) if jobs is None else jobs
    subject = checksum or (weights_checksum(model) if folder else "")
    total, done = sum(count_work(job.scorer, range(len(job.sample.items))) for job in jobs), 0
    results = []
    title = f"score {adapter or model_name or 'the model'} by {', '.join(config.protocols)}"
    with scoring(model), (progress if is_main() else no_progress)(title, total, "tokens") as at:

        def advance(tokens: int, detail: str) -> None:
            nonlocal done
            done += tokens
            watchdog.beat(title)
            at(min(done, total), detail)

        for job in jobs:
            file = items_file(folder, job.scorer.name, job.sample.task.name) if folder else None
            result = _scored_before(folder, job, subject, overwrite=config.overwrite)
            if result:
                advance(count_work(job.scorer, range(len(job.sample.items))), f"{job.sample.task.title}, scored before")
                results.append(result)
                continue
            began = time.perf_counter()
            default = token_budget(model, writes=job.scorer.writes)
            with ResumableResults(
                file, digest([subject, dict(job.fingerprint_fields)]), config.batch_tokens, default, job.fits
            ) as partial:
                records = score_job(model, job, partial, advance)
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
                    base=dict(base or {}),
                    title=job.sample.task.title,
                    suite=job.sample.task.suite,
                    items_sha256=items_checksum(records),
                )
                if folder and is_main():
                    save_result(folder, result, records)
                partial.remove()
            results.append(result)
    return results


def _scored_before(folder: Path | None, job: Job, subject: str, *, overwrite: bool) -> TaskResult | None:
    """Return, on every rank, the folder's result for this task, protocol and model, or None.

    Raises:
        UserError: the results that this one would be added to are damaged or of a newer version.
    """
    result = None
    if folder and is_main() and (folder / RESULTS).exists():
        if overwrite:
            read_results(folder)
        else:
            result = find_result(folder, job.scorer.name, job.sample.task.name)
        if result and (result.subject, result.fingerprint) != (subject, digest(dict(job.fingerprint_fields))):
            result = None
    return broadcast_object(result) if folder else None


def score_job(
    model: nn.Module, job: Job, partial: ResumableResults, advance: Callable[[int, str], None]
) -> list[ItemRecord]:
    """Return the records of all items on every rank; each rank scores its share of the remaining batches."""
    scorer, began, scored = job.scorer, time.perf_counter(), 0

    def attempt(batch: list[int]) -> list[ItemRecord]:
        try:
            return scorer.score(model, batch)
        except NonFiniteOutput as error:
            item = job.sample.items[batch[error.index % len(batch)]]["id"]
        raise non_finite_failure(model, item, f"{job.sample.task.title}, by {scorer.name}")

    splitter = OOMSplitter(model, attempt, scorer.sizes)
    plan = plan_batches(scorer.sizes, partial.budget)
    remaining = [batch for batch in plan if not partial.records.keys() >= set(batch)]
    before = set(range(len(scorer.sizes))).difference(*remaining)
    advance(count_work(scorer, before), f"{job.sample.task.title}, {len(before)} items scored before")
    with scorer.shared_prefix(model) if remaining else nullcontext():
        for turn in assign_to_ranks(remaining):
            own_batch = turn[rank()]
            partial.add(own_batch, splitter.score(own_batch))
            scored += len({number for batch in turn for number in batch})
            speed = scored / (time.perf_counter() - began)
            advance(sum(count_work(scorer, batch) for batch in turn), f"{job.sample.task.title}, {speed:.1f} items/s")
    partial.gather()
    return [partial.records[number] for number in range(len(scorer.sizes))]


def count_work(scorer: Scorer, numbers: Iterable[int]) -> int:
    """Return the number of tokens of items, without padding."""
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
def scoring(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode without gradients, and restore its mode afterwards.

    The memory that one pass frees is allocated again by the next. Malloc trimming, which loading the model switches on,
    returns it to the system, which zeroes every page that it hands out: a fifth to a third of the time, for a tenth
    less memory.
    """
    training = model.training
    set_malloc_trim(False)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
