"""Scored runs, as tables and comparisons take them: seeds of one method together, and what is unlike refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from subspace.common.declarations import read_yaml
from subspace.data.tasks import list_tasks
from subspace.data.tokenization import common_prefix_length
from subspace.errors import UserError, nearest
from subspace.evaluation.results import TaskResult, read_items, read_results
from subspace.reporting.statistics import Array

# How two runs are made alike in an ingredient of their fingerprints.
REMEDIES = {
    "items": "score both with the same evaluate.limit and evaluate.split",
    "template": "score both with the same evaluate.prompt and the same declarations",
    "tokenizer": "use one base model: another tokenizer cuts the texts differently",
}
IGNORED_KEYS = ("name", "runs", "evaluate", "published")
"""Settings in which runs of one method may differ besides the seed: they change nothing that is learnt."""


class Correctness(NamedTuple):
    """The ids of a task's items, and by metric which of them are right."""

    ids: tuple[str, ...]
    right: dict[str, npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class ScoredRun:
    """One run's name, folder, configuration (nothing for a base model), and its results by task, of one protocol."""

    name: str
    folder: Path
    config: dict[str, Any]
    results: dict[str, TaskResult]
    _read: dict[str, Correctness] = field(default_factory=dict, compare=False)

    @property
    def about(self) -> str:
        """Which model was scored, with which adapters, in which precision."""
        one = next(iter(self.results.values()))
        return f"{one.model or 'a model'}{f' with {one.adapter}' if one.adapter else ''}, {one.dtype}"

    @property
    def seed(self) -> int | None:
        """The seed it was trained with."""
        seed: int | None = self.config.get("train", {}).get("seed")
        return seed

    @property
    def config_without_seed(self) -> str:
        """What was trained, whatever the seed: equal for runs that are one method's."""
        if self.seed is None:
            return self.name
        kept = {name: value for name, value in self.config.items() if name not in IGNORED_KEYS}
        return json.dumps({**kept, "train": {**kept["train"], "seed": None}}, sort_keys=True, default=str)

    def marks(self, task: str) -> Correctness:
        """Return which items of a task are right, by metric. They are read once."""
        if task not in self._read:
            result = self.results[task]
            if result.items is None:
                raise UserError(
                    f"{self.name} kept no items of {title(task)}. Score it again: subspace evaluate {self.folder}"
                )
            records = read_items(result.items)
            ids = tuple(str(record["id"]) for record in records)
            right = {m: np.array([bool(record["correct"][m]) for record in records]) for m in result.metrics}
            self._read[task] = Correctness(ids, right)
        return self._read[task]


@dataclass(frozen=True)
class Column:
    """One method: a run, or several that differ in their seeds."""

    name: str
    runs: tuple[ScoredRun, ...]

    @property
    def about(self) -> str:
        """What it is, in words."""
        if len(self.runs) == 1:
            return self.runs[0].about
        seeds = ", ".join(f"{run.name} (seed {run.seed})" for run in self.runs)
        return f"{self.runs[0].about}; {len(self.runs)} seeds: {seeds}"

    def result(self, task: str) -> TaskResult | None:
        """The first run's result of a task, if every run has one."""
        found = [run.results.get(task) for run in self.runs]
        return found[0] if all(found) else None

    def marks(self, task: str, metric: str) -> Array:
        """Which items each seed got right: ``(seeds, items)``, as 0 and 1."""
        return np.array([run.marks(task).right[metric] for run in self.runs], dtype=float)


def load_runs(folders: Sequence[Path], protocol: str | None = None) -> list[list[Column]]:
    """Read these runs' results, those of different seeds together: by the named protocol, or by all that they share."""
    folders = list(dict.fromkeys(folders))
    names = _names(folders)
    scored: dict[str, dict[str, ScoredRun]] = {}  # by protocol, then by name
    for name, folder in zip(names, folders, strict=True):
        file = folder / "config.yaml"
        config = read_yaml(file) if file.is_file() else {}
        for result in read_results(folder):
            run = scored.setdefault(result.protocol, {}).setdefault(name, ScoredRun(name, folder, config, {}))
            run.results[result.task] = result

    if protocol is not None and protocol not in scored:
        raise UserError(f"none of {', '.join(names)} was scored by {protocol!r}. {nearest(protocol, scored)}")
    wanted = [protocol] if protocol else [name for name, runs in scored.items() if len(runs) == len(names)]
    for name in wanted or scored:
        if lacking := [str(folder) for run, folder in zip(names, folders, strict=True) if run not in scored[name]]:
            raise UserError(
                f"{', '.join(names)} cannot be put side by side: {lacking[0]} was not scored by {name}. "
                f"Run: subspace evaluate {lacking[0]} evaluate.protocol={name}"
            )
    return [_columns(scored[name].values()) for name in wanted]


def _columns(runs: Iterable[ScoredRun]) -> list[Column]:
    """Put runs of different seeds together. A seed that is there again is another column: it is no new evidence."""
    together: dict[tuple[str, int], list[ScoredRun]] = {}
    for run in runs:
        again = 0
        while any(run.seed == other.seed for other in together.get((run.config_without_seed, again), [])):
            again += 1
        together.setdefault((run.config_without_seed, again), []).append(run)
    return [Column(_column_name([run.name for run in several]), tuple(several)) for several in together.values()]


def _column_name(names: Sequence[str]) -> str:
    """Return what seeds of one method are called: ``dora ×3`` of ``dora-seed0``, ``dora-seed1``, ``dora-seed2``."""
    if len(names) == 1:
        return names[0]
    alike = names[0][: common_prefix_length(names)]
    name = re.sub(r"[-_.]*(seed|s)?[-_.]*$", "", alike)  # without what stands before the seed's number
    return f"{name or names[0]} ×{len(names)}"


def ensure_comparable(runs: Sequence[ScoredRun]) -> None:
    """Refuse runs that differ in what they were asked, with what makes them alike."""
    first: dict[str, ScoredRun] = {}
    for run in runs:
        for task, other in run.results.items():
            name, one = (known := first.setdefault(task, run)).name, known.results[task]
            if one.fingerprint == other.fingerprint:
                if known.marks(task).ids != run.marks(task).ids:
                    raise UserError(
                        f"{name} and {run.name} cannot be put side by side: the items of {title(task)} in {one.items} "
                        f"and {other.items} are not the same ones. Score both again: subspace evaluate"
                    )
                continue
            parts = dict.fromkeys([*one.fingerprint_fields, *other.fingerprint_fields])
            unlike = [part for part in parts if one.fingerprint_fields.get(part) != other.fingerprint_fields.get(part)]
            remedy = REMEDIES.get(unlike[0], "score both with the same version of subspace and its declarations")
            raise UserError(
                f"{name} and {run.name} cannot be put side by side: in {title(task)} they differ in "
                f"{', '.join(unlike)} ({one.n} items, fingerprint {one.fingerprint}; {other.n} items, fingerprint "
                f"{other.fingerprint}). To compare them, {remedy}"
            )


def _names(folders: Sequence[Path]) -> list[str]:
    """Call each run by its folder's name, or by its whole path where two have the same."""
    last = [folder.resolve().name for folder in folders]
    return [name if last.count(name) == 1 else str(folder) for name, folder in zip(last, folders, strict=True)]


def title(task: str) -> str:
    """Return what a task is called in a table."""
    known = list_tasks(None)
    return known[task].title if task in known else task


def suite(task: str) -> str:
    """Return the suite that a task belongs to; a mean is over one."""
    known = list_tasks(None)
    return known[task].suite if task in known else "other"
