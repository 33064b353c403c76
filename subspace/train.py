"""The one training loop, and its settings.

The loss of a step is the mean over all its labelled tokens, on every rank and in every micro-batch, so that how a
batch is cut up changes nothing but memory and time.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.adapter_file import save_adapter
from subspace.batches import Data, StepPlan, share
from subspace.checks import LearningCheck
from subspace.distributed import barrier, is_main, rank, sum_over_ranks
from subspace.encoding import IGNORE
from subspace.engine import Layout
from subspace.inject import groups, roles, trained_parameters
from subspace.log import Recorder
from subspace.method import Clock, with_penalties
from subspace.settings import Settings, setting
from subspace.zero import Access

DECAYED_ROLES = ("down", "up", "core")  # decay towards zero would pull a scale away from one


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """How to train."""

    epochs: float = setting(3.0, "passes over the data", min=0)
    steps: int | None = setting(None, "optimizer steps; where given, it replaces epochs", min=1)
    batch: int = setting(16, "rows of an optimizer step, over all processes and micro-batches", min=1)
    micro_batch: int | None = setting(None, "rows that a process feeds at once; none is its whole share", min=1)
    learning_rate: float = setting(2e-4, "peak learning rate", min=0)
    schedule: str = setting("linear", "learning rate after warm-up", choices=("linear", "cosine", "constant"))
    warmup_steps: int = setting(100, "optimizer steps of linear warm-up", min=0)
    weight_decay: float = setting(0.0, "AdamW's decay, of factors only, never of scales, biases or prompts", min=0)
    lora_plus: float = setting(1.0, "learning rate of up factors over that of the others (LoRA+)", min=0)
    clip: float = setting(1.0, "largest norm of the whole gradient; 0 is no clipping", min=0)
    seed: int = setting(0, "of the adapters' start, the data's order and dropout", min=0)
    log_every: int = setting(10, "optimizer steps from one line of log.jsonl to the next", min=1)
    validate_every: int = setting(0, "optimizer steps between losses on the held-out rows; 0 is never", min=0)
    patience: int = setting(0, "stop after so many validations without a better loss; 0 is never", min=0)
    save_every: int = setting(0, "optimizer steps between checkpoints; 0 is at the end only", min=0)
    keep: str = setting("last", "the adapter that the run ends with", choices=("last", "best"))
    trackers: list[str] = setting(["tensorboard"], "where the log goes besides log.jsonl: tensorboard, wandb")


@dataclass
class Outcome:
    """What a training left."""

    steps: int
    loss: float = math.nan  # of the last step
    best_validation: float = math.inf
    best_step: int = 0
    validations_since_best: int = 0


def train(
    engine: Any,
    data: Data,
    plan: StepPlan,
    config: TrainConfig,
    layout: Layout,
    folder: Path,
    recorder: Recorder,
    **about: Any,
) -> Outcome:
    """Train the engine's adapters by the plan; leave the adapter in ``folder/adapter``. All ranks call it.

    Raises:
        RunFailed: the loss is not finite, or a trained tensor does not move. The last checkpoint stays.
    """
    model: nn.Module = engine.module
    scheduled, access, outcome = groups(model), Access(engine), Outcome(steps=len(plan))
    learning = LearningCheck(model, access, may_skip=engine.fp16_enabled())
    device = engine.device

    for step in range(1, len(plan) + 1):
        engine.train()
        parts = share(plan[step - 1], rank(), layout.ranks, layout.accumulate)
        micro_batches = [to_device(data.batch(part), device) for part in parts]

        # DeepSpeed averages what each rank and micro-batch contributes, where the mean over tokens wants a sum.
        counts = torch.tensor([count_tokens(micro_batches)], device=device)
        labelled, seen = sum_over_ranks(counts)[0].tolist()
        weight = layout.accumulate * layout.ranks / labelled

        loss = torch.zeros((), device=device)
        for number, batch in enumerate(micro_batches, start=1):
            summed = summed_loss(engine, batch)
            engine.backward(with_penalties(weight * summed))
            loss += summed.detach() / labelled
            if number == len(micro_batches):
                loss = sum_over_ranks(loss)
                if not torch.isfinite(loss):
                    raise learning.explain(step, loss.item(), last_good(folder))
                learning.before_step(step)
                for group in scheduled:
                    type(group[0]).before_step(group, Clock(step, len(plan)), access)
            engine.step()  # acts after the last micro-batch only
        for group in scheduled:
            type(group[0]).after_step(group, Clock(step, len(plan)), access)
        learning.after_step(step - engine.skipped_steps)

        outcome.steps, outcome.loss = step, loss.item()
        recorder.step(
            step, loss=outcome.loss, learning_rate=engine.get_lr()[0], norm=engine.get_global_grad_norm(), tokens=seen
        )
        if config.save_every and step % config.save_every == 0:
            save_checkpoint(model, folder, step, about)
        if config.validate_every and (step % config.validate_every == 0 or step == len(plan)):
            validate(engine, data, layout, step, outcome, recorder)
            if outcome.best_step == step:
                save_adapter(
                    model, folder / "checkpoints" / "best", step=step, validation=outcome.best_validation, **about
                )
            if config.patience and outcome.validations_since_best >= config.patience:
                recorder.note(f"stopped at step {step}: no better validation loss since step {outcome.best_step}")
                break

    if config.keep == "best" and outcome.best_step:
        keep_best(folder)
    else:
        save_adapter(model, folder / "adapter", step=outcome.steps, **about)
    return outcome


def summed_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the cross entropy summed over labelled tokens, in nats; head and loss only where a column has one."""
    targets = batch["labels"][:, 1:]
    columns = (targets != IGNORE).any(dim=0).nonzero().squeeze(1)
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=columns
    ).logits
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets[:, columns].flatten(), ignore_index=IGNORE, reduction="sum"
    )


def count_tokens(batches: Sequence[dict[str, Tensor]]) -> tuple[int, int]:
    """Return how many tokens carry loss, and how many are read."""
    labelled = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
    return labelled, sum(int(batch["attention_mask"].sum()) for batch in batches)


def validate(engine: Any, data: Data, layout: Layout, step: int, outcome: Outcome, recorder: Recorder) -> None:
    """Add the mean loss over the held-out rows' labelled tokens to the outcome. Ranks run equally many forwards."""
    engine.eval()
    total = torch.zeros(2, device=engine.device, dtype=torch.float64)
    with torch.no_grad():
        for batch in data.validation_batches(layout.micro_batch, rank(), layout.ranks):
            on_device = to_device(batch, engine.device)
            total[0] += summed_loss(engine, on_device)
            total[1] += count_tokens([on_device])[0]
    summed, labelled = sum_over_ranks(total).tolist()
    loss = summed / labelled
    outcome.validations_since_best += 1
    if loss < outcome.best_validation:
        outcome.best_validation, outcome.best_step, outcome.validations_since_best = loss, step, 0
    recorder.validation(step, loss)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Sort the trained tensors by role into AdamW's groups: which decay, and which learn at LoRA+'s rate."""
    of = roles(model)
    sorted_out: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(model).items():
        decay = config.weight_decay if of[name] in DECAYED_ROLES else 0.0
        rate = config.learning_rate * (config.lora_plus if of[name] == "up" else 1.0)
        sorted_out.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in sorted_out.items()
    ]


def rate_factor(config: TrainConfig, step: int, steps: int) -> float:
    """Return the factor on the learning rate for optimizer step ``step``, the first being 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    passed = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return {"linear": 1 - passed, "cosine": (1 + math.cos(math.pi * passed)) / 2, "constant": 1.0}[config.schedule]


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy a batch to where the model computes."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def save_checkpoint(model: nn.Module, folder: Path, step: int, about: dict[str, Any], keep_last: int = 2) -> None:
    """Save the adapter as it is, and drop all but the last checkpoints."""
    save_adapter(model, folder / "checkpoints" / f"step-{step:06d}", step=step, **about)
    if is_main():
        for old in checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
    barrier()


def checkpoints(folder: Path) -> list[Path]:
    """Return the run's checkpoints, oldest first."""
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if path.suffix != ".partial")


def last_good(folder: Path) -> str:
    """Say what a run that must stop leaves behind."""
    saved = checkpoints(folder)
    return f"The last good checkpoint is {saved[-1]}" if saved else "No checkpoint was saved before (train.save_every)"


def keep_best(folder: Path) -> None:
    """Make the best checkpoint the run's adapter."""
    if is_main():
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        shutil.copytree(folder / "checkpoints" / "best", folder / "adapter")
    barrier()
