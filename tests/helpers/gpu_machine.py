"""Pytest plugin: a machine with a GPU that nothing may touch: ``python -m pytest -p tests.helpers.gpu_machine``.

The suite runs on the CPU wherever it runs, so torch may say that there is a GPU; what then starts CUDA, or reads
anything of a device, did not ask :func:`subspace.distributed.device.device` and fails here.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes  # noqa: F401  (it looks for its CUDA library where torch has found a GPU)
import pytest
import torch

#: What starts CUDA, or reads or changes the state of a device.
TOUCHES = (
    *("_lazy_init", "current_device", "current_stream", "device_count", "empty_cache", "get_device_name"),
    *("get_device_properties", "max_memory_allocated", "mem_get_info", "memory_allocated", "memory_reserved"),
    *("reset_peak_memory_stats", "set_device", "synchronize"),
)


class Touched(BaseException):
    """Something used the GPU. No Exception, so that nothing passes over it."""


def pytest_configure(config: pytest.Config) -> None:
    """Let torch see a GPU, and guard it."""
    torch.cuda.is_available = lambda: True
    for name in TOUCHES:
        setattr(torch.cuda, name, _guard(name))


def _guard(name: str) -> Any:
    def touch(*args: Any, **kwargs: Any) -> Any:
        raise Touched(f"torch.cuda.{name} was called in a test of the CPU")

    return touch
