"""The devices that a run can be planned for: this machine's, a GPU of ``data/devices.yaml``, or a size of memory.

Besides the tensors of a run, a GPU's memory holds what CUDA, NCCL, cuBLAS and the allocator take. torch's counters of
allocated memory show little of it, no figure of it is published, and it differs with driver and machine: these are
estimates, from reports that each constant names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from subspace.common import paths
from subspace.common.declarations import Declaration, build
from subspace.common.foreign.yaml_files import read_yaml
from subspace.errors import UserError, nearest
from subspace.planning.static_memory import MemoryItem

#: A process's CUDA context with torch's kernels loaded: 0.72 GB reported for one number on a device
#: (discuss.pytorch.org/t/73021), 0.78 GB in pytorch/pytorch#34323.
CUDA_CONTEXT = 750_000_000
#: NCCL's buffers of one communicator: 1.06 GB reported on eight H100 (NVIDIA/nccl#1685); 1.6 GB in NVIDIA/nccl#864.
NCCL_BUFFERS = 1_100_000_000
#: torch's cuBLAS workspace: 32 MiB from compute capability 9.0 on, 8 MiB and 128 KiB before (its CublasHandlePool.cpp);
#: one for each thread with a stream, and the backward pass has a thread of its own.
CUBLAS_WORKSPACE = {True: 2 * (32 << 20), False: 2 * ((8 << 20) + (128 << 10))}
#: Share of a step's tensors that the allocator holds besides, in blocks too small to use; an assumption.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class DeviceSpec(Declaration):
    """A GPU's published figures: memory in GB, bandwidth in GB/s, rates of dense matrix products in TFLOP/s."""

    title: str
    memory: float
    bandwidth: float
    rates: Mapping[str, float]
    compute_capability: float
    source: str

    def rate(self, dtype: str) -> float:
        """Return the rate of matrix products in a dtype of models, in floating-point operations per second."""
        return 1e12 * self.rates["fp32" if dtype == "float32" else "bf16"]


@dataclass(frozen=True)
class PlannedDevice:
    """A GPU to plan for.

    Attributes:
        name: as the user gave it.
        memory: bytes.
        spec: its published figures; None if only its memory is known.
    """

    name: str
    memory: int
    spec: DeviceSpec | None

    def __str__(self) -> str:
        return self.spec.title if self.spec else f"a GPU of {self.name}"


def device_specs() -> dict[str, DeviceSpec]:
    """Return the declared GPUs by name."""
    declared = read_yaml(paths.declarations_folder() / "devices.yaml")
    return {name: build(DeviceSpec, spec, "devices.yaml") for name, spec in declared.items()}


def find_device(text: str) -> PlannedDevice:
    """Return the declared GPU of a name, or one of which only the memory is given, as ``24gb``."""
    specs = device_specs()
    name = text.strip().lower()
    if name in specs:
        return PlannedDevice(name, int(specs[name].memory * 10**9), specs[name])
    if re.match(r"[\d.]+\s*gi?b?$", name):
        return PlannedDevice(text.strip(), parse_size(text, "--device"), None)
    raise UserError(f"--device {text} was given, but no such GPU is known. {nearest(name, specs)}; or a size, as 24gb")


def parse_size(text: str, option: str = "--memory") -> int:
    """Return the number of bytes in a size such as ``24GB`` or ``80 GiB``."""
    number = text.lower().rstrip("gib ").strip()
    try:
        return int(float(number) * (2**30 if "i" in text.lower() else 10**9))
    except ValueError:
        raise UserError(f"{option} {text} was given, but it takes gigabytes, as 24GB or 80GiB") from None


def gpu_overheads(processes: int, spec: DeviceSpec | None, dynamic: int) -> tuple[MemoryItem, ...]:
    """Return what a process of a run needs on a GPU besides its tensors.

    Args:
        processes: of the run.
        spec: the GPU's figures; None counts with the larger workspace.
        dynamic: bytes of the tensors that a step allocates and frees.
    """
    items = [MemoryItem("CUDA context and kernels (estimate)", CUDA_CONTEXT)]
    if processes > 1:
        items.append(MemoryItem("NCCL's buffers (estimate)", NCCL_BUFFERS))
    workspace = CUBLAS_WORKSPACE[spec is None or spec.compute_capability >= 9]
    items.append(MemoryItem("cuBLAS workspaces (estimate)", workspace))
    items.append(MemoryItem(f"fragmentation, {FRAGMENTATION:.0%} of a step (estimate)", int(FRAGMENTATION * dynamic)))
    return tuple(items)
