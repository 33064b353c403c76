"""Scored runs, grouped by method over seeds, and checks that they are comparable.

A column has one subject a seed: results in a folder that are of different weights (another dtype, another base, a run
that was trained again) are runs of their own here, so that no mean is taken over them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import TypedDict

from subspace.common.foreign.text import checked
from subspace.common.foreign.yaml_files import read_yaml
from subspace.data.tasks import list_tasks
from subspace.data.tokenization import common_prefix_length
from subspace.errors import UserError, nearest
from subspace.evaluation.results import TaskResult, read_results, read_verified_items
from subspace.reporting.facts import TrainingFacts, join_facts, read_facts
from subspace.reporting.retention import Kept, read_kept
from subspace.reporting.statistics import Array

# How to make two runs agree in a field of their fingerprints.
REMEDIES = {
    "items": "score both with the same evaluate.limit and evaluate.split",
    "template": "score both with the same evaluate.prompt and the same declarations",
    "tokenizer": "use one base model: another tokenizer cuts the texts differently",
}
IGNORED_KEYS = ("name", "runs", "evaluate", "published")
"""Settings besides the seed in which runs of one method may differ: they do not affect training."""


class _Train(TypedDict, total=False):
    seed: int


class _Config(TypedDict, total=False):
    """What a run's configuration is taken apart by here."""

    train: _Train


class Correctness(NamedTuple):
    """Ids of a task's items, and for each metric whether they are correct."""

    ids: tuple[str, ...]
    right: dict[str, npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class ScoredRun:
    """Results of one run by one protocol, by task; ``config`` is empty for a base model."""

    name: str
    folder: Path
    config: dict[str, Any]
    results: dict[str, TaskResult]
    _read: dict[str, Correctness] = field(default_factory=dict, compare=False)

    @property
    def about(self) -> str:
        """Description of the scored model: its name, adapters and precision."""
        result = next(iter(self.results.values()))
        adapter = f" with {result.adapter}" if result.adapter else ""
        return f"{result.model or 'a model'}{adapter}, {result.dtype}"

    @property
    def seed(self) -> int | None:
        """The training seed; None for a base model."""
        train = self.config.get("train")
        seed: int | None = train.get("seed") if isinstance(train, dict) else None
        return seed

    @property
    def facts(self) -> TrainingFacts:
        """What training took."""
        return read_facts(self.folder, self.config)

    @property
    def config_without_seed(self) -> str:
        """The training configuration without its seed, as JSON: equal for runs of one method."""
        if self.seed is None:
            return self.name
        kept = {name: value for name, value in self.config.items() if name not in IGNORED_KEYS}
        scored = next(iter(self.results.values()))
        base = {"dtype": scored.dtype, "weights": scored.base.get("weights")}  # with which they were scored
        return json.dumps(
            {**kept, "train": {**kept["train"], "seed": None}, "scored": base}, sort_keys=True, default=str
        )

    def marks(self, task: str) -> Correctness:
        """Return the correctness of a task's items, read and compared with their row once."""
        if task not in self._read:
            result = self.results[task]
            records = read_verified_items(result)
            ids = tuple(str(record["id"]) for record in records)
            right = {m: np.array([bool(record["correct"][m]) for record in records]) for m in result.metrics}
            self._read[task] = Correctness(ids, right)
        return self._read[task]


@dataclass(frozen=True)
class Column:
    """One method: a run, or several runs that differ only in their seeds."""

    name: str
    runs: tuple[ScoredRun, ...]

    @property
    def about(self) -> str:
        """Description of the method's model and seeds."""
        if len(self.runs) == 1:
            return self.runs[0].about
        seeds = ", ".join(f"{run.name} (seed {run.seed})" for run in self.runs)
        return f"{self.runs[0].about}; {len(self.runs)} seeds: {seeds}"

    def result(self, task: str) -> TaskResult | None:
        """Return the first run's result of a task, or None unless every run has one."""
        results = [run.results.get(task) for run in self.runs]
        return results[0] if all(results) else None

    @property
    def facts(self) -> TrainingFacts:
        """What training the method took, over its seeds."""
        return join_facts([run.facts for run in self.runs])

    @cached_property
    def kept(self) -> Kept | None:
        """What the method has kept of its base, where that was measured of the very models that were scored."""
        return read_kept((run.folder, next(iter(run.results.values())).subject) for run in self.runs)

    def marks(self, task: str, metric: str) -> Array:
        """Return the correctness of each item for each seed: ``(seeds, items)``, as 0 and 1."""
        return np.array([run.marks(task).right[metric] for run in self.runs], dtype=float)


def load_runs(folders: Sequence[Path], protocol: str | None = None) -> list[list[Column]]:
    """Return the runs' columns for each protocol, seeds of one method together.

    Args:
        folders: the runs' folders.
        protocol: the protocol to read; None for all that every run was scored by.

    Raises:
        UserError: a run has no or damaged results, or was not scored by the protocol.
    """
    folders = list(dict.fromkeys(folders))
    names = _names(folders)
    scored: dict[str, dict[str, list[ScoredRun]]] = {}  # by protocol, then by name
    for name, folder in zip(names, folders, strict=True):
        file = folder / "config.yaml"
        config: dict[str, Any] = checked(read_yaml(file), _Config, str(file)) if file.is_file() else {}
        by_protocol: dict[str, list[TaskResult]] = {}
        for result in read_results(folder):
            by_protocol.setdefault(result.protocol, []).append(result)
        for scorer, results in by_protocol.items():
            runs = [
                ScoredRun(own, folder, config, {r.task: r for r in alike}) for own, alike in _subjects(name, results)
            ]
            scored.setdefault(scorer, {})[name] = runs

    if protocol is not None and protocol not in scored:
        raise UserError(f"none of {', '.join(names)} was scored by {protocol!r}. {nearest(protocol, scored)}")
    wanted = [protocol] if protocol else [name for name, runs in scored.items() if len(runs) == len(names)]
    for name in wanted or scored:
        if lacking := [str(folder) for run, folder in zip(names, folders, strict=True) if run not in scored[name]]:
            raise UserError(
                f"{', '.join(names)} cannot be compared: {lacking[0]} was not scored by {name}. "
                f"Run: subspace evaluate {lacking[0]} evaluate.protocol={name}"
            )
    return [_columns(run for runs in scored[name].values() for run in runs) for name in wanted]


def _subjects(name: str, results: Sequence[TaskResult]) -> list[tuple[str, list[TaskResult]]]:
    """Return a run's results apart by what was scored, each with a name that tells it from the others."""
    apart: dict[tuple[str, ...], list[TaskResult]] = {}
    for result in results:
        # Earlier versions did not compute the checksum of the weights.
        subject = (result.subject,) if result.subject else (result.model, result.adapter, result.dtype)
        apart.setdefault(subject, []).append(result)
    if len(apart) == 1:
        return [(name, list(results))]
    dtypes = [alike[0].dtype for alike in apart.values()]
    weights = [f"weights {'-'.join(subject)[:8]}" for subject in apart]
    labels = dtypes if len(set(dtypes)) == len(dtypes) else weights
    return [(f"{name} ({label})", alike) for label, alike in zip(labels, apart.values(), strict=True)]


def _columns(runs: Iterable[ScoredRun]) -> list[Column]:
    """Group runs of different seeds. A repeated seed goes into another column: it adds no evidence."""
    together: dict[tuple[str, int], list[ScoredRun]] = {}
    for run in runs:
        repeat = 0
        while any(run.seed == earlier.seed for earlier in together.get((run.config_without_seed, repeat), [])):
            repeat += 1
        together.setdefault((run.config_without_seed, repeat), []).append(run)
    return [Column(_column_name([run.name for run in group]), tuple(group)) for group in together.values()]


def _column_name(names: Sequence[str]) -> str:
    """Return the name of a group of seeds: ``dora ×3`` for ``dora-seed0``, ``dora-seed1``, ``dora-seed2``."""
    if len(names) == 1:
        return names[0]
    prefix = names[0][: common_prefix_length(names)]
    name = re.sub(r"[-_.]*(seed|s)?[-_.]*$", "", prefix)  # without "-seed" before the number
    return f"{name or names[0]} ×{len(names)}"


def ensure_comparable(runs: Sequence[ScoredRun]) -> None:
    """Raise UserError if runs differ in a fingerprint or their items; it names settings that make them comparable."""
    first: dict[str, ScoredRun] = {}
    for run in runs:
        for task, result in run.results.items():
            reference = first.setdefault(task, run)
            expected = reference.results[task]
            problem = f"{reference.name} and {run.name} cannot be compared:"
            if expected.fingerprint == result.fingerprint:
                if reference.marks(task).ids != run.marks(task).ids:
                    raise UserError(
                        f"{problem} the items of {title(task, result)} in {expected.items} and {result.items} differ. "
                        "Score both again: subspace evaluate"
                    )
                continue
            before, after = expected.fingerprint_fields, result.fingerprint_fields
            differing = [name for name in {**before, **after} if before.get(name) != after.get(name)]
            remedy = REMEDIES.get(differing[0], "score both with the same version of subspace and its declarations")
            raise UserError(
                f"{problem} in {title(task, result)} they differ in {', '.join(differing)} ({expected.n} items, "
                f"fingerprint {expected.fingerprint}; {result.n} items, fingerprint {result.fingerprint}). "
                f"To compare them, {remedy}"
            )


def _names(folders: Sequence[Path]) -> list[str]:
    """Return each run's name: its folder's, or its path if two folders have the same name."""
    last = [folder.resolve().name for folder in folders]
    return [name if last.count(name) == 1 else str(folder) for name, folder in zip(last, folders, strict=True)]


def title(task: str, result: TaskResult | None = None) -> str:
    """Return the title of a task in tables; of one that is not declared here, that of its result."""
    known = list_tasks(None)
    return known[task].title if task in known else (result and result.title) or task


def suite(task: str, result: TaskResult | None = None) -> str:
    """Return the suite that a task belongs to; means are taken over a suite. A task without one is its own."""
    known = list_tasks(None)
    return known[task].suite if task in known else (result and result.suite) or task
