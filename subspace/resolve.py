"""Resolve and check a training run's settings before anything is loaded; shared by ``train`` and ``plan``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from subspace.adapters import registry
from subspace.adapters.inject import trained_parameters
from subspace.adapters.parameter_count import count_numbers
from subspace.common.settings import current_names, declared_settings
from subspace.config import METHOD, SECTIONS, RunConfig
from subspace.data.dataset import Data, Fed
from subspace.data.sampler import StepPlan, draw_steps
from subspace.data.tasks import find_mixture
from subspace.distributed.deepspeed_config import (
    BatchLayout,
    EngineConfig,
    compute_batch_layout,
    read_engine_file,
    resolve_deepspeed_config,
)
from subspace.distributed.zero import full_shape
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from subspace.models.inspection import inspect_model
from subspace.models.prepare import find_files
from subspace.training.acceleration import check_accelerations
from subspace.training.compatibility import check_compatibility, check_packing
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
    engine = resolve_deepspeed_config(
        read_engine_file(config.engine),
        layout,
        dtype=config.model.dtype,
        clip=config.train.max_grad_norm,
        source=config.engine,
    )
    on_gpu = device.type == "cuda"
    methods = [(entry.adapter_class, entry.settings) for entry in config.method]
    check_optimizer(config.train.optimizer, gpu=on_gpu, offloaded=engine.optimizer_offloaded)
    if here:
        check_accelerations(compiled=config.train.compile, liger=config.train.liger, gpu=on_gpu)
    check_compatibility(config.model, methods, engine.settings, here=here)
    check_trackers(config.train.trackers)
    if config.train.validate_every and not config.data.validation:
        raise UserError("train.validate_every needs held-out rows, but data.validation is 0. Set it to 120, say")
    if config.data.packing:
        check_packing([method for method, _ in methods])
    return ResolvedRun(_with_data_defaults(config), layout, engine, device)


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


def step_draw(config: RunConfig, layout: BatchLayout) -> Fed:
    """Return a function from the number of rows to those that the run trains on; only these are tokenised."""
    train = config.train
    return partial(draw_steps, batch=layout.batch, epochs=train.epochs, steps=train.steps, seed=train.seed)


def step_plan(data: Data, config: RunConfig, layout: BatchLayout) -> StepPlan:
    """Return the rows of each step."""
    return StepPlan(
        data.train.lengths,
        batch=layout.batch,
        epochs=config.train.epochs,
        steps=config.train.steps,
        seed=config.train.seed,
        group_by_length=config.data.group_by_length,
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
