"""A training run from configuration to run folder: checks, data, model, adapters, engine, loop.

The folder holds ``config.yaml`` (fully resolved), ``environment.json`` (versions, commit, devices, adapters),
``log.jsonl``, TensorBoard's events, ``checkpoints/`` and ``adapter/``.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import socket
import subprocess
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from subspace.adapters.inject import adapters, inject, take_over_schedules
from subspace.adapters.parameter_count import count_adapters, count_trained
from subspace.adapters.targets import coverage
from subspace.common.files import write_json
from subspace.common.host_memory import set_malloc_trim
from subspace.common.locks import in_use
from subspace.common.paths import checkout
from subspace.common.progress import Progress, no_progress, show_progress
from subspace.config import MethodEntry, RunConfig, write_config
from subspace.data.dataset import Data
from subspace.data.leakage import overlap_notices
from subspace.data.sampler import StepPlan
from subspace.distributed import watchdog
from subspace.distributed.collectives import barrier, broadcast_object, gather_objects, is_main, rank, world_size
from subspace.distributed.device import device, on_gpu
from subspace.distributed.engine import init_distributed, init_engine
from subspace.distributed.launcher import launched_rank, launched_world_size
from subspace.distributed.watchdog import LOADING_PATIENCE, Watchdog
from subspace.errors import UserError, file_trouble
from subspace.models.base_record import BaseRecord, base_record, identify
from subspace.models.frozen_weights import weight_memory_bytes
from subspace.models.liger_compat import apply_liger
from subspace.models.loading import ModelSummary, open_model, summarize_model
from subspace.resolve import ResolvedRun, check_shape, resolve_run, schedule_notices, with_absolute_paths
from subspace.resumption import (
    check_resume_settings,
    describe_resume,
    ensure_new_run_dir,
    find_resume_point,
    new_run_id,
    open_run_data,
)
from subspace.training.acceleration import compile_layers
from subspace.training.checkpoint import ENVIRONMENT_FILE, known_run_id, last_checkpoint_hint
from subspace.training.checkpointer import TrainState
from subspace.training.determinism import check_deterministic, deterministic_algorithms
from subspace.training.logging import TrainLogger, peak_memory
from subspace.training.loop import is_paused, train
from subspace.training.optimizers import ineffective_settings, lr_factor, make_optimizer, parameter_groups
from subspace.training.resume import Checkpoint

PACKAGES = ("torch", "deepspeed", "transformers", "bitsandbytes", "accelerate", "datasets", "tokenizers", "safetensors")


def train_run(config: RunConfig, *, resume: bool = False, until: int | None = None) -> Path:
    """Train as configured and return the run's folder. Collective over ranks.

    With ``resume``, an existing run continues from its newest intact checkpoint, or starts from scratch if it has none.
    ``until`` a step it trains as the run of its whole length does, and saves a checkpoint to be resumed from; its
    folder then has no adapter and no outcome.

    Raises:
        UserError: settings that conflict with one another, the data, the model or the machine.
        RunFailed: a loss or gradient that is not finite, or a trained tensor that never changes.
        RunStopped: a signal stopped the run; a checkpoint is saved.
    """
    check_deterministic(wanted=config.train.deterministic)
    # The first process reads and writes the folder, for all.
    with in_use(config.folder) if launched_rank() == 0 else nullcontext():
        return _train_alone(config, resume=resume, until=until)


def _train_alone(config: RunConfig, *, resume: bool, until: int | None) -> Path:
    """Train in a folder that no other run is writing to. Collective over ranks."""
    wanted = config.train.deterministic
    run = resolve_run(config, launched_world_size(), device())
    if not resume:
        ensure_new_run_dir(config.folder)
    elif launched_rank() == 0:
        check_resume_settings(run)
    check_shape(run)
    material = open_run_data(run)
    base = identify(run.config.model)  # here for the same reason: the first time, every byte is read

    hang_seconds = 60 * config.train.hang_minutes
    # The watchdog reports a hang; the timeout of collectives must be longer than its own.
    with Watchdog(config.folder / "hang", hang_seconds, launched_rank(), launched_world_size()):
        watchdog.beat("the meeting of all processes", LOADING_PATIENCE)
        init_distributed(minutes=max(30.0, 2 * config.train.hang_minutes), deterministic=wanted)
        with deterministic_algorithms(wanted=wanted):
            check_same_base(base)
            check_same_rows(material[0])
            run_id = known_run_id(config.folder) if resume and is_main() else None
            resumed, notices = None, list[str]()
            if resume:
                run, material, resumed, notices = find_resume_point(run, material, base, run_id)
            run_id = broadcast_object(run_id or (resumed and resumed.facts.get("run")) or new_run_id())
            return _train_on_rows(run, *material, base, resumed, notices, run_id, until)


def _train_on_rows(
    run: ResolvedRun,
    data: Data,
    plan: StepPlan,
    base: BaseRecord,
    resumed: Checkpoint | None,
    notices: list[str],
    run_id: str,
    until: int | None,
) -> Path:
    """Train on the planned rows and return the run's folder. Collective over ranks."""
    config = run.config
    seen = overlap_notices(config.data.mixture, config.evaluate.selection, config.data.columns) if is_main() else []
    watchdog.beat("the loading of the model", LOADING_PATIENCE)
    model, summary, methods = build_model(run, initialize=resumed is None)
    watchdog.beat("the start of the engine", LOADING_PATIENCE)
    run = run.with_adapters(model)
    if resumed:
        notices = [*notices, *describe_resume(resumed, run, plan)]
    notices = [*notices, *run.engine.notices, *data.notices, *schedule_notices(config, data, plan)]
    notices += ineffective_settings(model, config.train)
    notices += seen
    write_run_metadata(run, model, summary, methods, {**data.report, "seen": seen}, resumed, run_id)
    notices.append(data.example)

    began = time.perf_counter()
    with TrainLogger(
        config.folder,
        len(plan),
        every=config.train.log_every,
        trackers=config.train.trackers,
        config=config.as_dict(),
        done=resumed.facts["step"] if resumed else 0,
        seconds=resumed.facts["seconds"] if resumed else 0.0,
    ) as logger:
        for part in methods:
            logger.note("{method}: {trained:,} trained numbers at {sites} sites, {reach}".format(**part))
        for notice in notices:
            logger.note(notice)
        engine = start_engine(run, model, steps=len(plan))
        weight_bytes = gather_objects(weight_memory_bytes(model))
        torch.manual_seed(config.train.seed + rank())  # dropout must differ between ranks
        state = _train(run, engine, data, plan, base, logger, resumed, run_id, until)
    if is_main() and not is_paused(state, until, len(plan)):
        write_outcome(config.folder, state, time.perf_counter() - began, weight_bytes)
    barrier()
    return config.folder


def check_same_base(base: BaseRecord) -> None:
    """Raise UserError if another process has another base: hosts may have other files. Collective over ranks."""
    own = (socket.gethostname(), base.short())
    first, *others = gather_objects(own)
    for host, found in others:
        parts = [name for name in ("weights", "tokenizer") if found.get(name) != first[1].get(name)]
        if parts:
            raise UserError(
                f"{base.path} has other {' and '.join(parts)} on {host} than on {first[0]}. Copy one host's to all"
            )


def check_same_rows(data: Data) -> None:
    """Raise UserError if another process has other rows: hosts may have other files. Collective over ranks."""
    (host, own), *others = gather_objects((socket.gethostname(), data.digest))
    for other, found in others:
        if found != own:
            raise UserError(
                f"{data.report['mixture']} has other rows on {other} than on {host}. Copy one host's to all"
            )


def build_model(run: ResolvedRun, *, initialize: bool) -> tuple[Any, ModelSummary, list[dict[str, Any]]]:
    """Load the model, inject the adapters, and return it with a summary of the model alone and one report per method.

    Without ``initialize``, the adapters are not initialised from the weights, because a checkpoint overwrites them.
    Collective over ranks.
    """
    config = run.config
    torch.manual_seed(config.train.seed)
    model: Any = open_model(config.model, zero3=run.engine.settings if run.engine.stage == 3 else None)
    base_record(model)  # of the files as they are now: they may change before the adapters are saved
    summary = summarize_model(model, config.model)
    model.train()
    model.config.use_cache = False
    if config.train.liger:
        apply_liger(model)
    progress = watchdog.beating(show_progress if is_main() else no_progress)
    methods = [inject_method(model, entry, config.train.seed, progress, start=initialize) for entry in config.method]
    return model, summary, methods


def write_run_metadata(
    run: ResolvedRun,
    model: Any,
    summary: ModelSummary,
    methods: list[dict[str, Any]],
    data: dict[str, Any],
    resumed: Checkpoint | None,
    run_id: str,
) -> None:
    """Write ``config.yaml`` and ``environment.json``. Collective over ranks."""
    config = run.config
    if is_main():
        write_config(with_absolute_paths(config), config.folder / "config.yaml")
        about = describe_environment() | {
            "run": run_id,
            "engine": run.engine.settings,
            "model": asdict(summary),
            "data": data,
            "adapters": {"methods": methods, "sites": list(adapters(model)), "trained": count_trained(model)},
        }
        if resumed:
            about["resumed_after"] = resumed.facts["step"]
        write_json(config.folder / ENVIRONMENT_FILE, about)
    barrier()


def start_engine(run: ResolvedRun, model: Any, *, steps: int) -> Any:
    """Return the DeepSpeed engine with model, optimizer and learning rate schedule. Collective."""
    train = run.config.train
    optimizer = make_optimizer(train.optimizer, parameter_groups(model, train))
    engine = init_engine(model, run.engine.settings, optimizer, partial(lr_factor, train, steps=steps))
    if train.compile:
        compile_layers(model)
    if train.keep_memory and not run.on_gpu:
        set_malloc_trim(False)
    return engine


def _train(
    run: ResolvedRun,
    engine: Any,
    data: Data,
    plan: StepPlan,
    base: BaseRecord,
    logger: TrainLogger,
    resumed: Checkpoint | None,
    run_id: str,
    until: int | None,
) -> TrainState:
    """Run the training loop; raise UserError if the file system refuses a file."""
    config = run.config
    settings = {"config": config.as_dict(), "engine": run.engine.settings, "base": base.as_dict(), "run": run_id}
    about = {"model": config.model.path, "run": run_id}
    try:
        return train(
            engine, data, plan, config.train, run.layout, config.folder, logger,
            settings=settings, about=about, resumed=resumed, until=until,
        )  # fmt: skip
    except UserError:
        raise
    except Exception as error:
        if (trouble := file_trouble(error)) is None:
            raise
        raise UserError(f"{trouble}. {last_checkpoint_hint(config.folder)}") from error


def inject_method(
    model: torch.nn.Module, part: MethodEntry, seed: int, progress: Progress, *, start: bool
) -> dict[str, Any]:
    """Inject one method's adapters into the model; return what it trains, and how much of the model that reaches."""
    created = inject(
        model,
        part.adapter_class,
        part.settings,
        targets=part.targets,
        patterns=part.patterns,
        seed=seed,
        start=start,
        progress=progress,
    )
    take_over_schedules(model)  # the training loop runs them
    trained = count_adapters(created.values())
    kind = part.adapter_class.target_kind(next(iter(created.values())).config)
    reach = str(coverage(model, kind, list(created)))
    return {"method": part.name, "sites": len(created), "trained": trained, "reach": reach}


def write_outcome(folder: Path, state: TrainState, seconds: float, weight_bytes: list[int]) -> None:
    """Add the outcome to ``environment.json``; ``weight_bytes`` is each process's memory for frozen weights."""
    about = json.loads((folder / ENVIRONMENT_FILE).read_text())
    about["outcome"] = {**asdict(state), "seconds": seconds, "peak_memory": peak_memory(), "weights_held": weight_bytes}
    write_json(folder / ENVIRONMENT_FILE, about)


def describe_environment() -> dict[str, Any]:
    """Return library versions, git commit, devices, and numbers of processes and threads."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_gpu() else []
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
