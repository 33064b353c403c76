"""DeepSpeed's engine: initialisation of process group and engine, gradients and their norm."""

from __future__ import annotations

import datetime
import math
import os
import secrets
import socket
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subspace.common.patching import patched
from subspace.distributed import peers
from subspace.distributed.collectives import gather_objects, object_group, rank, world_size
from subspace.distributed.deepspeed_compat import (
    disable_shm_comm_op,
    import_muon,
    keep_linear_protocol,
    local_gradients,
    offloaded_gradient_norms,
    skip_useless_allreduce,
)
from subspace.distributed.deepspeed_config import Json
from subspace.distributed.device import device
from subspace.distributed.hosts import meet_on_loopback
from subspace.distributed.launcher import check_meeting, set_rank_env
from subspace.distributed.rendezvous import open_store


def init_distributed(minutes: float = 30, *, deterministic: bool = False) -> None:
    """Initialise the process groups, also for a single process; a rank that waits longer than ``minutes`` fails.

    With ``deterministic``, CUDA's libraries are told to add up in the same order each time. CUDA must not have started.
    """
    set_rank_env(deterministic=deterministic)
    check_meeting()
    import deepspeed

    where, timeout = device(), datetime.timedelta(minutes=minutes)
    if where.type == "cuda":
        # Before the first collective: DeepSpeed does so only with its engine, and NCCL refuses tensors of a device that
        # is not its process's own.
        torch.cuda.set_device(where)
        # DeepSpeed's own barriers say no device; with the current one set, torch guesses right.
        warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    else:
        disable_shm_comm_op()
    if not torch.distributed.is_initialized():
        # Held until the group has a store of its own at the same port.
        meeting = open_store(timeout) if meet_on_loopback() else None
        deepspeed.init_distributed(timeout=timeout, verbose=False)
        del meeting
        object_group(timeout)
        if peers.several_launchers():
            _connect_peers()


def _connect_peers() -> None:
    """Let each process notice the end of the others. Collective over ranks."""
    listener = peers.open_listener() if rank() == 0 else None
    own = (socket.gethostname(), secrets.token_hex(16), listener.getsockname()[1] if listener else 0)
    hosts, (token, *_), (port, *_) = zip(*gather_objects(own), strict=True)
    peers.start(rank(), hosts, token, listener or (os.environ["MASTER_ADDR"], port))


def init_engine(
    model: nn.Module, config: Json, optimizer: torch.optim.Optimizer, schedule: Callable[[int], float]
) -> Any:
    """Return DeepSpeed's engine for the model and its optimizer.

    ``schedule`` returns the factor on every group's learning rate for an optimizer step, counted from 0.
    """
    import deepspeed

    keep_linear_protocol()
    import_muon()
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


def hand_gradients(engine: Any, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Let the engine take gradients that were computed elsewhere, as those of a backward pass of its own. Collective.

    It does with them what it does with its own: divides, scales, adds up, reduces.
    """
    loss: Tensor = _Handed.apply(gradients, *parameters)  # type: ignore[no-untyped-call]
    with patched(engine.module, "forward", lambda: loss):
        engine.backward(engine())


class _Handed(torch.autograd.Function):
    """Autograd function ``parameters -> 0`` with given gradients."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor | None], *parameters: nn.Parameter) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if gradient is None else factors[0] * gradient for gradient in ctx.gradients)


def init_inference_engine(model: nn.Module, config: Json) -> Any:
    """Return a ZeRO-3 engine for a frozen model; forward passes gather its weights."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def max_abs_gradient(engine: Any) -> torch.Tensor:
    """Return the largest absolute value of this rank's gradients between the last backward pass and the step.

    It is not finite if any of them is not. Of gradients that ZeRO has offloaded it is the largest norm.
    """
    norms = offloaded_gradient_norms(engine)
    if gradients := local_gradients(engine):
        norms += torch._foreach_norm(gradients, math.inf)
    if not norms:
        return torch.zeros((), device=engine.device)
    return torch.stack([norm.float().to(engine.device) for norm in norms]).max()


def gradient_norm(engine: Any) -> torch.Tensor | None:
    """Return the gradient norm between the last backward pass and the step; None under ZeRO, whose step computes it."""
    if engine.zero_optimization():
        return None
    return torch.nn.utils.get_total_norm(local_gradients(engine))
