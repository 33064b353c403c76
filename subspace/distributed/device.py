"""The device of this process. Everything that needs to know it asks here, and nothing asks torch.cuda directly."""

from __future__ import annotations

import os

import torch

from subspace.errors import UserError


def device() -> torch.device:
    """Return this process's device: a GPU if there is one, unless ``DS_ACCELERATOR`` names another accelerator.

    The GPU is that of the local rank. Where a process sees one GPU only, which SLURM's ``--gpus-per-task`` and
    containers give it, that is its own whatever its local rank.

    Raises:
        UserError: there are more processes on this machine than GPUs.
    """
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda" or not torch.cuda.is_available():
        return torch.device("cpu")
    own = os.environ.get("LOCAL_RANK", "0")
    rank, count = int(own) if own.isdecimal() else 0, torch.cuda.device_count()
    if count > 1 and rank >= count:
        raise UserError(
            f"process {rank} of this machine needs a GPU of its own, but sees {count}. Start {count} processes on each "
            "machine, or show every process all GPUs, or one of its own"
        )
    return torch.device("cuda", rank if count > 1 else 0)


def on_gpu() -> bool:
    """Return True if this process computes on a GPU."""
    return device().type == "cuda"
