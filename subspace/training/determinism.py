"""Training that gives the same bits each time, also on a GPU.

On a CPU it always does. On a GPU, three kinds of sums are added up in whatever order threads finish, unless told not
to: some of torch's kernels, cuBLAS with its own choice of workspace, and NVLink switches that add for NCCL. torch's
switch covers the first: with it, scaled dot-product attention runs in its flash or memory-efficient form with an
ordered backward pass (cuDNN's has none and is left out), and compiled layers are not chosen by timing. The others are
set by environment variables (:data:`subspace.distributed.launcher.DETERMINISTIC_ENV`), before CUDA starts.

bitsandbytes' kernels ask nobody, and need not: products of int8 are sums of integers, the scales of blocks are maxima,
and the one sum that is not ordered, of an update's norm, belongs to a limit on it that no optimizer here sets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from subspace.errors import UserError


def check_deterministic(*, wanted: bool) -> None:
    """Raise UserError if CUDA has started in this process, and without what ``train.deterministic`` needs."""
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if wanted and started and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        raise UserError(
            "train.deterministic=true was asked for, but this process has used CUDA already, and cuBLAS would not be "
            "deterministic. Set CUBLAS_WORKSPACE_CONFIG=:4096:8 before CUDA starts, or use `subspace train`"
        )


@contextmanager
def deterministic_algorithms(*, wanted: bool) -> Iterator[None]:
    """Inside the block, make torch use deterministic algorithms if ``wanted``; then its switches are as before.

    Raises:
        UserError: an operation inside the block has no deterministic form on its device.
    """
    if not wanted:
        yield
        return
    filling: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, filling.fill_uninitialized_memory = filling.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise UserError(
            f"train.deterministic=true cannot be kept: {str(error).split(',')[0]}. "
            "Set train.deterministic=false, or train on a CPU, where every operation has one"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        filling.fill_uninitialized_memory = filled
