"""A training run from its configuration to its folder: data, model, adapters, engine, loop.

The folder holds ``config.yaml`` (everything resolved), ``environment.json`` (versions, commit, devices, what was
built), ``log.jsonl``, TensorBoard's events, ``checkpoints/`` and ``adapter/``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from subspace.adapters.inject import adapters, inject, trained_parameters
from subspace.adapters.parameter_count import count_numbers, count_trained
from subspace.adapters.registry import resolve_method
from subspace.common.files import is_disk_full, write_json
from subspace.common.host_memory import set_malloc_trim
from subspace.common.paths import checkout
from subspace.common.progress import Progress, no_progress, show_progress
from subspace.config import MethodEntry, RunConfig, read_config, write_config
from subspace.data.dataset import open_data
from subspace.data.leakage import overlap_notices
from subspace.data.sampler import StepPlan, draw_steps
from subspace.distributed.collectives import barrier, gather_objects, is_main, rank, world_size
from subspace.distributed.deepspeed_config import (
    OFFLOAD,
    compute_batch_layout,
    read_engine_file,
    resolve_deepspeed_config,
)
from subspace.distributed.engine import init_distributed, init_engine
from subspace.errors import UserError
from subspace.models.frozen_weights import weight_memory_bytes
from subspace.models.liger_compat import apply_liger
from subspace.models.loading import device, open_model, open_tokenizer, summarize_model
from subspace.training.acceleration import check_accelerations, compile_layers
from subspace.training.compatibility import check_compatibility, check_packing
from subspace.training.logging import LOG_FILE, TrainLogger, peak_memory
from subspace.training.loop import TrainState, last_checkpoint_hint, train
from subspace.training.optimizers import check_optimizer, lr_factor, make_optimizer, parameter_groups
from subspace.training.resume import Checkpoint, compare_with_checkpoint, find_checkpoint

ENVIRONMENT_FILE = "environment.json"

PACKAGES = ("torch", "deepspeed", "transformers", "bitsandbytes", "accelerate", "datasets", "tokenizers", "safetensors")


def train_run(config: RunConfig, *, resume: bool = False) -> Path:
    """Train as configured and return the run's folder. Every process of the launch calls it.

    With ``resume``, a run that is there already goes on from its newest whole checkpoint, or starts where it has none.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    layout = compute_batch_layout(config.train.batch, config.train.micro_batch, ranks)
    raw = read_engine_file(config.engine)
    fill_engine = partial(
        resolve_deepspeed_config, raw, layout, dtype=config.model.dtype, clip=config.train.clip, source=config.engine
    )
    engine_config, notices = fill_engine()
    offloaded = OFFLOAD in engine_config["zero_optimization"]
    check_optimizer(config.train.optimizer, gpu=device().type == "cuda", offloaded=offloaded)
    check_accelerations(compiled=config.train.compile, liger=config.train.liger, gpu=device().type == "cuda")
    check_compatibility(
        config.model, [(resolve_method(part.name)[0], part.settings) for part in config.method], engine_config
    )
    if config.train.validate_every and not config.data.validation:
        raise UserError("train.validate_every needs held-out rows, but data.validation is 0. Set it to 120, say")
    if config.data.packing:
        check_packing([resolve_method(part.name)[0] for part in config.method])
    folder = config.folder
    if not resume:
        ensure_new_run_dir(folder)

    # Before the processes join: the first one to come prepares what is not in the cache, for as long as it takes.
    tokenizer = open_tokenizer(config.model)
    fed = partial(
        draw_steps,
        batch=layout.batch,
        epochs=config.train.epochs,
        steps=config.train.steps,
        seed=config.train.seed,
    )
    shown = show_progress if os.environ.get("RANK", "0") == "0" else no_progress
    data = open_data(config.data, tokenizer, config.train.seed, shown, fed)
    plan = StepPlan(
        data.train.lengths,
        batch=layout.batch,
        epochs=config.train.epochs,
        steps=config.train.steps,
        seed=config.train.seed,
        group_by_length=config.data.group_by_length,
    )

    # The loop's own watch reports a hang; what the processes do to one another's silence must not come before it.
    init_distributed(minutes=max(30.0, 2 * config.train.hang_minutes))
    saved, passed_over = find_checkpoint(folder) if resume else (None, [])
    if resume and not saved:
        passed_over.append(f"{folder} holds no checkpoint to resume from: the run starts at its beginning")
    torch.manual_seed(config.train.seed)
    sharded = engine_config["zero_optimization"]["stage"] == 3
    model = open_model(config.model, zero3=engine_config if sharded else None)
    model.train()
    model.config.use_cache = False
    if config.train.liger:
        apply_liger(model)
    progress = show_progress if is_main() else no_progress
    parts = [inject_method(model, part, config.train.seed, progress, start=saved is None) for part in config.method]
    # Adapters are whole until the engine starts. What ZeRO-3 has in parts, as the model itself, has no numbers here.
    largest = max(parameter.numel() for parameter in trained_parameters(model).values())
    engine_config, notices = fill_engine(largest_adapter=largest, trained=count_trained(model))

    if saved:
        passed_over += describe_resume(saved, config, engine_config, ranks)
    seen: list[str] = []
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_config(config, folder / "config.yaml")
        about = describe_environment() | {
            "engine": engine_config,
            "model": asdict(summarize_model(model, config.model)),
            "data": data.report,
        }
        seen = about["data"]["seen"] = overlap_notices(config.data.mixture, config.evaluate.selection)
        about["adapters"] = {
            "methods": parts,
            "sites": list(adapters(model)),
            "trained": count_trained(model),
        }
        if saved:
            about["resumed_after"] = saved.facts["step"]
        write_json(folder / ENVIRONMENT_FILE, about)
    barrier()

    optimizer = make_optimizer(config.train.optimizer, parameter_groups(model, config.train))
    schedule = partial(lr_factor, config.train, steps=len(plan))
    began = time.perf_counter()
    with TrainLogger(
        folder,
        len(plan),
        every=config.train.log_every,
        trackers=config.train.trackers,
        config=config.as_dict(),
        done=saved.facts["step"] if saved else 0,
        seconds=saved.facts["seconds"] if saved else 0.0,
    ) as recorder:
        for part in parts:
            recorder.note(f"{part['method']}: {part['trained']:,} trained numbers at {part['sites']} sites")
        for notice in (*passed_over, *notices, *data.notices, *seen):
            recorder.note(notice)
        engine = init_engine(model, engine_config, optimizer, schedule)
        if config.train.compile:
            compile_layers(model)
        if config.train.keep_memory:
            set_malloc_trim(False)
        held = gather_objects(weight_memory_bytes(model))
        torch.manual_seed(config.train.seed + rank())  # what processes draw for dropout should differ
        kept = {"config": config.as_dict(), "engine": engine_config}
        try:
            outcome = train(
                engine, data, plan, config.train, layout, folder, recorder,
                settings=kept, resumed=saved, model=config.model.path,
            )  # fmt: skip
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise UserError(
                f"no space is left on the disk for '{error.filename}'. {last_checkpoint_hint(folder)}"
            ) from None
    if is_main():
        write_outcome(folder, outcome, time.perf_counter() - began, held)
    barrier()
    return folder


def describe_resume(saved: Checkpoint, config: RunConfig, engine_config: dict[str, Any], ranks: int) -> list[str]:
    """Say where a run goes on and what has changed; refuse what may not."""
    changed = compare_with_checkpoint(saved, config.as_dict(), engine_config, ranks)
    return [f"goes on after step {saved.facts['step']}", *(f"changed: {change}" for change in changed)]


def inject_method(
    model: torch.nn.Module, part: MethodEntry, seed: int, progress: Progress, *, start: bool
) -> dict[str, Any]:
    """Put one method's adapters into the model, and say how much it trains."""
    created = inject(
        model,
        part.name,
        part.settings,
        targets=part.targets,
        patterns=part.patterns,
        seed=seed,
        start=start,
        progress=progress,
    )
    trained = count_numbers(p for adapter in created.values() for p in adapter.trained().values())
    return {"method": part.name, "sites": len(created), "trained": trained}


def ensure_new_run_dir(folder: Path) -> None:
    """Refuse a folder that already holds a finished or begun training."""
    if (folder / LOG_FILE).exists():
        raise UserError(
            f"{folder} already holds a run. Give this one another name (name=...), or remove that folder; if that run "
            "did not reach its end, --resume goes on with it"
        )


def is_finished(config: RunConfig) -> bool:
    """Tell whether the run's folder holds this very training, up to its end."""
    try:
        ended = "outcome" in json.loads((config.folder / ENVIRONMENT_FILE).read_text())
        before = read_config(config.folder / "config.yaml")
        return ended and replace(before, name=config.name, runs=config.runs, evaluate=config.evaluate) == config
    except (OSError, ValueError, UserError):
        return False


def write_outcome(folder: Path, outcome: TrainState, seconds: float, held: list[int]) -> None:
    """Add to ``environment.json`` what the training came to; ``held`` is the bytes of weights on each process."""
    about = json.loads((folder / ENVIRONMENT_FILE).read_text())
    about["outcome"] = {**asdict(outcome), "seconds": seconds, "peak_memory": peak_memory(), "weights_held": held}
    write_json(folder / ENVIRONMENT_FILE, about)


def describe_environment() -> dict[str, Any]:
    """Return what this run runs on: versions, the repository's commit, devices, processes."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": git_commit(),
        "devices": devices or [platform.processor() or platform.machine()],
        "processes": world_size(),
        "threads": torch.get_num_threads(),
    }


def git_commit() -> str | None:
    """Return the repository's commit, with ``+`` where files differ from it; None outside a repository."""
    repository = checkout()
    if repository is None:
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
