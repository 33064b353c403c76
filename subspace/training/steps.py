"""The parts of one optimizer step: micro-batches, token counts over ranks, gradients, schedules, update."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from subspace.adapters.base import Adapter, OptimizerAccess, TrainProgress
from subspace.adapters.penalties import with_penalties
from subspace.data.collate import IGNORE_INDEX
from subspace.data.dataset import Data
from subspace.data.sampler import shard_batch
from subspace.distributed.collectives import all_reduce_sum, rank
from subspace.distributed.deepspeed_config import BatchLayout
from subspace.distributed.engine import gradient_norm, max_abs_gradient
from subspace.models.lm_head import SummedLoss
from subspace.training.acceleration import offload_activations

Batch = dict[str, Tensor]


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
    """Results of a step's forward and backward passes, over all ranks.

    Attributes:
        loss: the mean over the step's labelled tokens; a scalar.
        max_gradient: the sum over ranks of each one's largest absolute gradient, a scalar: finite only if every
            gradient is.
    """

    loss: Tensor
    max_gradient: Tensor


def micro_batches(data: Data, rows: Sequence[int], layout: BatchLayout, device: torch.device) -> list[Batch]:
    """Return this rank's share of a step's rows, in micro-batches on the device."""
    return [to_device(data.batch(part), device) for part in shard_batch(rows, rank(), layout.ranks, layout.accumulate)]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the model's device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def count_tokens(batches: Sequence[Batch]) -> tuple[int, int]:
    """Return the numbers of tokens with loss and of input tokens."""
    labelled = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
    return labelled, sum(int(batch["attention_mask"].sum()) for batch in batches)


def sum_over_ranks(batches: Sequence[Batch], device: torch.device, *, stop_requested: bool) -> StepCounts:
    """Sum the ranks' token counts and requests to stop, in one all-reduce. Collective."""
    counts = torch.tensor([*count_tokens(batches), stop_requested], device=device)
    return StepCounts(*all_reduce_sum(counts).tolist())


def accumulate_gradients(
    engine: Any,
    summed_loss: SummedLoss,
    batches: Sequence[Batch],
    counts: StepCounts,
    layout: BatchLayout,
    *,
    offload: bool,
) -> StepStats:
    """Run forward and backward over a step's micro-batches; the gradients stay with the engine. Collective.

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
        with offload_activations() if offload else nullcontext():
            summed = summed_loss(batch)
        engine.backward(with_penalties(weight * summed, engine.module))
        loss += summed.detach() / counts.labelled
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
        getattr(type(group[0]), when)(group, progress, access)
        if when == "after_step":
            for adapter in group:
                adapter.clear_cache()  # computed from values that have changed


def optimizer_step(engine: Any) -> float | None:
    """Update the trainable parameters and return the gradient norm before clipping. Collective."""
    norm = gradient_norm(engine)  # the step frees the gradients
    engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    return norm
