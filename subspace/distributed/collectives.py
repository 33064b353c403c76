"""Collective operations. Every function also works in a single process without a process group."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from subspace.distributed import peers
from subspace.distributed.deepspeed_compat import forget_world_group
from subspace.distributed.device import device

#: The group that exchanges objects, with the world's group that it was made for. See :func:`object_group`.
_object_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


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
    if not _active():
        return
    if dist.get_backend() == "nccl":
        # Otherwise torch guesses the device, and warns that it does.
        dist.barrier(device_ids=[device().index])
    else:
        dist.barrier()


def shutdown() -> None:
    """Destroy the process groups after a barrier: a rank that left earlier would break the others' communication."""
    if _active():
        barrier()
        peers.stop()
        dist.destroy_process_group()
        _object_groups.clear()
        forget_world_group()


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum of ``value`` over all processes, on each of them. The argument is not modified."""
    total = value.clone()
    if _active():
        dist.all_reduce(total)
    return total


def all_reduce_host(numbers: Sequence[int]) -> list[int]:
    """Return the sums of these numbers over all processes, on each of them, without waiting for a GPU."""
    if world_size() == 1:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(total, group=object_group())
    sums: list[int] = total.tolist()
    return sums


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
    dist.broadcast_object_list(box, src=0, group=object_group())
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return the objects of all ranks, in rank order, on every rank."""
    if not _active():
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value, group=object_group())
    return box


def object_group(timeout: datetime.timedelta | None = None) -> dist.ProcessGroup | None:
    """Return the group through which objects are exchanged: gloo's, in host memory. None for the world's group.

    NCCL would take pickled records and checkpoints through GPU memory, on whichever device torch thinks is current.
    The group is made once for a world, with its first ``timeout``. Collective over ranks.
    """
    world = dist.group.WORLD
    if world is None or dist.get_backend() == "gloo":
        return None
    if world not in _object_groups:
        _object_groups.clear()
        _object_groups[world] = dist.new_group(backend="gloo", timeout=timeout)
    return _object_groups[world]
