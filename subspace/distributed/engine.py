"""DeepSpeed's engine: initialisation of process group and engine, gradients and their norm."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from subspace.distributed.collectives import world_size
from subspace.distributed.deepspeed_compat import disable_shm_comm_op, local_gradients, skip_useless_allreduce
from subspace.distributed.deepspeed_config import Json
from subspace.distributed.launcher import set_rank_env


def init_distributed(minutes: float = 30) -> None:
    """Initialise the process group, also for a single process; a rank that waits longer than ``minutes`` fails."""
    set_rank_env()
    import deepspeed

    if not torch.cuda.is_available():
        disable_shm_comm_op()
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(timeout=datetime.timedelta(minutes=minutes), verbose=False)


def init_engine(
    model: nn.Module, config: Json, optimizer: torch.optim.Optimizer, schedule: Callable[[int], float]
) -> Any:
    """Return DeepSpeed's engine for the model and its optimizer.

    ``schedule`` returns the factor on every group's learning rate for an optimizer step, counted from 0.
    """
    import deepspeed

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trained,
        optimizer=optimizer,
        config=config,
        lr_scheduler=lambda inner: torch.optim.lr_scheduler.LambdaLR(inner, schedule),
    )
    if world_size() == 1 and not engine.zero_optimization():
        skip_useless_allreduce(engine)
    return engine


def init_inference_engine(model: nn.Module, config: Json) -> Any:
    """Return a ZeRO-3 engine for a frozen model; forward passes gather its weights."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def max_abs_gradient(engine: Any) -> torch.Tensor:
    """Return the largest absolute value of this rank's gradients between the last backward pass and the step.

    It is not finite if any of them is not. Gradients that ZeRO has offloaded are not seen.
    """
    gradients = local_gradients(engine)
    if not gradients:
        return torch.zeros((), device=engine.device)
    return torch.stack([norm.float() for norm in torch._foreach_norm(gradients, math.inf)]).max().to(engine.device)


def gradient_norm(engine: Any) -> float | None:
    """Return the gradient norm between the last backward pass and the step; None under ZeRO, whose step computes it."""
    if engine.zero_optimization():
        return None
    return float(torch.nn.utils.get_total_norm(local_gradients(engine)))
