"""Score several subjects in one go: each base model is opened once, and adapters are put in and taken out again.

A subject is a base model as it is, or a run's adapters on it. Subjects of one base may have adapters of any methods.
The tasks are laid out once for all subjects that are scored alike. With ``evaluate.batch_adapters`` those of them whose
adapters can be mixed are scored in the same batches. With ``evaluate.engine`` the base is spread over the processes
(ZeRO-3), and is opened anew for each subject: DeepSpeed takes hold of base and adapters together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from subspace.adapters.inject import adapters, remove_adapters
from subspace.adapters.multi_adapter import AdaptersBySite, batch_adapters, can_batch_adapters
from subspace.adapters.serialization import load_adapter
from subspace.common.progress import Progress, no_progress
from subspace.data.leakage import MAX_OVERLAP, find_overlap
from subspace.data.samples import Sample
from subspace.distributed.collectives import is_main
from subspace.distributed.deepspeed_config import resolve_deepspeed_config_for_inference
from subspace.distributed.engine import init_inference_engine
from subspace.errors import UserError
from subspace.evaluation.config import LLM_ADAPTERS_PUBLISHED, EvaluationSubject
from subspace.evaluation.evaluate import Job, build_jobs, evaluate
from subspace.evaluation.fingerprint import weights_checksum
from subspace.evaluation.protocols.base import Scorer
from subspace.evaluation.records import ItemRecord
from subspace.evaluation.results import TaskResult
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model, open_tokenizer

logger = logging.getLogger(__name__)


def evaluate_subjects(
    subjects: Sequence[EvaluationSubject],
    progress: Progress = no_progress,
    tell: Callable[[list[Job]], None] | None = None,
) -> list[list[TaskResult]]:
    """Score the subjects, and return the results of each. All ranks call it.

    ``tell`` is told what is about to be scored, before it is.
    """
    results: dict[int, list[TaskResult]] = {}
    bases: dict[tuple[ModelConfig, int | None], dict[str, list[int]]] = {}
    for number, subject in enumerate(subjects):
        own = number if subject.evaluate.engine else None
        bases.setdefault((subject.model, own), {}).setdefault(str(subject.evaluate), []).append(number)
    for (base, own), groups in bases.items():
        file = None if own is None else subjects[own].evaluate.engine
        zero3 = resolve_deepspeed_config_for_inference(file, base.dtype) if file else None
        opened = open_model(base, zero3), open_tokenizer(base)
        for numbers in groups.values():
            alike = [subjects[number] for number in numbers]
            jobs = build_jobs(*opened, alike[0].evaluate, progress)
            if tell:
                tell(jobs)
            results.update(zip(numbers, _score_alike(*opened, alike, jobs, progress, zero3), strict=True))
    return [results[number] for number in range(len(subjects))]


def _score_alike(
    model: Any,
    tokenizer: Any,
    subjects: Sequence[EvaluationSubject],
    jobs: Sequence[Job],
    progress: Progress,
    zero3: dict[str, Any] | None,
) -> list[list[TaskResult]]:
    """Score subjects of one base and one configuration."""
    results: dict[int, list[TaskResult]] = {}
    deferred: dict[int, tuple[AdaptersBySite, str]] = {}

    def score(number: int, jobs: Sequence[Job], checksum: str = "") -> None:
        one = subjects[number]
        told = {"model_name": one.model.path, "adapter": one.method, "checksum": checksum}
        results[number] = evaluate(model, tokenizer, one.evaluate, one.folder, jobs=jobs, progress=progress, **told)

    for number, one in enumerate(subjects):
        check_contamination(one, [job.sample for job in jobs])
        if one.adapter:
            load_adapter(model, one.adapter)
        if zero3:
            engine = init_inference_engine(model.requires_grad_(False), zero3)
            score(number, jobs)
            engine.destroy()
            break
        # The published evaluator runs adapters in training mode on demand, which is no form of W + B A.
        can_join = LLM_ADAPTERS_PUBLISHED not in one.evaluate.protocols and can_batch_adapters(model)
        if one.evaluate.batch_adapters and can_join:
            deferred[number] = adapters(model), weights_checksum(model)
        else:
            score(number, jobs)
        remove_adapters(model)

    shared = [MultiAdapterScorer(job.scorer, len(deferred)) for job in jobs]
    with batch_adapters(model, [found for found, _ in deferred.values()]):
        for index, (number, (_, checksum)) in enumerate(deferred.items()):
            for scorer in shared:
                scorer.index = index
            score(number, [replace(job, scorer=one) for job, one in zip(jobs, shared, strict=True)], checksum)
    return [results[number] for number in range(len(subjects))]


class MultiAdapterScorer:
    """A scorer for subjects that are mixed: the first one's batches are scored for all, and the others find theirs.

    A batch that a killed scoring left to the later ones alone is scored for all again, so that it is the very same.
    """

    def __init__(self, scorer: Scorer, count: int) -> None:
        self.scorer, self.count = scorer, count
        self.index = 0  # whose turn it is
        self.name, self.metrics = scorer.name, scorer.metrics
        self.writes, self.truncated = scorer.writes, scorer.truncated
        self.fingerprint_fields = scorer.fingerprint_fields
        self.sizes = [(count * rows, length) for rows, length in scorer.sizes]
        self.found: list[dict[int, ItemRecord]] = [{} for _ in range(count)]

    def shared_prefix(self, model: Any) -> AbstractContextManager[None]:
        """Read nothing ahead: each subject would read it differently."""
        return nullcontext()

    def score(self, model: Any, batch: Sequence[int]) -> list[ItemRecord]:
        """Return what the subject whose turn it is has for the items of these numbers."""
        mine = self.found[self.index]
        if not mine.keys() >= set(batch):
            records = self.scorer.score(model, [*batch] * self.count)
            for index, found in enumerate(self.found):
                found.update(zip(batch, records[index * len(batch) :], strict=False))
        return [mine[number] for number in batch]


def check_contamination(subject: EvaluationSubject, samples: Iterable[Sample]) -> None:
    """Raise UserError where a run was trained on many of the items; print a note where they are few."""
    for name, (seen, of) in find_overlap(subject.mixture, samples).items():
        told = f"{subject.folder} was trained on {subject.mixture}, which holds {seen} of {of} items of {name}"
        if seen > MAX_OVERLAP * of and subject.evaluate.on_contamination == "error":
            raise UserError(
                f"{told}: its score would say nothing. Score other suites (evaluate.tasks=...), or this one with "
                "evaluate.on_contamination=warn"
            )
        if is_main():
            logger.warning("note: %s", told)
