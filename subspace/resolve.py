"""Resolve and check a training run's settings before anything is loaded; shared by ``train`` and ``plan``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subspace.adapters import registry
from subspace.adapters.inject import inject, trained_parameters
from subspace.adapters.parameter_count import count_numbers
from subspace.common.paths import find_resource
from subspace.common.settings import current_names, declared_settings, split_names
from subspace.config import METHOD, SECTIONS, RunConfig
from subspace.data.config import DataConfig
from subspace.data.dataset import Data, Fed
from subspace.data.sampler import StepPlan, draw_steps
from subspace.data.sources.find import is_here, split_of
from subspace.data.tasks import find_mixture, is_declaration, list_mixtures
from subspace.distributed.deepspeed_config import (
    BatchLayout,
    EngineConfig,
    check_by_deepspeed,
    compute_batch_layout,
    read_engine_file,
    resolve_deepspeed_config,
)
from subspace.distributed.zero import full_shape
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from subspace.models.inspection import inspect_model
from subspace.models.loading import open_shape
from subspace.models.prepare import find_files
from subspace.training.acceleration import check_accelerations
from subspace.training.compatibility import check_compatibility, check_packing
from subspace.training.config import TrainConfig
from subspace.training.logging import check_trackers
from subspace.training.optimizers import check_optimizer


@dataclass(frozen=True)
class ResolvedRun:
    """A run whose settings are consistent with one another, this machine and the number of processes.

    Attributes:
        config: the run's configuration.
        layout: how the rows of a step are distributed.
        engine: DeepSpeed's configuration.
        device: where the model computes.
        trained: number of trainable parameters, with those that a method keeps for later; 0 until
            :meth:`with_adapters`.
    """

    config: RunConfig
    layout: BatchLayout
    engine: EngineConfig
    device: torch.device
    trained: int = 0

    @property
    def on_gpu(self) -> bool:
        """True if the model computes on a GPU."""
        return self.device.type == "cuda"

    def with_adapters(self, model: nn.Module) -> ResolvedRun:
        """Return the run with the engine settings that depend on the size of the model's adapters.

        Raises:
            UserError: a setting of the engine file is incompatible with the adapters' sizes.
        """
        parameters = trained_parameters(model).values()
        trained, largest = count_numbers(parameters), max(full_shape(parameter).numel() for parameter in parameters)
        return replace(self, trained=trained, engine=self.engine.for_adapters(trained=trained, largest=largest))


def resolve_run(config: RunConfig, world_size: int, device: torch.device, *, here: bool = True) -> ResolvedRun:
    """Return the resolved run after all checks that need no model or data.

    Args:
        config: the run's configuration.
        world_size: the number of processes.
        device: where each of them computes.
        here: whether that is on this machine, which then must have what the run needs.

    Raises:
        UserError: settings that conflict with one another, the model's files, the engine file or the machine.
    """
    config = replace(config, model=_inspected(config.model))
    layout = compute_batch_layout(config.train.batch_size, config.train.micro_batch_size, world_size)
    engine = check_by_deepspeed(
        resolve_deepspeed_config(
            read_engine_file(config.engine),
            layout,
            dtype=config.model.dtype,
            clip=config.train.max_grad_norm,
            source=config.engine,
        )
    )
    on_gpu = device.type == "cuda"
    methods = [(entry.adapter_class, entry.settings) for entry in config.method]
    check_optimizer(config.train.optimizer, gpu=on_gpu, offloaded=engine.optimizer_offloaded)
    if here:
        check_accelerations(compiled=config.train.compile, liger=config.train.liger, gpu=on_gpu)
    check_compatibility(config.model, methods, engine.settings, here=here)
    check_trackers(config.train.trackers)
    check_validation(config)
    if config.data.packing:
        check_packing([method for method, _ in methods])
    return ResolvedRun(_with_data_defaults(config), layout, engine, device)


def shape_with_adapters(run: ResolvedRun) -> tuple[Any, ResolvedRun]:
    """Return the model with adapters on the meta device, which costs no memory, and the run with its final engine."""
    config = run.config
    model: Any = open_shape(config.model, run.device)
    for part in config.method:
        inject(model, part.adapter_class, part.settings, targets=part.targets, patterns=part.patterns, start=False)
    return model, run.with_adapters(model)


def check_shape(run: ResolvedRun) -> None:
    """Raise UserError for targets, patterns and sizes that do not fit the model, before its weights are opened."""
    if not run.config.model.trust_remote_code:  # foreign code may not bear a model without values
        shape_with_adapters(run)


def _with_data_defaults(config: RunConfig) -> RunConfig:
    """Return the configuration with what null stands for in the settings of the data, where that is known."""
    if any(part.data for part in find_mixture(config.data.mixture).parts):
        return config  # the longest row and the tokenizer decide
    return replace(config, data=config.data.of_tasks())


def _inspected(model: ModelConfig) -> ModelConfig:
    """Return the settings as they are of the model's files; as given where it is not here, which opening it reports."""
    try:
        find_files(model)
    except UserError:
        return model
    return inspect_model(model)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return a run's configuration for its folder: its files are found from whatever folder it is read in."""
    model = replace(config.model, path=_absolute(config.model.path))
    data = replace(
        config.data,
        mixture=_absolute_mixture(config.data.mixture),
        chat_template=_absolute(config.data.chat_template),
    )
    tasks = [_absolute(task) if is_declaration(task) else task for task in split_names(config.evaluate.tasks)]
    evaluate = replace(
        config.evaluate, tasks=tasks, data=_absolute(config.evaluate.data), engine=_absolute(config.evaluate.engine)
    )
    train = replace(config.train, start_from=_absolute(config.train.start_from))
    return replace(config, model=model, data=data, train=train, evaluate=evaluate)


def _absolute(path: Any) -> Any:
    if path is None or not is_here(name := split_of(path)[0]):
        return path
    if not Path(name).expanduser().exists() and find_resource(name):
        return path  # a file of the project's own, which is found by this name from every folder
    return str(Path(path).expanduser().absolute())


def _absolute_mixture(wanted: str) -> str:
    if wanted in list_mixtures():
        return wanted
    if is_declaration(wanted):
        return str(_absolute(wanted))
    if is_here(wanted) and not find_mixture(wanted).parts[0].task:  # a path may have a comma in it
        return str(_absolute(wanted))
    try:
        parts = find_mixture(wanted).parts
    except UserError:  # which opening the data reports
        return wanted
    rows = [f":{part.rows}" if part.rows else "" for part in parts]
    weights = [f"*{part.weight:g}" if part.weight != 1 else "" for part in parts]
    names = [_absolute(part.data) or part.task for part in parts]
    if names == [part.data or part.task for part in parts]:
        return wanted
    return ",".join(f"{name}{count}{weight}" for name, count, weight in zip(names, rows, weights, strict=True))


def check_validation(config: RunConfig) -> None:
    """Raise UserError where a setting needs validations, or held-out rows, that another setting excludes."""
    train = config.train
    wants = [f"train.patience={train.patience}"] if train.patience else []
    wants += ["train.save_final=best"] if train.save_final == "best" else []
    if wants and not train.validates:
        raise UserError(
            f"{' and '.join(wants)} need validations, but train.validate_every is 0. Leave that out, and there is one "
            "an epoch, or set it to a number of steps"
        )
    if train.validates and config.data.validation == 0:
        wants = [f"train.validate_every={train.validate_every}"] if train.validate_every else wants
        raise UserError(f"{' and '.join(wants)} needs held-out rows, but data.validation is 0. Leave that out")


def data_settings(config: RunConfig) -> DataConfig:
    """Return the data settings as a run has them: without a number given, rows are held out where they are used."""
    if config.data.validation is None and not config.train.validates:
        return replace(config.data, validation=0)
    return config.data


def step_draw(config: RunConfig, layout: BatchLayout) -> Fed:
    """Return a function from the number of rows to those that the run may train on; only these are tokenised."""
    train = config.train
    return partial(
        draw_steps,
        batch=layout.batch,
        epochs=train.epochs,
        steps=train.steps,
        seed=train.seed,
        group_by_length=config.data.group_by_length,
    )


def step_plan(data: Data, config: RunConfig, layout: BatchLayout, *, former: bool = False) -> StepPlan:
    """Return the rows of each step; ``former`` as for :class:`StepPlan`."""
    return StepPlan(
        data.train.lengths,
        batch=layout.batch,
        epochs=config.train.epochs,
        steps=config.train.steps,
        seed=config.train.seed,
        group_by_length=config.data.group_by_length,
        former=former,
    )


def with_current_names(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return :meth:`RunConfig.as_dict` of an earlier version, as a checkpoint keeps it, under the present names."""

    def entry(values: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return current_names(registry.resolve_method(str(values["name"]))[0].Config, values)
        except UserError:  # a method that is not registered here; loading it reports that
            return dict(values)

    current = dict(plain)
    for name, cls in SECTIONS.items():
        # What was no setting yet was as it is by default now.
        defaults = {key: info.default for key, info in declared_settings(cls).items()}
        current[name] = {**defaults, **current_names(cls, plain.get(name, {}))}
    method = plain[METHOD]
    current[METHOD] = entry(method) if isinstance(method, Mapping) else [entry(values) for values in method]
    return current


def schedule_notices(config: RunConfig, data: Data, plan: StepPlan) -> list[str]:
    """Return what the run's steps are, and the settings of its schedule that cannot have the effect they are for."""
    return [_count_notice(data, plan), *_ineffective(config, data, plan)]


def _count_notice(data: Data, plan: StepPlan) -> str:
    rows, steps = plan.num_rows, len(plan)
    last = plan.rows_until(steps) - plan.rows_until(steps - 1)
    if steps == 1:
        taken = f"1 step of {last:,}"
    else:
        taken = f"{steps:,} steps of {plan.batch:,}" + (f", the last of {last:,}" if last < plan.batch else "")
    times, rest = divmod(plan.taken, rows)
    often = {0: "not at all", 1: "once"}
    visits = f"each {often.get(times, f'{times:,} times')}"
    if rest:
        visits = f"{rest:,} of them {often.get(times + 1, f'{times + 1:,} times')}, the others {visits[5:]}"
    if min(plan.batch, plan.taken) > rows:
        visits += "; a step takes more rows than there are, so some twice or more"
    return f"{rows:,} rows to train on, {len(data.validation):,} held out: {taken}; {visits}"


def _ineffective(config: RunConfig, data: Data, plan: StepPlan) -> Iterator[str]:
    train, steps = config.train, len(plan)
    if (warmup := train.warmup(steps)) >= steps and warmup > 1:
        reached = steps / warmup
        yield (
            f"train.warmup_steps={warmup} is no less than the run's {steps} steps: the learning rate ends at "
            f"{reached:.0%} of train.learning_rate={train.learning_rate:g}, and train.schedule has no effect"
        )
    if len(data.validation) and not train.validates:
        yield (
            f"data.validation={config.data.validation} holds rows out of training, but nothing looks at them: set "
            "train.validate_every, or leave data.validation out"
        )
    period = train.validation_period(plan.num_rows)
    if train.patience and (train.patience + 1) * period >= steps:
        yield (
            f"train.patience={train.patience} has no effect: with a validation every {period} steps, there are too few "
            f"of them in {steps} steps for so many without a better loss"
        )
    if train.lora_plus_rule == "peft" and train.lora_plus_lr_ratio == 1:
        yield "train.lora_plus_rule=peft has no effect, because train.lora_plus_lr_ratio is 1"
    if not train.save_every and not train.validates and train.keep_checkpoints != TrainConfig().keep_checkpoints:
        yield f"train.keep_checkpoints={train.keep_checkpoints} has no effect: train.save_every=0 saves none"
    if config.data.limit is not None and config.data.limit > plan.num_rows:
        yield f"data.limit={config.data.limit:,} has no effect: there are {plan.num_rows:,} rows to train on"
