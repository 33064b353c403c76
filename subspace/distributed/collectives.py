"""Collective operations. Every function also works in a single process without a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from subspace.distributed.deepspeed_compat import forget_world_group


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _active() else 1


def is_main() -> bool:
    """Return True on rank 0, which writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process reaches this call."""
    if _active():
        dist.barrier()


def shutdown() -> None:
    """Destroy the process group after a barrier: a rank that left earlier would break the others' communication."""
    if _active():
        dist.barrier()
        dist.destroy_process_group()
        forget_world_group()


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum of ``value`` over all processes, on each of them. The argument is not modified."""
    total = value.clone()
    if _active():
        dist.all_reduce(total)
    return total


def broadcast_(value: Tensor, source: int = 0) -> Tensor:
    """Overwrite ``value`` in place with that of one rank, and return it."""
    if _active():
        dist.broadcast(value, src=source)
    return value


def broadcast_object(value: Any) -> Any:
    """Return rank 0's object on every rank."""
    if not _active():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_object_device())
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return the objects of all ranks, in rank order, on every rank."""
    if not _active():
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def _object_device() -> torch.device:
    # NCCL communicates GPU tensors only; pickled objects must be staged on the GPU.
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
