"""The training loop.

The loss of a step is the mean over all its labelled tokens, on every rank and in every micro-batch, so that the
division of a batch affects only memory and time.

A run can be stopped or killed at any time. A checkpoint, saved between two steps, has the loop's full state, and a
resumed run gives bitwise the same results on the same number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from subspace.adapters.base import TrainProgress
from subspace.adapters.inject import adapter_groups
from subspace.common.prefetch import prefetch
from subspace.data.dataset import Data
from subspace.data.sampler import StepPlan
from subspace.distributed import watchdog
from subspace.distributed.collectives import all_reduce_host, all_reduce_sum, rank
from subspace.distributed.deepspeed_config import BatchLayout
from subspace.distributed.signals import SignalHandler
from subspace.models.lm_head import SummedLoss
from subspace.models.padding import needs_padding_mask
from subspace.training.blame import LossTrace
from subspace.training.checkpointer import Checkpointer, ConsumedSamples, TrainState
from subspace.training.config import TrainConfig
from subspace.training.health_checks import TrainingHealthCheck
from subspace.training.logging import TrainLogger
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess
from subspace.training.resume import Checkpoint
from subspace.training.steps import (
    Passes,
    accumulate_gradients,
    micro_batches,
    optimizer_step,
    run_schedules,
    sum_over_ranks,
)

#: Most steps whose loss and gradients may be on the device at a time.
MAX_UNREAD_STEPS = 1000


def train(
    engine: Any,
    data: Data,
    plan: StepPlan,
    config: TrainConfig,
    layout: BatchLayout,
    folder: Path,
    logger: TrainLogger,
    *,
    signals: SignalHandler,
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
    resumed: Checkpoint | None = None,
    until: int | None = None,
) -> Passes[TrainState]:
    """Train the engine's adapters on the planned steps and save them in ``folder/adapter``. Collective over ranks.

    It asks for its forward and backward passes, which whoever trains may run together with those of other runs:
    :func:`subspace.training.steps.run_passes` runs them as they come. A run that pauses ``until`` it is resumed saves a
    checkpoint in place of the adapter; :func:`is_paused` tells.

    Args:
        engine: DeepSpeed's, with the model and its adapters.
        data: the rows.
        plan: the rows of each step.
        config: the training settings.
        layout: how a step's rows are distributed over ranks and micro-batches.
        folder: the run's.
        logger: records every step.
        signals: tells when to stop.
        settings: stored in checkpoints, to be compared with those of a resumed run.
        about: metadata for ``adapter.json``.
        resumed: the checkpoint to continue from.
        until: pause after this step; None trains to the end.

    Raises:
        RunFailed: a loss or gradient is not finite, or a trained tensor never changes. The last checkpoint stays.
        RunStopped: a signal stopped the run; its last step is saved in a checkpoint.
    """
    groups, access = adapter_groups(engine.module), DeepSpeedOptimizerAccess(engine)
    health = TrainingHealthCheck(engine.module, access, resumed.facts["start"] if resumed else None, folder)
    consumed = ConsumedSamples(data, plan)
    checkpointer = Checkpointer(engine, folder, config, health, consumed, logger, settings, about)
    state = checkpointer.restore(resumed) if resumed else TrainState()
    first, last = state.steps + 1, len(plan)
    end = last if until is None else min(until, last)
    every = config.validation_period(plan.num_rows)
    summed_loss = SummedLoss(engine, masks_padding=needs_padding_mask(engine))
    health.trace = LossTrace(engine, summed_loss, data, plan)
    collated = micro_batches(data, plan, layout, engine.device, first=first, one_sequence=summed_loss.one_sequence)
    with closing(prefetch(collated)) as batches_of_steps, health:
        for step in range(first, end + 1):
            if config.patience and state.validations_since_best >= config.patience:
                logger.note(f"stopped after step {step - 1}: no better validation loss since {state.best_step}")
                break
            watchdog.beat(step)
            engine.train()
            batches = next(batches_of_steps)
            counts = sum_over_ranks(batches, stop_requested=signals.stop_requested)
            if counts.stop_requests:
                state.loss = health.read(engine)
                raise checkpointer.save_and_stop(state)

            stats = yield from accumulate_gradients(
                engine, summed_loss, batches, counts, layout, offload=config.offload_activations
            )
            health.record(step, stats)
            validates = bool(every) and (step % every == 0 or step == last)
            if validates or checkpointer.is_due(step) or step == end or is_read(step, last, config, engine):
                state.loss = health.read(engine)
            run_schedules("before_step", groups, TrainProgress(step, last), access)
            learning_rate = engine.get_lr()[0]  # of this step; the engine's step sets the next one's
            norm = optimizer_step(engine)
            run_schedules("after_step", groups, TrainProgress(step, last), access)
            health.check_updated(step, engine)

            consumed.add(step)
            state.steps = step
            logger.step(step, loss=state.loss, learning_rate=learning_rate, norm=norm, tokens=counts.read)
            if validates:
                loss = validation_loss(engine, summed_loss, data, layout, step)
                state.add_validation(loss)
                logger.validation(step, loss)
            checkpointer.save_if_due(state)
        if is_paused(state, until, last):
            checkpointer.save(state)
        else:
            checkpointer.save_final(state)
    return state


def is_paused(state: TrainState, until: int | None, steps: int) -> bool:
    """Return True if a run of so many steps stands where it was to pause, not at its end."""
    return until is not None and until <= state.steps < steps


def is_read(step: int, last: int, config: TrainConfig, engine: Any) -> bool:
    """Return True for steps whose loss and gradients are read, besides those that are validated or saved.

    Every step in float16, where DeepSpeed reads the gradients anyway, and skips steps.
    """
    periods = (config.log_every, MAX_UNREAD_STEPS)
    return engine.fp16_enabled() or step in (1, last) or any(step % every == 0 for every in periods)


def validation_loss(engine: Any, summed_loss: SummedLoss, data: Data, layout: BatchLayout, step: int) -> float:
    """Return the mean loss over the held-out rows' labelled tokens. All ranks run the same number of forward passes."""
    engine.eval()
    total, labelled = torch.zeros((), device=engine.device, dtype=torch.float64), 0
    with torch.no_grad():
        share = (layout.micro_batch, rank(), layout.ranks)
        for batch in data.validation_batches(*share, one_sequence=summed_loss.one_sequence):
            watchdog.beat(step)
            total += summed_loss(batch.to(engine.device))
            labelled += batch.num_labelled
    return float(all_reduce_sum(total)) / all_reduce_host([labelled])[0]
