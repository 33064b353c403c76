"""The parts of one optimizer step: micro-batches, token counts over ranks, gradients, schedules, update.

A GPU works on what it has been given while Python prepares what follows. Nothing here reads a value from the device,
which would end that: counts come with the batches, and losses and gradient norms stay on the device as tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from subspace.adapters.base import Adapter, OptimizerAccess, TrainProgress
from subspace.adapters.inject import trained_parameters
from subspace.adapters.penalties import with_penalties
from subspace.data.collate import Batch
from subspace.data.dataset import Data
from subspace.data.sampler import StepPlan, shard_batch
from subspace.distributed.collectives import all_reduce_host, all_reduce_sum, rank
from subspace.distributed.deepspeed_compat import steps_without_reads
from subspace.distributed.deepspeed_config import BatchLayout
from subspace.distributed.engine import gradient_norm, hand_gradients, max_abs_gradient
from subspace.models.lm_head import SummedLoss
from subspace.training.acceleration import offload_activations

T = TypeVar("T")


@dataclass(frozen=True)
class StepCounts:
    """Sums over all ranks, computed before the step's first forward pass.

    Attributes:
        labelled: tokens that carry loss, by which the step's loss is divided.
        read: input tokens, without padding.
        stop_requests: ranks that a signal has asked to stop. Signals reach ranks at different times, or only one of
            them, and a rank that stopped alone would leave the others waiting in their next collective. So no rank
            acts on a signal alone: the request is summed with the counts, and all ranks see the same number between the
            same two steps.
    """

    labelled: int
    read: int
    stop_requests: int


@dataclass(frozen=True)
class StepStats:
    """Results of a step's forward and backward passes, over all ranks: scalars on the device, not read yet.

    Attributes:
        loss: the mean over the step's labelled tokens.
        max_gradient: the sum over ranks of each one's largest absolute gradient: finite only if every gradient is.
    """

    loss: Tensor
    max_gradient: Tensor


def micro_batches(
    data: Data, plan: StepPlan, layout: BatchLayout, device: torch.device, *, first: int, one_sequence: bool
) -> list[Callable[[], list[Batch]]]:
    """Return a function for each step from ``first`` on, which returns this rank's share of its rows in micro-batches.

    They are in CPU memory, page-locked if they will be copied to a GPU. Every process has as many in every step; where
    a step has too few rows for that, some are without labels.
    """

    def collate(step: int) -> list[Batch]:
        rows = plan[step - 1]
        batches = [
            data.batch(part, one_sequence=one_sequence)
            if part
            else data.surplus_batch(rows[-1], one_sequence=one_sequence)
            for part in shard_batch(rows, rank(), layout.ranks, layout.accumulate)
        ]
        return [batch.pinned() for batch in batches] if device.type == "cuda" else batches

    return [partial(collate, step) for step in range(first, len(plan) + 1)]


def sum_over_ranks(batches: Sequence[Batch], *, stop_requested: bool) -> StepCounts:
    """Sum the ranks' token counts and requests to stop, in one all-reduce between CPUs. Collective."""
    labelled, read = sum(batch.num_labelled for batch in batches), sum(batch.num_tokens for batch in batches)
    return StepCounts(*all_reduce_host([labelled, read, int(stop_requested)]))


@dataclass(frozen=True)
class Pass:
    """A micro-batch that waits for its forward and its backward pass.

    Attributes:
        engine: whose model it goes through, and which takes the gradients.
        summed_loss: of the engine's model.
        batch: in CPU memory.
        weight: the factor on its summed loss.
        offload: whether saved activations are in CPU memory until the backward pass.
    """

    engine: Any
    summed_loss: SummedLoss
    batch: Batch
    weight: float
    offload: bool

    def run(self) -> Tensor:
        """Run both; the gradients stay with the engine. Return the summed loss, not read yet. Collective."""
        with offload_activations() if self.offload else nullcontext():
            summed = self.summed_loss(self.batch.to(self.engine.device))
        self.engine.backward(with_penalties(self.weight * summed, self.engine.module))
        return summed.detach()

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """Give the engine the gradients of its trained tensors, from a pass that several runs shared. Collective."""
        hand_gradients(self.engine, list(trained_parameters(self.engine.module).values()), gradients)


#: What asks for the passes of a training, one at a time, and is sent the summed loss of each.
Passes = Generator[Pass, Tensor, T]


def run_passes(passes: Passes[T]) -> T:
    """Run the passes that are asked for, one after the other, and return what the asking ends with."""
    with closing(passes):
        try:
            asked = next(passes)
            while True:
                try:
                    summed = asked.run()
                except Exception as error:
                    asked = passes.throw(error)
                else:
                    asked = passes.send(summed)
        except StopIteration as ended:
            result: T = ended.value
            return result


def accumulate_gradients(
    engine: Any,
    summed_loss: SummedLoss,
    batches: Sequence[Batch],
    counts: StepCounts,
    layout: BatchLayout,
    *,
    offload: bool,
) -> Passes[StepStats]:
    """Ask for a step's passes, after which the gradients are with the engine; return their results. Collective.

    With ``offload``, saved activations are in CPU memory until the backward pass.
    """
    # DeepSpeed averages over micro-batches and ranks. The mean over all labelled tokens needs a sum, so each loss is
    # multiplied by the factor that DeepSpeed divides by.
    weight = layout.accumulate * layout.ranks / counts.labelled
    loss = torch.zeros((), device=engine.device)
    for number, batch in enumerate(batches):
        if number:
            # DeepSpeed counts micro-batches in step(), which must follow every backward pass, and updates the
            # parameters after the last one only. That last call is `optimizer_step`.
            engine.step()
        summed = yield Pass(engine, summed_loss, batch, weight, offload)
        loss += summed / counts.labelled
    loss, gradient = all_reduce_sum(torch.stack([loss, max_abs_gradient(engine)])).unbind()
    return StepStats(loss, gradient)


def run_schedules(
    when: Literal["before_step", "after_step"],
    groups: Sequence[Sequence[Adapter]],
    progress: TrainProgress,
    access: OptimizerAccess,
) -> None:
    """Call the methods' schedules, before the update, when gradients are available, or after it. Collective."""
    for group in groups:
        getattr(group[0].method_class, when)(group, progress, access)
        if when == "after_step":
            for adapter in group:
                adapter.clear_cache()  # computed from values that have changed


def optimizer_step(engine: Any) -> Tensor | float | None:
    """Update the trainable parameters and return the gradient norm before clipping, not read yet. Collective."""
    norm = gradient_norm(engine)  # the step frees the gradients
    with steps_without_reads(engine):
        engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    return norm
