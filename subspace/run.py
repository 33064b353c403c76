"""A training run from configuration to run folder: checks, data, model, adapters, engine, loop.

The folder holds ``config.yaml`` (fully resolved), ``environment.json`` (versions, commit, devices, adapters),
``log.jsonl``, TensorBoard's events, ``checkpoints/`` and ``adapter/``.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from subspace.adapters.inject import adapters, inject, take_over_schedules
from subspace.adapters.multi_adapter import share_weights
from subspace.adapters.parameter_count import count_adapters, count_trained
from subspace.adapters.targets import coverage
from subspace.common.files import write_json
from subspace.common.host_memory import set_malloc_trim
from subspace.common.locks import in_use
from subspace.common.progress import Progress, no_progress, show_progress
from subspace.config import MethodEntry, RunConfig, write_config
from subspace.data.dataset import Data
from subspace.data.leakage import TrainedTexts, overlap_notices
from subspace.data.sampler import StepPlan
from subspace.distributed import watchdog
from subspace.distributed.collectives import barrier, broadcast_object, gather_objects, is_main, rank, world_size
from subspace.distributed.device import device
from subspace.distributed.engine import init_distributed, init_engine
from subspace.distributed.launcher import launched_rank, launched_world_size
from subspace.distributed.signals import SignalHandler
from subspace.distributed.watchdog import LOADING_PATIENCE, Watchdog
from subspace.errors import UserError, file_trouble
from subspace.models.base_record import BaseRecord, base_record, identify
from subspace.models.frozen_weights import weight_memory_bytes
from subspace.models.liger_compat import apply_liger
from subspace.models.loading import ModelSummary, open_model, summarize_model
from subspace.resolve import ResolvedRun, check_shape, resolve_run, schedule_notices, with_absolute_paths
from subspace.resumption import (
    Material,
    check_resume_settings,
    check_start,
    describe_resume,
    ensure_new_run_dir,
    find_resume_point,
    new_run_id,
    open_run_data,
    start_adapters,
)
from subspace.together import OneDisplay, Together, check_draws_nothing, check_together, labels, raise_failures
from subspace.training.acceleration import compile_layers
from subspace.training.checkpoint import ENVIRONMENT_FILE, known_run_id, last_checkpoint_hint, read_environment
from subspace.training.checkpointer import TrainState
from subspace.training.determinism import check_deterministic, deterministic_algorithms
from subspace.training.logging import TrainLogger, describe_environment, peak_memory
from subspace.training.loop import is_paused, train
from subspace.training.optimizers import ineffective_settings, lr_factor, make_optimizer, parameter_groups
from subspace.training.resume import Checkpoint
from subspace.training.steps import Passes, run_passes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedRun:
    """A run with its rows and steps, and where it goes on.

    Attributes:
        run: its settings.
        data: its rows.
        plan: the rows of each step.
        resumed: the checkpoint that it continues from.
        notices: for the user.
        run_id: by which its checkpoints are known.
        seen: what of the suites it will have seen, for the user.
    """

    run: ResolvedRun
    data: Data
    plan: StepPlan
    resumed: Checkpoint | None
    notices: list[str]
    run_id: str
    seen: list[str]


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
    return train_runs([config], resume=resume, until=until)[0]


def train_runs(configs: Sequence[RunConfig], *, resume: bool = False, until: int | None = None) -> list[Path]:
    """Train runs of one base together, and return their folders, as :func:`train_run`. Collective over ranks.

    Each is what it is alone. One that fails does not end the others; its error is raised when they have ended.
    """
    check_deterministic(wanted=configs[0].train.deterministic)
    # The first process reads and writes the folders, for all.
    with ExitStack() as stack:
        for folder in {config.folder: None for config in configs} if launched_rank() == 0 else ():
            stack.enter_context(in_use(folder))
        return _train_alone(configs, resume=resume, until=until)


def _train_alone(configs: Sequence[RunConfig], *, resume: bool, until: int | None) -> list[Path]:
    """Train in folders that no other run is writing to. Collective over ranks."""
    config, wanted = configs[0], configs[0].train.deterministic
    runs = [resolve_run(each, launched_world_size(), device()) for each in configs]
    check_together(runs)
    for run in runs:
        if not resume:
            ensure_new_run_dir(run.config.folder)
        elif launched_rank() == 0:
            check_resume_settings(run)
        check_shape(run)
    materials = [open_run_data(run) for run in runs]
    base = identify(runs[0].config.model)  # here for the same reason: the first time, every byte is read
    for run in () if resume else runs:
        check_start(run, base)

    hang_seconds = 60 * config.train.hang_minutes
    # The watchdog reports a hang; the timeout of collectives must be longer than its own.
    with Watchdog(config.folder / "hang", hang_seconds, launched_rank(), launched_world_size()):
        watchdog.beat("the meeting of all processes", LOADING_PATIENCE)
        init_distributed(minutes=max(30.0, 2 * config.train.hang_minutes), deterministic=wanted)
        with deterministic_algorithms(wanted=wanted):
            check_same_base(base)
            texts = TrainedTexts()
            opened = [_find_start(*one, base, texts, resume=resume) for one in zip(runs, materials, strict=True)]
            _train_on_rows(opened, base, until)
    return [each.folder for each in configs]


def _find_start(
    run: ResolvedRun, material: Material, base: BaseRecord, texts: TrainedTexts, *, resume: bool
) -> OpenedRun:
    """Return a run that begins, or goes on. Collective over ranks."""
    check_same_rows(material[0])
    run_id = known_run_id(run.config.folder) if resume and is_main() else None
    resumed, notices = None, list[str]()
    if resume:
        run, material, resumed, notices = find_resume_point(run, material, base, run_id)
    run_id = broadcast_object(run_id or (resumed and resumed.facts.get("run")) or new_run_id())
    config = run.config
    compared = config.data.mixture, config.evaluate.selection, config.data.columns
    seen = overlap_notices(*compared, texts) if is_main() else []
    return OpenedRun(run, *material, resumed, notices, run_id, seen)


def _train_on_rows(opened: Sequence[OpenedRun], base: BaseRecord, until: int | None) -> None:
    """Train on the planned rows. Collective over ranks."""
    watchdog.beat("the loading of the model", LOADING_PATIENCE)
    model, summary = open_base(opened[0].run)
    config, names = opened[0].run.config, labels([one.run.config for one in opened])
    signals = SignalHandler()
    hang = Watchdog(config.folder / "hang", 60 * config.train.hang_minutes, rank(), world_size())
    if len(opened) == 1:
        passes = _start(opened[0], model, summary, base, until, signals)
        with signals, hang:
            run_passes(passes)
        barrier()
        return
    check_draws_nothing(model)
    if is_main():
        log.info(f"{len(opened)} runs on one {Path(config.model.path).name}: {', '.join(names)}")
    steps = sum(len(one.plan) for one in opened)
    with (show_progress if is_main() else no_progress)("training", steps, "steps") as at:
        display = OneDisplay(at)
        runs = {
            name: _start(one, share_weights(model), summary, base, until, signals, names, display.of(name), name)
            for name, one in zip(names, opened, strict=True)
        }
        together = Together(runs, model, measured=not any(one.resumed for one in opened))
        with signals, hang:
            together.train()
    barrier()
    if is_main():
        for name, one in zip(names, opened, strict=True):
            together.write_facts(one.run.config.folder, name)
    barrier()
    raise_failures(together.outcomes)


def _start(
    opened: OpenedRun,
    model: Any,
    summary: ModelSummary,
    base: BaseRecord,
    until: int | None,
    signals: SignalHandler,
    company: Sequence[str] = (),
    show: Progress = show_progress,
    label: str = "",
) -> Passes[TrainState]:
    """Give a model the run's adapters and an engine; return the training, which has not begun. Collective over ranks.

    ``company`` are the names of the runs that it is trained together with, if it is, and ``label`` is its own.
    """
    run, data, plan, resumed, notices = opened.run, opened.data, opened.plan, opened.resumed, opened.notices
    config = run.config
    start = None if resumed else config.train.start_from
    methods = inject_methods(model, config, initialize=not (resumed or start))
    begun = start_adapters(model, start, base) if start else []
    watchdog.beat("the start of the engine", LOADING_PATIENCE)
    run = run.with_adapters(model)
    if resumed:
        notices = [*notices, *describe_resume(resumed, run, plan)]
    notices = [*begun, *notices, *run.engine.notices, *data.notices, *schedule_notices(config, data, plan)]
    notices += ineffective_settings(model, config.train)
    notices += opened.seen
    report = {**data.report, "seen": opened.seen}
    write_run_metadata(run, model, summary, methods, report, resumed, opened.run_id, company)
    notices.append(data.example)

    began = time.perf_counter()
    logger = TrainLogger(
        config.folder,
        len(plan),
        every=config.train.log_every,
        trackers=config.train.trackers,
        config=config.as_dict(),
        done=resumed.facts["step"] if resumed else 0,
        seconds=resumed.facts["seconds"] if resumed else 0.0,
        label=label,
        show=show,
    )
    for part in methods:
        logger.note("{method}: {trained:,} trained numbers at {sites} sites, {reach}".format(**part))
    for notice in notices:
        logger.note(notice)
    engine = start_engine(run, model, steps=len(plan))
    weight_bytes = gather_objects(weight_memory_bytes(model))
    settings = {"config": config.as_dict(), "engine": run.engine.settings, "base": base.as_dict(), "run": opened.run_id}
    about = {"model": config.model.path, "run": opened.run_id}

    def training() -> Passes[TrainState]:
        torch.manual_seed(config.train.seed + rank())  # dropout must differ between ranks
        with logger:
            try:
                state = yield from train(
                    engine, data, plan, config.train, run.layout, config.folder, logger,
                    signals=signals, settings=settings, about=about, resumed=resumed, until=until,
                )  # fmt: skip
            except UserError:
                raise
            except Exception as error:
                if (trouble := file_trouble(error)) is None:
                    raise
                raise UserError(f"{trouble}. {last_checkpoint_hint(config.folder)}") from error
        if is_main() and not is_paused(state, until, len(plan)):
            write_outcome(config.folder, state, time.perf_counter() - began, weight_bytes)
        return state

    return training()


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
    model, summary = open_base(run)
    return model, summary, inject_methods(model, run.config, initialize=initialize)


def open_base(run: ResolvedRun) -> tuple[Any, ModelSummary]:
    """Load the model of a run, and return it with a summary. Collective over ranks."""
    config = run.config
    torch.manual_seed(config.train.seed)
    model: Any = open_model(config.model, zero3=run.engine.settings if run.engine.stage == 3 else None)
    base_record(model)  # of the files as they are now: they may change before the adapters are saved
    summary = summarize_model(model, config.model)
    model.train()
    model.config.use_cache = False
    if config.train.liger:
        apply_liger(model)
    return model, summary


def inject_methods(model: Any, config: RunConfig, *, initialize: bool) -> list[dict[str, Any]]:
    """Inject a run's adapters into its model and return one report per method. Collective over ranks."""
    progress = watchdog.beating(show_progress if is_main() else no_progress)
    return [inject_method(model, entry, config.train.seed, progress, start=initialize) for entry in config.method]


def write_run_metadata(
    run: ResolvedRun,
    model: Any,
    summary: ModelSummary,
    methods: list[dict[str, Any]],
    data: dict[str, Any],
    resumed: Checkpoint | None,
    run_id: str,
    company: Sequence[str] = (),
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
        if company:
            before: dict[str, Any] = read_environment(config.folder) if resumed else {}
            about["together"] = list(company)
            about |= {key: before[key] for key in ("gain", "share") if key in before}
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
    about = read_environment(folder)
    about["outcome"] = {**asdict(state), "seconds": seconds, "peak_memory": peak_memory(), "weights_held": weight_bytes}
    write_json(folder / ENVIRONMENT_FILE, about)
