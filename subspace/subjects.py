"""Score several subjects in one go: each base model is opened once, and adapters are put in and taken out again.

A subject is a base model as it is, or a run's adapters on it. Subjects of one base may have adapters of any methods.
The tasks are laid out once for all subjects that are scored alike.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from subspace import declarations
from subspace.adapter_file import load_adapter
from subspace.config import Subject
from subspace.contamination import Text, keys
from subspace.distributed import is_main
from subspace.errors import UserError
from subspace.evaluate import Job, Sample, evaluate, lay_out
from subspace.inject import eject
from subspace.model import ModelConfig, open_model, open_tokenizer
from subspace.prepare import task_items
from subspace.progress import Progress, silent
from subspace.results import TaskResult
from subspace.rows import FILES, records

MOST_SEEN = 0.01
"""What share of a suite's items a run may have been trained on before its score says nothing."""


def evaluate_subjects(
    subjects: Sequence[Subject], progress: Progress = silent, tell: Callable[[list[Job]], None] | None = None
) -> list[list[TaskResult]]:
    """Score the subjects, and return the results of each. All ranks call it.

    ``tell`` is told what is about to be scored, before it is.
    """
    results: dict[int, list[TaskResult]] = {}
    bases: dict[ModelConfig, list[int]] = {}
    for number, subject in enumerate(subjects):
        bases.setdefault(subject.model, []).append(number)
    for base, numbers in bases.items():
        model, tokenizer = open_model(base), open_tokenizer(base)
        laid_out: dict[str, list[Job]] = {}
        for number in numbers:
            one = subjects[number]
            alike = str(one.evaluate)
            if alike not in laid_out:
                laid_out[alike] = lay_out(model, tokenizer, one.evaluate, progress)
                if tell:
                    tell(laid_out[alike])
            check_unseen(one, [job.sample for job in laid_out[alike]])
            if one.adapter:
                load_adapter(model, one.adapter)
            results[number] = evaluate(
                model,
                tokenizer,
                one.evaluate,
                one.folder,
                model_name=base.path,
                adapter=one.method,
                progress=progress,
                jobs=laid_out[alike],
            )
            eject(model)
    return [results[number] for number in range(len(subjects))]


def check_unseen(subject: Subject, samples: Iterable[Sample]) -> None:
    """Refuse to score a run on items that it was trained on; say so where they are few.

    The commonsense suites and their own mixtures are left out: what those share is known, and little. An item is seen
    if its question, letters and digits compared, is a training row's.
    """
    from_file = subject.mixture.endswith(FILES)
    by_task = {s.task.name: s for s in samples if from_file or s.task.suite != "commonsense"}
    trained = set(map(_key, _questions(subject.mixture))) if by_task and subject.mixture else set()
    for name, sample in by_task.items():
        asked = [{_key(sample.task.instruction(item)), _key(item["question"])} for item in sample.items]
        seen = sum(not trained.isdisjoint(texts) for texts in asked)
        if not seen:
            continue
        told = f"{subject.folder} was trained on {subject.mixture}, which holds {seen} of {len(asked)} items of {name}"
        if seen > MOST_SEEN * len(asked) and subject.evaluate.seen == "refuse":
            raise UserError(
                f"{told}: its score would say nothing. Score other suites (evaluate.tasks=...), or this one with "
                "evaluate.seen=score"
            )
        if is_main():
            print(f"note: {told}", file=sys.stderr)


def _questions(mixture: str) -> Iterator[str]:
    if mixture.endswith(FILES):
        for _, record in records(Path(mixture)):
            turns = record.get("messages") or [{"content": record.get("instruction", "")}]
            yield from (str(turn["content"]) for turn in turns)
        return
    for task, split in {(part.task, part.split) for part in declarations.mixture(mixture).parts}:
        yield from task_items(task, split)["question"]


def _key(text: str) -> int:
    return keys(Text(text)).question
