"""What the commands do, as functions: for notebooks and other programs. ``import subspace`` offers them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from subspace.config import RunConfig, read_config, read_subject

if TYPE_CHECKING:
    from subspace.evaluation.results import TaskResult


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
    """Score a run's folder, a configuration's base model, or a model by name or path, and return a result a task.

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
