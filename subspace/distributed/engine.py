"""Part of engine."""

from __future__ import annotations

import datetime
import logging
import math
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from subspace.distributed.collectives import world_size
from subspace.distributed.deepspeed_config import Json


def init_distributed(minutes: float = 30) -> None:
    """Join the other processes of the launch, or be the only one. A rank that waits over ``minutes`` gives up."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)

    import deepspeed

    if not torch.cuda.is_available():
        # On CPU DeepSpeed would compile an op that training never calls: a minute of waiting, a compiler that must be
        # there, and a lock that hangs for ever once a build was killed. It asks this table whether the machine can
        # build it.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Of no use to a user: DeepSpeed calls collectives by the names that torch is about to retire.
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*", category=FutureWarning)
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(timeout=datetime.timedelta(minutes=minutes), verbose=False)


def init_engine(
    model: nn.Module, config: Json, optimizer: torch.optim.Optimizer, schedule: Callable[[int], float]
) -> Any:
    """Hand the model and its optimizer to DeepSpeed; return the engine.

    ``schedule`` gives the factor on each group's learning rate for the optimizer step of that number, 0 being the
    first.
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
        engine.enable_backward_allreduce = False  # it would copy all gradients twice, to add nothing to them
    return engine


def init_inference_engine(model: nn.Module, config: Json) -> Any:
    """Hand a frozen model to ZeRO-3; return the engine. What passes through the model gathers its weights."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def max_abs_gradient(engine: Any) -> torch.Tensor:
    """Return the largest magnitude among the gradients that this process holds between last backward and step.

    It is not finite where one of them is not. Of gradients that ZeRO has offloaded, nothing is seen.
    """
    if engine.zero_optimization():
        averaged = getattr(engine.optimizer, "averaged_gradients", {})
        gradients = [g for group in averaged.values() for g in group or () if g is not None]
    else:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=engine.device)
    return torch.stack([norm.float() for norm in torch._foreach_norm(gradients, math.inf)]).max().to(engine.device)


def gradient_norm(engine: Any) -> float | None:
    """Return the gradient's norm between last backward and step without ZeRO; ZeRO itself tells it after the step."""
    if engine.zero_optimization():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def loss_scale_exhausted(engine: Any) -> bool:
    """Tell whether float16's loss scale is as small as it may become."""
    scaler = engine.optimizer.loss_scaler
    return bool(scaler.dynamic and scaler.cur_scale <= scaler.min_scale)
