"""Scoring of several subjects: each base model is loaded once, and adapters are injected and removed in turn.

A subject is a base model alone, or with a run's adapters. Subjects of one base may have adapters of any methods. The
tasks are encoded once for all subjects with the same settings. With ``evaluate.batch_adapters``, subjects whose
adapters can be batched share their batches. With ``evaluate.engine`` the base is sharded over the processes (ZeRO-3)
and loaded again for each subject, because DeepSpeed's engine wraps base and adapters together.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from subspace.adapters.inject import adapters, remove_adapters
from subspace.adapters.merging import scale_updates
from subspace.adapters.multi_adapter import AdaptersBySite, batch_adapters, can_batch_adapters
from subspace.adapters.serialization import check_adapter_base, load_adapter
from subspace.common.locks import in_use
from subspace.common.progress import Progress, no_progress
from subspace.data.chat.template import ChatTemplate, read_template
from subspace.data.leakage import MAX_OVERLAP, TrainedTexts, find_overlap
from subspace.data.samples import Sample, select_samples
from subspace.distributed import watchdog
from subspace.distributed.collectives import broadcast_object, is_main, rank, world_size
from subspace.distributed.deepspeed_config import resolve_deepspeed_config_for_inference
from subspace.distributed.engine import init_inference_engine
from subspace.distributed.watchdog import LOADING_PATIENCE, Watchdog
from subspace.errors import UserError, file_trouble
from subspace.evaluation.config import LLM_ADAPTERS_PUBLISHED, EvaluationSubject
from subspace.evaluation.evaluate import Job, build_jobs, evaluate
from subspace.evaluation.fingerprint import weights_checksum
from subspace.evaluation.protocols.base import Scorer
from subspace.evaluation.records import ItemRecord
from subspace.evaluation.results import TaskResult, digest
from subspace.evaluation.retention import RetentionMeter
from subspace.models.base_record import identify
from subspace.models.config import ModelConfig
from subspace.models.inspection import inspect_model
from subspace.models.loading import open_model, open_shape, open_tokenizer

logger = logging.getLogger(__name__)


def evaluate_subjects(
    subjects: Sequence[EvaluationSubject],
    progress: Progress = no_progress,
    on_jobs: Callable[[list[Job]], None] | None = None,
) -> list[list[TaskResult]]:
    """Score the subjects and return the results of each. Collective: all ranks call it.

    ``on_jobs`` is called with the jobs of each group of subjects before they are scored.
    """
    with _alone([subject.folder for subject in subjects]), _watchdog(subjects):
        return _evaluate_alone(subjects, watchdog.beating(progress), on_jobs)


def _evaluate_alone(
    subjects: Sequence[EvaluationSubject], progress: Progress, on_jobs: Callable[[list[Job]], None] | None
) -> list[list[TaskResult]]:
    """Score subjects whose folders no other process writes to."""
    for subject in subjects:  # what the settings alone decide is refused first
        if subject.evaluate.engine:
            _check_sharded(subject)
            resolve_deepspeed_config_for_inference(subject.evaluate.engine, subject.model.dtype)
    subjects = [replace(subject, model=inspect_model(subject.model)) for subject in subjects]
    for subject in subjects:  # before any of them is loaded
        if subject.adapter:
            check_adapter_base(subject.adapter, base=identify(subject.model))
            if not subject.model.trust_remote_code:  # foreign code may not bear a model without values
                _put_adapters(open_shape(subject.model), subject, any_base=True)
    samples, texts = dict[str, list[Sample]](), TrainedTexts()
    for subject in subjects:
        selection = str(subject.evaluate.selection)
        if selection not in samples:
            samples[selection] = select_samples(subject.evaluate.selection)
        check_contamination(subject, samples[selection], texts)
    _tell_without_effect(subjects)
    results: dict[int, list[TaskResult]] = {}
    bases: dict[tuple[ModelConfig, int | None], dict[str, list[int]]] = {}
    for number, subject in enumerate(subjects):
        sharded = number if subject.evaluate.engine else None  # a base of its own
        asked = f"{subject.evaluate} {_chat_form(subject)}"
        bases.setdefault((subject.model, sharded), {}).setdefault(asked, []).append(number)
    for (base, sharded), groups in bases.items():
        file = None if sharded is None else subjects[sharded].evaluate.engine
        zero3 = resolve_deepspeed_config_for_inference(file, base.dtype) if file else None
        watchdog.beat("the loading of the model", LOADING_PATIENCE)
        opened = open_model(base, zero3), open_tokenizer(base)
        for numbers in groups.values():
            group = [subjects[number] for number in numbers]
            settings, model = group[0].evaluate, opened[0]
            tokenizer = _with_chat_form(opened[1], group[0])
            jobs = build_jobs(model, tokenizer, settings, progress, samples[str(settings.selection)])
            if on_jobs:
                on_jobs(jobs)
            results.update(zip(numbers, _score_group(model, tokenizer, group, jobs, progress, zero3), strict=True))
    return [results[number] for number in range(len(subjects))]


def _check_sharded(subject: EvaluationSubject) -> None:
    """Raise UserError for what needs base and adapters apart, which DeepSpeed's engine wraps together."""
    cure = f"Leave evaluate.engine out, or merge and score that: subspace merge {subject.folder}"
    if subject.scale != 1:
        raise UserError(f"--scale was asked for with evaluate.engine, which shards the weights. {cure} --scale ...")
    if subject.evaluate.retention != "none":
        raise UserError(
            f"evaluate.retention={subject.evaluate.retention} was asked for with evaluate.engine, under which the base "
            f"cannot be measured beside its runs. {cure}"
        )


def _tell_without_effect(subjects: Iterable[EvaluationSubject]) -> None:
    """Log a note for settings that none of the protocols reads."""
    for protocols, idle in {(tuple(s.evaluate.protocols), tuple(s.evaluate.without_effect)) for s in subjects}:
        if idle and is_main():
            names = ", ".join(f"evaluate.{name}" for name in idle)
            logger.warning("note: %s: without effect on how %s is scored", names, " and ".join(protocols))


def _chat_form(subject: EvaluationSubject) -> tuple[str | None, str] | None:
    """Return what the chat form of a subject follows from besides the tokenizer; None if it is not asked in one."""
    return (subject.chat_template, subject.date) if subject.evaluate.chat_template else None


def _with_chat_form(tokenizer: Any, subject: EvaluationSubject) -> Any:
    """Return the tokenizer, where it is asked for with the chat template and the date of the subject's training."""
    if not subject.evaluate.chat_template:
        return tokenizer
    template = read_template(subject.chat_template)
    if not (template or getattr(tokenizer, "chat_template", None)):
        return tokenizer  # the protocol tells that it has none
    source = ChatTemplate(tokenizer, subject.date, template).source(tools=False)
    if source == tokenizer.chat_template:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = source
    return tokenizer


@contextmanager
def _alone(folders: Sequence[Path]) -> Iterator[None]:
    """Hold the subjects' folders for this scoring. Collective: the first process holds them for all."""
    with ExitStack() as held:
        problem = None
        if is_main():
            try:
                for folder in sorted({folder.resolve() for folder in folders}):
                    held.enter_context(in_use(folder))
            except (UserError, OSError) as error:
                problem = str(file_trouble(error) or error)
        if problem := broadcast_object(problem):
            raise UserError(problem)
        yield


def _watchdog(subjects: Sequence[EvaluationSubject]) -> Watchdog:
    minutes = max((subject.evaluate.hang_minutes for subject in subjects), default=0.0)
    return Watchdog(subjects[0].folder / "hang", 60 * minutes, rank(), world_size())


def _score_group(
    model: Any,
    tokenizer: Any,
    subjects: Sequence[EvaluationSubject],
    jobs: Sequence[Job],
    progress: Progress,
    zero3: dict[str, Any] | None,
) -> list[list[TaskResult]]:
    """Return the results of subjects that have the same base and evaluation settings."""
    results: dict[int, list[TaskResult]] = {}
    deferred: dict[int, tuple[AdaptersBySite, str]] = {}
    settings = subjects[0].evaluate
    meter = None if settings.retention == "none" else RetentionMeter(model, tokenizer, settings, progress)

    def score(number: int, jobs: Sequence[Job], checksum: str = "") -> None:
        subject = subjects[number]
        results[number] = evaluate(
            model, tokenizer, subject.evaluate, subject.folder, jobs=jobs, progress=progress, checksum=checksum,
            model_name=subject.model.path, adapter=_adapter_name(subject), base=identify(subject.model).short(),
        )  # fmt: skip

    for number, subject in enumerate(subjects):
        _put_adapters(model, subject)
        if zero3:
            engine = init_inference_engine(model.requires_grad_(False), zero3)
            score(number, jobs)
            engine.destroy()
            break
        checksum = _checksum(model, subject)
        if meter:
            _measure_retention(meter, model, subject, checksum)
        # The published evaluator may run adapters in training mode (dropout), which is not of the form W + B A.
        can_join = LLM_ADAPTERS_PUBLISHED not in subject.evaluate.protocols and can_batch_adapters(model)
        if subject.evaluate.batch_adapters and can_join:
            deferred[number] = adapters(model), checksum
        else:
            score(number, jobs, checksum)
        remove_adapters(model)
    if meter:
        meter.close()

    shared = [MultiAdapterScorer(job.scorer, len(deferred)) for job in jobs]
    with batch_adapters(model, [by_site for by_site, _ in deferred.values()]):
        for index, (number, (_, checksum)) in enumerate(deferred.items()):
            for scorer in shared:
                scorer.index = index
            score(number, [replace(job, scorer=scorer) for job, scorer in zip(jobs, shared, strict=True)], checksum)
    return [results[number] for number in range(len(subjects))]


def _put_adapters(model: Any, subject: EvaluationSubject, *, any_base: bool = False) -> None:
    """Load a subject's adapters, if it has any, into its base, as strong as they are to be."""
    if subject.adapter:
        load_adapter(model, subject.adapter, any_base=any_base)
    if subject.scale != 1:
        scale_updates(model, subject.scale)


def _checksum(model: Any, subject: EvaluationSubject) -> str:
    """Return the checksum of a subject that is loaded: of its weights, and of how strong they are."""
    checksum = weights_checksum(model)
    return checksum if subject.scale == 1 else digest([checksum, subject.scale])


def _adapter_name(subject: EvaluationSubject) -> str:
    return subject.method if subject.scale == 1 else f"{subject.method} x {subject.scale:g}"


def _measure_retention(meter: RetentionMeter, model: Any, subject: EvaluationSubject, checksum: str) -> None:
    """Measure a subject that is loaded, and before the first with adapters their base, unless that is done."""
    if meter.is_measured(subject.folder, checksum):
        return
    if subject.adapter and meter.base is None:
        remove_adapters(model)
        meter.measure_base(model, subject.folder, weights_checksum(model))
        _put_adapters(model, subject)
    meter.measure(model, subject.folder, checksum, model_name=subject.model.path, adapter=_adapter_name(subject))


class MultiAdapterScorer:
    """Scorer of subjects that share batches: scoring a batch for the first subject stores the records of all others.

    If an interrupted scoring left a batch to the later subjects only, it is scored for all again, so that the batch has
    the same composition.
    """

    def __init__(self, scorer: Scorer, count: int) -> None:
        self.scorer, self.count = scorer, count
        self.index = 0  # of the subject whose records are returned
        self.name, self.metrics = scorer.name, scorer.metrics
        self.writes, self.truncated = scorer.writes, scorer.truncated
        self.fingerprint_fields = scorer.fingerprint_fields
        self.sizes = [(count * rows, length) for rows, length in scorer.sizes]
        self.records: list[dict[int, ItemRecord]] = [{} for _ in range(count)]

    def shared_prefix(self, model: Any) -> AbstractContextManager[None]:
        """Prefill nothing: the keys and values of a prefix differ between subjects."""
        return nullcontext()

    def score(self, model: Any, batch: Sequence[int]) -> list[ItemRecord]:
        """Return the current subject's records of the items with these numbers."""
        current = self.records[self.index]
        if not current.keys() >= set(batch):
            scored = self.scorer.score(model, [*batch] * self.count)
            for index, records in enumerate(self.records):
                records.update(zip(batch, scored[index * len(batch) :], strict=False))
        return [current[number] for number in batch]


def check_contamination(
    subject: EvaluationSubject, samples: Iterable[Sample], texts: TrainedTexts | None = None
) -> None:
    """Raise UserError if a run was trained on more than ``MAX_OVERLAP`` of a task's items; log a note if on fewer.

    With ``evaluate.on_contamination=warn`` a note is logged in either case; so is one where nobody knows.
    """
    if subject.adapter and not subject.mixture and is_main():
        logger.warning(
            "note: what %s was trained on is not known, so whether it saw the items is not either", subject.folder
        )
    try:
        overlap = find_overlap(subject.mixture, samples, subject.columns, texts)
    except UserError as error:  # files that were moved, say
        unknown = f"{subject.folder} was trained on {subject.mixture}, and whether it saw the items is unknown: {error}"
        if subject.evaluate.on_contamination == "error":
            raise UserError(f"{unknown}. evaluate.on_contamination=warn scores it all the same") from None
        if is_main():
            logger.warning("note: %s", unknown)
        return
    for name, (seen, of) in overlap.items():
        finding = f"{subject.folder} was trained on {subject.mixture}, which holds {seen} of {of} items of {name}"
        if seen > MAX_OVERLAP * of and subject.evaluate.on_contamination == "error":
            raise UserError(
                f"{finding}: its score would be meaningless. Score other suites (evaluate.tasks=...), or this one with "
                "evaluate.on_contamination=warn"
            )
        if is_main():
            logger.warning("note: %s", finding)
