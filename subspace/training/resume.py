"""Saving and restoring of the full training state, for exact resume.

A checkpoint folder holds ``adapter/`` (an ordinary adapter folder), ``training.safetensors`` (the optimizer's state
and that of the methods' schedules) and ``training.json`` (step, outcome, schedule position, loss scale, random states
of each process, configuration). Frozen weights are not in it. It fits any number of processes and any ZeRO stage.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Required

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from typing_extensions import TypedDict

from subspace.adapters.inject import adapters
from subspace.adapters.serialization import named_tensors, read_adapter, save_adapter
from subspace.common.declarations import Amount, Count, Positive
from subspace.common.files import PARTIAL, write_checked
from subspace.common.foreign.text import read_json
from subspace.common.random_state import random_states, set_random_states
from subspace.distributed.collectives import broadcast_object, gather_objects, is_main, rank, world_size
from subspace.distributed.deepspeed_compat import (
    basic_optimizer,
    loss_scale_state,
    restore_loss_scale,
    restore_step_counters,
    step_counters,
)
from subspace.distributed.deepspeed_config import flatten_dict
from subspace.distributed.zero import full_shape, gathered
from subspace.errors import UserError, file_trouble
from subspace.training import checkpoint, optimizer_state

ADAPTER, TENSORS, FACTS = checkpoint.ADAPTER, "training.safetensors", checkpoint.FACTS
HISTORY = "history"
#: Settings that must equal the checkpoint's, because they determine its numbers; and exceptions.
FIXED_KEYS = ("model.", "method", "targets", "data.", "train.batch_size", "train.seed", "train.optimizer")
PLACE_KEYS = ("model.path", "model.revision")  # the base is compared by its bytes, where a checkpoint records it
MUTABLE_KEYS = ("model.attention", "model.gradient_checkpointing", "model.trust_remote_code")
UNREPORTED_KEYS = (
    "name",
    "runs",
    "engine",
    "evaluate.",
    "published",
)  # without effect on the training, or compared in detail


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's content, the same on every process."""

    path: Path
    facts: dict[str, Any]
    adapter: dict[str, Tensor]
    training: dict[str, Tensor]


@dataclass(frozen=True)
class FoundCheckpoint:
    """The place of a checkpoint, None if there is none, what it says of itself, and notices for the user."""

    path: Path | None
    facts: dict[str, Any]
    notices: list[str]


def save_checkpoint(
    engine: Any,
    target: Path,
    facts: Mapping[str, Any],
    about: Mapping[str, Any],
    check: Callable[[Path], None] | None = None,
) -> None:
    """Save a checkpoint. Collective over ranks.

    Args:
        engine: DeepSpeed's, between two steps.
        target: the checkpoint's folder, created atomically.
        facts: the loop's state, JSON-serialisable.
        about: metadata for ``adapter.json``.
        check: raises for an invalid adapter folder; collective.

    Raises:
        UserError: the disk cannot hold it, or ``check`` raises. Older checkpoints stay unchanged.
    """
    readable = optimizer_state.can_gather_optimizer_state(engine)
    tensors = optimizer_state.gather_optimizer_state(engine) if readable else {}
    for site, adapter in adapters(engine.module).items():
        for key, value in adapter.history.items():
            tensors[f"{HISTORY}/{site}.{key}"] = value.detach().cpu()
    everything = {
        **facts,
        "engine_state": _counters(engine),
        "optimizer": readable,
        "random": gather_objects(random_states()),
        "ranks": world_size(),
    }

    unfinished = target.with_name(target.name + PARTIAL)
    try:
        _on_main(target, lambda: checkpoint.begin_checkpoint(target))
        save_adapter(engine.module, unfinished / ADAPTER, **about)
        if check:
            check(unfinished / ADAPTER)

        def write() -> None:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            write_checked(unfinished / TENSORS, save(contiguous))
            write_checked(unfinished / FACTS, json.dumps(everything).encode())
            checkpoint.finish_checkpoint(unfinished, target, facts.get("run"))

        _on_main(target, write)
    except UserError:
        if is_main():
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def find_checkpoint(folder: Path, before: int | None = None, run: str | None = None) -> FoundCheckpoint:
    """Find a run's newest intact checkpoint; with ``before``, of those of earlier steps. Collective over ranks.

    The first process reads, so the folder need not be there for the others. ``run`` is the run's, where it is known.
    """
    path, notices = broadcast_object(checkpoint.find_newest(folder, before, run) if is_main() else None)
    if path is None:
        return FoundCheckpoint(None, {}, notices)
    facts: dict[str, Any] = broadcast_object(read_facts(path) if is_main() else None)
    return FoundCheckpoint(path, facts, notices)


class _Outcome(TypedDict, total=False):
    """The fields of :class:`subspace.training.checkpointer.TrainState`."""

    __pydantic_config__ = {"extra": "forbid"}  # type: ignore[misc]  # noqa: RUF012  (read by pydantic)
    steps: Count
    loss: float
    best_validation: float
    best_step: Count
    validations_since_best: Count


class _Counters(TypedDict):
    steps: Count
    skipped: Count
    schedule: int
    loss_scale: dict[str, float | None]


class _Method(TypedDict):
    name: str


class _Config(TypedDict, total=False):
    """A run's configuration, as its checkpoints keep it."""

    method: Required[_Method | list[_Method]]
    model: dict[str, Any]
    data: dict[str, Any]
    train: dict[str, Any]
    evaluate: dict[str, Any]


class _Facts(TypedDict):
    """What of ``training.json`` is read; ``best_validation`` is infinite before the first one."""

    step: Positive
    outcome: _Outcome
    config: _Config
    engine: dict[str, Any]
    engine_state: _Counters
    optimizer: bool
    fed: str
    start: dict[str, str]
    seconds: Amount
    random: list[dict[str, Any]]
    ranks: Positive
    base: NotRequired[dict[str, Any] | None]
    run: NotRequired[str | None]
    rows: NotRequired[Count]
    planned: NotRequired[Count]
    held_out: NotRequired[Count]


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself, in its ``training.json``; raise UserError if that makes no sense."""
    found: dict[str, Any] = read_json(checkpoint / FACTS, _Facts, finite=False)
    return found


def read_checkpoint(path: Path, facts: dict[str, Any]) -> Checkpoint:
    """Return the content of a checkpoint, which the first process reads. Collective over ranks."""
    contents = []
    for content in (
        read_adapter(path / ADAPTER)[1] if is_main() else {},
        _load_tensors(path / TENSORS) if is_main() else {},
    ):
        names = broadcast_object(list(content))
        contents.append({name: broadcast_object(content.get(name)) for name in names})
    if not facts["optimizer"]:
        raise UserError(
            f"{path} holds adapters only, because the optimizer was offloaded to NVMe: it cannot be resumed from. "
            "Evaluate or merge its adapter, or train again with the optimizer on the CPU"
        )
    return Checkpoint(path, facts, *contents)


def _load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load(file.read_bytes())
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def check_resumable(folder: Path, facts: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise UserError for a setting that determines a checkpoint's numbers and is not as it was.

    Args:
        folder: the run's.
        facts: what the checkpoint says of itself.
        config: the settings of now.
    """
    changed = _changes(facts["config"], config)
    mutable = MUTABLE_KEYS + PLACE_KEYS[0 if facts.get("base") else 1 :]
    refused = [c for key, c in changed.items() if key.startswith(FIXED_KEYS) and not key.startswith(mutable)]
    if refused:
        raise UserError(
            f"{folder} was trained with other settings, which cannot change during a run: "
            f"{', '.join(refused)}. Resume with the settings of its config.yaml, or give this run another name"
        )


def changed_settings(
    facts: Mapping[str, Any], config: Mapping[str, Any], engine: Mapping[str, Any], ranks: int
) -> list[str]:
    """Return the settings that differ from a checkpoint's, as ``train.max_grad_norm: 1.0 -> 0.5``."""
    changed = _changes(facts["config"], config)
    reported = [c for key, c in changed.items() if not key.startswith(UNREPORTED_KEYS)]
    of_engine = _changes(facts["engine"], engine)
    reported += [f"engine {c}" for key, c in of_engine.items() if not key.startswith(("train_", "gradient_"))]
    if ranks != facts["ranks"]:
        reported.append(f"processes: {facts['ranks']} -> {ranks}")
    return reported


def restore_checkpoint(engine: Any, saved: Checkpoint, seed: int) -> None:
    """Restore engine, adapters and random generators from a checkpoint. Collective over ranks.

    On another number of processes the random generators are re-seeded from ``seed``, the step and the rank.
    """
    own = named_tensors(engine.module)
    expected = {name: tensor.shape for name, tensor in saved.adapter.items()}
    if {name: full_shape(tensor) for name, tensor in own.items()} != expected:
        raise UserError(f"{saved.path} does not fit this model: its adapters have other names or shapes")
    with torch.no_grad():
        for name, tensor in own.items():
            with gathered([tensor], modified_by_main=True):
                tensor.data.copy_(saved.adapter[name])
        _restore_history(engine.module, saved.training)
        state = {name: t for name, t in saved.training.items() if not name.startswith(f"{HISTORY}/")}
        optimizer_state.restore_optimizer_state(engine, state)

    counters = saved.facts["engine_state"]
    restore_step_counters(engine, counters)
    scheduler = engine.lr_scheduler
    scheduler.last_epoch = counters["schedule"]
    rates = zip(basic_optimizer(engine).param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, base, factor in rates:
        group["lr"] = base * factor(scheduler.last_epoch)
    restore_loss_scale(engine, counters["loss_scale"])

    if saved.facts["ranks"] == world_size():
        try:
            set_random_states(saved.facts["random"][rank()])
        except (LookupError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{saved.path / FACTS} holds no states of random generators: {error}") from None
    else:
        fresh = np.random.SeedSequence([seed, saved.facts["step"], rank()]).generate_state(1)
        torch.manual_seed(int(fresh[0]))


def _on_main(target: Path, action: Callable[[], object]) -> None:
    problem = None
    if is_main():
        try:
            action()
        except OSError as error:
            problem = f"the checkpoint {target} could not be saved: {file_trouble(error) or error}"
    if problem := broadcast_object(problem):
        raise UserError(problem)


def _counters(engine: Any) -> dict[str, Any]:
    return {
        **step_counters(engine),
        "schedule": engine.lr_scheduler.last_epoch,
        "loss_scale": loss_scale_state(engine),
    }


def _restore_history(model: nn.Module, training: Mapping[str, Tensor]) -> None:
    for site, adapter in adapters(model).items():
        prefix = f"{HISTORY}/{site}."
        device = next(iter(adapter.own_tensors().values())).device
        kept = {name.removeprefix(prefix): t.to(device) for name, t in training.items() if name.startswith(prefix)}
        adapter.history = {**adapter.history, **kept}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    old, new = dict(flatten_dict(before)), dict(flatten_dict(json.loads(json.dumps(now, default=str))))
    keys = [*old, *(key for key in new if key not in old)]
    return {key: f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)}
