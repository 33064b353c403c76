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
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from subspace.batches import StepPlan, open_data
from subspace.config import RunConfig, write
from subspace.distributed import barrier, is_main, world_size
from subspace.engine import fill, lay_out, read_engine_file, start_engine, start_processes
from subspace.errors import UserError
from subspace.inject import adapters, inject, trained_parameters
from subspace.log import Recorder, peak_memory
from subspace.model import describe, open_model, open_tokenizer
from subspace.paths import REPOSITORY
from subspace.progress import shown, silent
from subspace.train import Outcome, parameter_groups, rate_factor, train

PACKAGES = ("torch", "deepspeed", "transformers", "bitsandbytes", "accelerate", "datasets", "tokenizers", "safetensors")


def train_run(config: RunConfig) -> Path:
    """Train as configured and return the run's folder. Every process of the launch calls it."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    layout = lay_out(config.train.batch, config.train.micro_batch, ranks)
    raw = read_engine_file(config.engine)
    fill_engine = partial(fill, raw, layout, dtype=config.model.dtype, clip=config.train.clip, source=config.engine)
    engine_config, notices = fill_engine()
    if config.train.validate_every and not config.data.validation:
        raise UserError("train.validate_every needs held-out rows, but data.validation is 0. Set it to 120, say")

    # Before the processes join: the first one to come prepares what is not in the cache, for as long as it takes.
    tokenizer = open_tokenizer(config.model)
    data = open_data(config.data, tokenizer, config.train.seed, shown if os.environ.get("RANK", "0") == "0" else silent)
    plan = StepPlan(
        data.train.lengths,
        batch=layout.batch,
        epochs=config.train.epochs,
        steps=config.train.steps,
        seed=config.train.seed,
        group_by_length=config.data.group_by_length,
    )

    start_processes()
    torch.manual_seed(config.train.seed)
    sharded = engine_config["zero_optimization"]["stage"] == 3
    model = open_model(config.model, zero3=engine_config if sharded else None)
    model.train()
    model.config.use_cache = False
    settings = config.method.settings
    inject(model, config.method.name, settings, targets=config.targets, seed=config.train.seed)
    largest = max(parameter.numel() for parameter in trained_parameters(model).values())
    engine_config, notices = fill_engine(largest_adapter=largest)

    folder = config.folder
    if is_main():
        begin_folder(folder)
        write(config, folder / "config.yaml")
        about = environment() | {
            "engine": engine_config,
            "model": asdict(describe(model, config.model)),
            "data": data.report,
        }
        about["adapters"] = {
            "method": config.method.name,
            "sites": list(adapters(model)),
            "trained": count_trained(model),
        }
        (folder / "environment.json").write_text(json.dumps(about, indent=2, default=str) + "\n")
    barrier()

    optimizer = torch.optim.AdamW(parameter_groups(model, config.train), fused=True)
    schedule = partial(rate_factor, config.train, steps=len(plan))
    began = time.perf_counter()
    with Recorder(
        folder, len(plan), every=config.train.log_every, trackers=config.train.trackers, config=config.as_dict()
    ) as recorder:
        recorder.note(f"{config.method.name}: {count_trained(model):,} trained numbers at {len(adapters(model))} sites")
        for notice in (*notices, *data.notices):
            recorder.note(notice)
        engine = start_engine(model, engine_config, optimizer, schedule)
        outcome = train(engine, data, plan, config.train, layout, folder, recorder, model=config.model.path)
    if is_main():
        finish_folder(folder, outcome, time.perf_counter() - began)
    barrier()
    return folder


def count_trained(model: torch.nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(parameter.numel() for parameter in trained_parameters(model).values())


def begin_folder(folder: Path) -> None:
    """Make the run's folder."""
    refuse_used(folder)
    folder.mkdir(parents=True, exist_ok=True)


def refuse_used(folder: Path) -> None:
    """Refuse a folder that already holds a finished or begun training."""
    if (folder / "log.jsonl").exists():
        raise UserError(f"{folder} already holds a run. Give this one another name (name=...), or remove that folder")


def finish_folder(folder: Path, outcome: Outcome, seconds: float) -> None:
    """Add to ``environment.json`` what the training came to."""
    file = folder / "environment.json"
    about = json.loads(file.read_text())
    about["outcome"] = {**asdict(outcome), "seconds": seconds, "peak_memory": peak_memory()}
    file.write_text(json.dumps(about, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Return what this run runs on: versions, the repository's commit, devices, processes."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": commit(),
        "devices": devices or [platform.processor() or platform.machine()],
        "processes": world_size(),
        "threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    """Return the repository's commit, with ``+`` where files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
