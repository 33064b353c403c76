"""The one training loop, and its settings.

The loss of a step is the mean over all its labelled tokens, on every rank and in every micro-batch, so that how a
batch is cut up changes nothing but memory and time.

A run can be stopped and killed. Between two steps a checkpoint holds all that the loop has, and the loop goes on from
one as if it had never stopped, to the bit on the same number of processes.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspace.adapters.base import TrainProgress
from subspace.adapters.inject import adapter_groups
from subspace.adapters.penalties import with_penalties
from subspace.adapters.serialization import save_adapter
from subspace.common.files import write_folder
from subspace.data.collate import IGNORE_INDEX
from subspace.data.dataset import Data
from subspace.data.sampler import StepPlan, shard_batch
from subspace.distributed.collectives import all_reduce_sum, barrier, broadcast_object, is_main, rank
from subspace.distributed.deepspeed_compat import loss_scale_exhausted
from subspace.distributed.deepspeed_config import BatchLayout
from subspace.distributed.engine import gradient_norm, max_abs_gradient
from subspace.distributed.signals import SignalHandler
from subspace.distributed.watchdog import Watchdog
from subspace.errors import RunFailed, RunStopped, UserError
from subspace.models.lm_head import SummedLoss
from subspace.training.acceleration import offload_activations
from subspace.training.checkpoint import checkpoint_path, checkpoints, find_corruption, prune_checkpoints
from subspace.training.config import TrainConfig
from subspace.training.health_checks import TrainingHealthCheck
from subspace.training.logging import TrainLogger
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess
from subspace.training.resume import ADAPTER, Checkpoint, restore_checkpoint, save_checkpoint

#: Steps in a row that float16 may skip before the run is given up.
MAX_SKIPPED_STEPS = 50


@dataclass
class TrainState:
    """What a training left."""

    steps: int = 0
    loss: float = math.nan  # of the last step
    best_validation: float = math.inf
    best_step: int = 0
    validations_since_best: int = 0


def train(
    engine: Any,
    data: Data,
    plan: StepPlan,
    config: TrainConfig,
    layout: BatchLayout,
    folder: Path,
    recorder: TrainLogger,
    *,
    settings: dict[str, Any] | None = None,
    resumed: Checkpoint | None = None,
    **about: Any,
) -> TrainState:
    """Train the engine's adapters by the plan; leave the adapter in ``folder/adapter``. All ranks call it.

    Args:
        engine: DeepSpeed's, with the model and its adapters.
        data: the rows.
        plan: which of them each step takes.
        config: how to train.
        layout: how a step's rows are spread over ranks and micro-batches.
        folder: the run's.
        recorder: told of every step.
        settings: kept in checkpoints, to be compared with those of a run that goes on from one.
        resumed: the checkpoint to go on from.
        **about: for ``adapter.json``.

    Raises:
        RunFailed: a number is not finite, or a trained tensor does not move. The last checkpoint stays.
        RunStopped: a signal asked for it. There is a checkpoint of the last step.
    """
    model: nn.Module = engine.module
    scheduled, access, device = adapter_groups(model), DeepSpeedOptimizerAccess(engine), engine.device
    start = resumed.facts["start"] if resumed else None
    learning = TrainingHealthCheck(model, access, start)
    outcome, fed = TrainState(), ConsumedSamples(data, plan)
    if resumed:
        outcome = TrainState(**resumed.facts["outcome"])
        fed.expect(outcome.steps, resumed.facts["fed"])
        restore_checkpoint(engine, resumed, config.seed)
    saved = outcome.steps

    def save() -> None:
        nonlocal saved
        if saved == outcome.steps:  # there already, and not to be risked
            return
        best = {"validation": outcome.best_validation} if outcome.best_step == outcome.steps else {}
        facts = {
            "step": outcome.steps,
            "outcome": asdict(outcome),
            "fed": fed.checksum(),
            "start": learning.start,
            "seconds": recorder.seconds(),
            **(settings or {}),
        }
        moved = outcome.steps > engine.skipped_steps
        check = learning.check_file if moved else skip_check
        recorder.flush()
        try:
            save_checkpoint(
                engine, checkpoint_path(folder, outcome.steps), facts, {"step": outcome.steps, **best, **about}, check
            )
        except UserError as error:
            raise type(error)(f"{error}. {last_checkpoint_hint(folder)}") from None
        if is_main():
            prune_checkpoints(folder, config.keep_checkpoints, also=[outcome.best_step])
        saved = outcome.steps

    summed_loss = SummedLoss(engine)
    skipped = 0
    with (
        SignalHandler() as interruption,
        Watchdog(folder / "hang", 60 * config.hang_minutes, rank(), layout.ranks) as watchdog,
    ):
        for step in range(outcome.steps + 1, len(plan) + 1):
            if config.patience and outcome.validations_since_best >= config.patience:
                recorder.note(f"stopped after step {step - 1}: no better validation loss since {outcome.best_step}")
                break
            watchdog.beat(step)
            engine.train()
            rows = plan[step - 1]
            parts = shard_batch(rows, rank(), layout.ranks, layout.accumulate)
            micro_batches = [to_device(data.batch(part), device) for part in parts]

            # DeepSpeed averages what each rank and micro-batch contributes, where the mean over tokens wants a sum.
            counts = torch.tensor([*count_tokens(micro_batches), interruption.asked], device=device)
            labelled, seen, asked = all_reduce_sum(counts).tolist()
            if asked:  # by a signal that reached at least one rank; now all know
                raise make_stop_error(outcome.steps, save)
            weight = layout.accumulate * layout.ranks / labelled

            loss = torch.zeros((), device=device)
            for number, batch in enumerate(micro_batches, start=1):
                with offload_activations() if config.offload_activations else nullcontext():
                    summed = summed_loss(batch)
                engine.backward(with_penalties(weight * summed))
                loss += summed.detach() / labelled
                if number == len(micro_batches):
                    loss, gradient = all_reduce_sum(torch.stack([loss, max_abs_gradient(engine)])).unbind()
                    if not torch.isfinite(loss):
                        raise learning.explain(step, f"the loss is {loss.item()}", last_checkpoint_hint(folder))
                    skipped = 0 if torch.isfinite(gradient) else skipped + 1
                    if skipped and not engine.fp16_enabled():
                        raise learning.explain(step, "a gradient is not finite", last_checkpoint_hint(folder))
                    if skipped and (skipped > MAX_SKIPPED_STEPS or loss_scale_exhausted(engine)):
                        what = f"gradients overflow float16 at every loss scale, {skipped} steps in a row"
                        raise learning.explain(step, f"{what} (try model.dtype=bfloat16)", last_checkpoint_hint(folder))
                    for group in scheduled:
                        type(group[0]).before_step(group, TrainProgress(step, len(plan)), access)
                norm = gradient_norm(engine)
                engine.step()  # acts after the last micro-batch only
            for group in scheduled:
                type(group[0]).after_step(group, TrainProgress(step, len(plan)), access)
                for adapter in group:
                    adapter.clear_cache()  # computed from values that have now moved
            learning.after_step(step - engine.skipped_steps)

            fed.add(step)
            outcome.steps, outcome.loss = step, loss.item()
            norm = engine.get_global_grad_norm() if norm is None else norm
            recorder.step(step, loss=outcome.loss, learning_rate=engine.get_lr()[0], norm=norm, tokens=seen)
            if config.validate_every and (step % config.validate_every == 0 or step == len(plan)):
                validate(engine, data, layout, outcome, recorder, watchdog)
            due = config.save_every and (step % config.save_every == 0 or step == len(plan))
            if due or outcome.best_step == step:
                save()

        if config.keep == "best" and outcome.best_step:
            promote_best_checkpoint(folder, outcome.best_step)
        else:
            save_adapter(model, folder / ADAPTER, step=outcome.steps, **about)
        learning.check_file(folder / ADAPTER)
    return outcome


def count_tokens(batches: Sequence[dict[str, Tensor]]) -> tuple[int, int]:
    """Return how many tokens carry loss, and how many are read."""
    labelled = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
    return labelled, sum(int(batch["attention_mask"].sum()) for batch in batches)


def validate(
    engine: Any, data: Data, layout: BatchLayout, outcome: TrainState, recorder: TrainLogger, watchdog: Watchdog
) -> None:
    """Add the mean loss over the held-out rows' labelled tokens to the outcome. Ranks run equally many forwards."""
    engine.eval()
    total = torch.zeros(2, device=engine.device, dtype=torch.float64)
    summed_loss = SummedLoss(engine)
    with torch.no_grad():
        for batch in data.validation_batches(layout.micro_batch, rank(), layout.ranks):
            watchdog.beat(outcome.steps)
            on_device = to_device(batch, engine.device)
            total[0] += summed_loss(on_device)
            total[1] += count_tokens([on_device])[0]
    summed, labelled = all_reduce_sum(total).tolist()
    loss = summed / labelled
    outcome.validations_since_best += 1
    if loss < outcome.best_validation:
        outcome.best_validation, outcome.best_step, outcome.validations_since_best = loss, outcome.steps, 0
    recorder.validation(outcome.steps, loss)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy a batch to where the model computes."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


class ConsumedSamples:
    """A checksum of all rows that training was fed so far, in order: a checkpoint's place in the data."""

    def __init__(self, data: Data, plan: StepPlan) -> None:
        self.keys, self.plan, self.hash = data.train.keys, plan, hashlib.sha256()

    def add(self, step: int) -> None:
        """Take in the rows of a step, the first being 1."""
        self.hash.update(self.keys[self.plan[step - 1]].tobytes())

    def checksum(self) -> str:
        """Return the checksum of what was taken in."""
        return self.hash.hexdigest()

    def expect(self, steps: int, checksum: str) -> None:
        """Take in the first steps; refuse data or plan whose rows there are not those that the checksum stands for."""
        for step in range(1, min(steps, len(self.plan)) + 1):
            self.add(step)
        if self.checksum() != checksum:
            raise UserError(
                f"the run cannot be resumed: its first {steps} steps were fed other rows than they would be now. Has "
                "the data changed, or train.steps or train.epochs? Take that back, or give this run another name"
            )


def make_stop_error(step: int, save: Callable[[], None]) -> RunStopped:
    """Save what there is, and say how the run goes on."""
    if not step:
        return RunStopped("before the first step, by a signal. The same command with --resume starts it")
    save()
    return RunStopped(
        f"after step {step}, by a signal. Its checkpoint is saved; the same command with --resume goes on"
    )


def skip_check(folder: Path) -> None:
    """Find nothing wrong with an adapter that cannot have moved."""


def last_checkpoint_hint(folder: Path) -> str:
    """Say what a run that must stop leaves behind."""
    saved = checkpoints(folder)
    return f"The last good checkpoint is {saved[-1]}" if saved else "No checkpoint was saved before (train.save_every)"


def promote_best_checkpoint(folder: Path, step: int) -> None:
    """Make the best checkpoint's adapter the run's."""
    if problem := broadcast_object(find_corruption(checkpoint_path(folder, step)) if is_main() else None):
        best = checkpoint_path(folder, step)
        raise RunFailed(f"the best checkpoint, {best}, cannot be kept: {problem}. {last_checkpoint_hint(folder)}")
    if is_main():
        with write_folder(folder / ADAPTER) as work:
            shutil.copytree(checkpoint_path(folder, step) / ADAPTER, work, dirs_exist_ok=True)
    barrier()
