"""The runs of a study: one folder each, ``runs/STUDY/METHOD/rate-3.2e-4/seed-0``, and what is read from it.

A cell is an ordinary run of ``subspace train``, and all that a study knows of its progress lies in its folder.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace.common.foreign.text import MOST_RESULT_BYTES, read_text
from subspace.common.foreign.yaml_files import format_value
from subspace.config import RunConfig, read_config
from subspace.evaluation.results import RESULTS
from subspace.evaluation.retention import retention_file
from subspace.study.grid import Grid
from subspace.study.search import Losses, Outcome, Trial, search
from subspace.training.checkpoint import read_environment
from subspace.training.logging import LOG_FILE

#: Written into a cell's folder when its training failed, as with a loss that is not finite: the command's last words.
FAILED_FILE = "failed.txt"
#: The settings of a cell that is trained together with others.
CELL_FILE = "cell.yaml"
#: What a cell's command printed.
OUTPUT_FILE = "output.txt"


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    grid: Grid
    method: str
    trial: Trial
    seed: int

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.grid.folder / self.method / trial_name(self.trial) / f"seed-{self.seed}"

    def overrides(self) -> list[str]:
        """Return the run's settings in place of the base's, as ``key=value``."""
        axes = [f"{axis_key(name)}={format_value(value)}" for name, value in self.trial.axes]
        rungs = self.grid.rules.rungs
        # Rungs are multiples of the first. Finals are judged at their end; a loss on the way is for the curves.
        every = rungs[0] if self.seed in self.grid.search_seeds else -(-rungs[-1] // 2)
        return [
            *self.grid.overrides,
            *self.grid.contender(self.method).overrides(),
            *axes,
            f"train.learning_rate={self.trial.rate!r}",
            f"train.seed={self.seed}",
            f"train.validate_every={every}",
            "train.patience=0",
            "train.save_final=last",
            "train.keep_checkpoints=2",  # the one from which those that share a pass go on, while it ends
            f"runs={format_value(str(self.folder.parent))}",
            f"name={self.folder.name}",
        ]

    def config(self) -> RunConfig:
        """Return the run's configuration."""
        return read_config(self.grid.base, self.overrides())

    def train_arguments(self, until: int | None = None) -> list[str]:
        """Return the arguments of the command that trains the run, up to a step."""
        pause = ["--until", str(until)] if until is not None and until < self.grid.steps else []
        return ["train", self.grid.base, *self.overrides(), "--resume", *pause]

    def losses(self) -> dict[int, float]:
        """Return the held-out loss after each step where it was taken; all infinite if training failed."""
        if self.failed:
            return dict.fromkeys(self.grid.rules.rungs, math.inf)
        return {int(line["step"]): float(line["validation_loss"]) for line in self.log() if "validation_loss" in line}

    def log(self) -> list[dict[str, Any]]:
        """Return the lines of the run's log; none that a kill cut short."""
        return list(_lines(self.folder / LOG_FILE))

    @property
    def failed(self) -> bool:
        """Whether its training ended in a failure of the run itself."""
        return (self.folder / FAILED_FILE).exists()

    @property
    def begun(self) -> bool:
        """Whether there is anything of it."""
        return (self.folder / LOG_FILE).exists() or self.failed

    @property
    def ended(self) -> bool:
        """Whether it is trained to the end, by what its folder says; :func:`is_finished` compares its settings too."""
        return "outcome" in self.facts()

    @property
    def scored(self) -> bool:
        """Whether it was scored."""
        return (self.folder / RESULTS).exists()

    @property
    def measured(self) -> bool:
        """Whether it was measured what is kept of the base."""
        return retention_file(self.folder).exists()

    @property
    def seconds(self) -> float | None:
        """What its training took; of one that shared its passes with others, its share. None if it is not known."""
        last = max((line for line in self.log() if "seconds" in line), key=lambda line: int(line["step"]), default={})
        facts = self.facts()
        seconds = facts.get("outcome", last).get("seconds")
        return None if seconds is None else float(seconds * facts.get("share", 1.0))

    @property
    def peak_memory(self) -> int | None:
        """The peak of its process's memory in bytes; None if that is not known, or was that of others too."""
        last = max((line for line in self.log() if "seconds" in line), key=lambda line: int(line["step"]), default={})
        facts = self.facts()
        found: int | None = facts.get("outcome", last).get("peak_memory")
        return None if "together" in facts else found

    def facts(self) -> dict[str, Any]:
        """Return the run's ``environment.json``; empty without one. It raises UserError for one of another kind."""
        return read_environment(self.folder)


def trial_name(trial: Trial) -> str:
    """Return a trial's folder: ``rate-3.2e-4``, and the values of its axes."""
    mantissa, _, power = f"{trial.rate:.1e}".partition("e")
    parts = [f"rate-{mantissa.removesuffix('.0')}e{int(power)}"]
    parts += [f"{name.rpartition('.')[2]}-{format_value(value)}" for name, value in trial.axes]
    return re.sub(r"[^\w.+-]+", "-", "_".join(parts))


def axis_key(name: str) -> str:
    """Return the setting that an axis varies: a method's own has no section."""
    return name if "." in name else f"method.{name}"


def read_losses(grid: Grid, trials: Mapping[str, Sequence[Trial]]) -> Losses:
    """Return the search's losses on disk: means over its seeds, where each of them has one."""
    found: dict[tuple[str, Trial, int], float] = {}
    for method, tried in trials.items():
        for trial in tried:
            of_seeds = [Cell(grid, method, trial, seed).losses() for seed in grid.search_seeds]
            for step in grid.rules.rungs:
                if all(step in losses for losses in of_seeds):
                    found[method, trial, step] = sum(losses[step] for losses in of_seeds) / len(of_seeds)
    return found


def read_search(grid: Grid) -> tuple[Outcome, Losses]:
    """Return where the search stands by what is on disk, and the losses that it stands on."""
    trials: Mapping[str, Sequence[Trial]] = grid.planned
    while True:
        losses = read_losses(grid, trials)
        outcome = search(grid.planned, losses, grid.rules)
        if {name: tuple(tried) for name, tried in trials.items()} == dict(outcome.trials):
            return outcome, losses
        trials = outcome.trials  # ladders have grown: read what the new trials have


def search_cells(grid: Grid, outcome: Outcome) -> list[Cell]:
    """Return the cells of all trials of the search, in the order of their methods."""
    trials = [(method, trial) for method, tried in outcome.trials.items() for trial in tried]
    return [Cell(grid, method, trial, seed) for method, trial in trials for seed in grid.search_seeds]


def final_cells(grid: Grid, outcome: Outcome) -> list[Cell]:
    """Return the finals of the methods whose best trial is known, seed by seed, so that an early stop leaves pairs."""
    return [Cell(grid, method, trial, seed) for seed in grid.final_seeds for method, trial in outcome.best.items()]


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.exists():
        return
    for line in read_text(file, most=MOST_RESULT_BYTES).splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and "step" in found:
            yield found
