"""Saving of checkpoints and the final adapter during a run, and resuming from a checkpoint."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from subspace.adapters.serialization import save_adapter
from subspace.common.files import write_folder
from subspace.data.dataset import Data
from subspace.data.sampler import StepPlan
from subspace.distributed.collectives import barrier, broadcast_object, is_main
from subspace.distributed.deepspeed_compat import skipped_steps
from subspace.errors import RunFailed, RunStopped, UserError
from subspace.training.checkpoint import checkpoint_path, find_corruption, last_checkpoint_hint, prune_checkpoints
from subspace.training.config import TrainConfig
from subspace.training.health_checks import TrainingHealthCheck
from subspace.training.logging import TrainLogger
from subspace.training.resume import ADAPTER, Checkpoint, restore_checkpoint, save_checkpoint


@dataclass
class TrainState:
    """The progress of a training run, and its results so far."""

    steps: int = 0
    loss: float = math.nan  # of the last step
    best_validation: float = math.inf
    best_step: int = 0
    validations_since_best: int = 0

    def add_validation(self, loss: float) -> None:
        """Record a validation loss."""
        self.validations_since_best += 1
        if loss < self.best_validation:
            self.best_validation, self.best_step, self.validations_since_best = loss, self.steps, 0


class ConsumedSamples:
    """A checksum of all rows trained on so far, in order, which verifies the data order on resume."""

    def __init__(self, data: Data, plan: StepPlan) -> None:
        self.keys, self.plan, self.hash = data.train.keys, plan, hashlib.sha256()
        self.held_out = len(data.validation)

    def add(self, step: int) -> None:
        """Add the rows of a step, counted from 1, to the checksum."""
        self.hash.update(self.keys[self.plan[step - 1]].tobytes())

    def facts(self, steps: int) -> dict[str, int]:
        """Return how many rows the first steps took, how many steps the run has, and how many rows are held out.

        Empty for a plan as of a former version, so that its checkpoints are known.
        """
        if self.plan.former:
            return {}
        return {"rows": self.plan.rows_until(steps), "planned": len(self.plan), "held_out": self.held_out}

    def checksum(self) -> str:
        """Return the checksum of all rows added so far."""
        return self.hash.hexdigest()

    def verify(self, steps: int, checksum: str) -> None:
        """Add the rows of the first steps; raise UserError if the result differs from the checksum."""
        if steps > len(self.plan):
            raise UserError(
                f"the run cannot be resumed: it has {steps} steps already, more than the {len(self.plan)} that are "
                "asked for. Raise train.steps or train.epochs, or give this run another name"
            )
        for step in range(1, steps + 1):
            self.add(step)
        if self.checksum() != checksum:
            raise UserError(
                f"the run cannot be resumed: its first {steps} steps used other rows than they would now. Has "
                "the data changed, or train.steps or train.epochs? Undo that change, or give this run another name"
            )


@dataclass
class Checkpointer:
    """Saves a run's checkpoints and its final adapter. Every method is collective over ranks.

    Attributes:
        engine: DeepSpeed's.
        folder: the run's.
        config: the training settings.
        health: rejects an adapter that did not change.
        consumed: the checksum of the rows trained on.
        logger: flushed before each checkpoint.
        settings: stored in checkpoints, to be compared with those of a resumed run.
        about: metadata for ``adapter.json``.
        saved_step: the step of the last checkpoint, saved or restored.
    """

    engine: Any
    folder: Path
    config: TrainConfig
    health: TrainingHealthCheck
    consumed: ConsumedSamples
    logger: TrainLogger
    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    saved_step: int = 0

    def restore(self, checkpoint: Checkpoint) -> TrainState:
        """Restore engine, adapters and data position from a checkpoint; return its state."""
        state = TrainState(**checkpoint.facts["outcome"])
        self.consumed.verify(state.steps, checkpoint.facts["fed"])
        restore_checkpoint(self.engine, checkpoint, self.config.seed)
        self.saved_step = state.steps
        return state

    def is_due(self, step: int) -> bool:
        """Return True every ``save_every`` steps, at the last step, and before it where it has fewer rows.

        A longer run has a full step in its place, and goes on from the checkpoint before it.
        """
        every, plan = self.config.save_every, self.consumed.plan
        ends = (len(plan), len(plan) - plan.ends_small)
        return bool(every) and (step % every == 0 or step in ends)

    def save_if_due(self, state: TrainState) -> None:
        """Save a checkpoint at the steps where one is due, and after the best validation."""
        if self.is_due(state.steps) or state.best_step == state.steps:
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Save a checkpoint unless this step has one, which must not be put at risk; prune old ones."""
        if self.saved_step == state.steps:
            return
        best = {"validation": state.best_validation} if state.best_step == state.steps else {}
        facts = {
            "step": state.steps,
            "outcome": asdict(state),
            "fed": self.consumed.checksum(),
            **self.consumed.facts(state.steps),
            "start": self.health.start,
            "seconds": self.logger.seconds(),
            **self.settings,
        }
        about = {"step": state.steps, **best, **self.about}
        changed = state.steps > skipped_steps(self.engine)  # float16 may have skipped every step so far
        self.logger.flush()
        try:
            save_checkpoint(
                self.engine,
                checkpoint_path(self.folder, state.steps),
                facts,
                about,
                check=self.health.check_file if changed else None,
            )
        except UserError as error:
            raise type(error)(f"{error}. {last_checkpoint_hint(self.folder)}") from None
        if is_main():
            keep, run = self.config.keep_checkpoints, self.settings.get("run")
            prune_checkpoints(self.folder, keep, also=[state.best_step], run=run)
        self.saved_step = state.steps

    def save_and_stop(self, state: TrainState) -> RunStopped:
        """Save a checkpoint and return the error that ends the run."""
        if not state.steps:
            return RunStopped("before the first step, by a signal. The same command with --resume starts it")
        self.save(state)
        return RunStopped(
            f"after step {state.steps}, by a signal. Its checkpoint is saved; repeat the command with --resume"
        )

    def save_final(self, state: TrainState) -> None:
        """Save the last or the best adapter in the run's folder."""
        if self.config.save_final == "best" and state.best_step:
            self._promote(state.best_step)
        else:
            save_adapter(self.engine.module, self.folder / ADAPTER, step=state.steps, **self.about)
        self.health.check_file(self.folder / ADAPTER)

    def _promote(self, step: int) -> None:
        """Copy a checkpoint's adapter to the run's folder."""
        best = checkpoint_path(self.folder, step)
        if problem := broadcast_object(find_corruption(best) if is_main() else None):
            hint = last_checkpoint_hint(self.folder)
            raise RunFailed(f"the best checkpoint, {best}, cannot be kept: {problem}. {hint}")
        if is_main():
            with write_folder(self.folder / ADAPTER) as work:
                shutil.copytree(best / ADAPTER, work, dirs_exist_ok=True)
        barrier()
