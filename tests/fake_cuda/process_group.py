"""NCCL for the fake device: gloo on the same memory, with NCCL's rules for tensors.

Import it after ``device.load()``. DeepSpeed then starts it where it would start NCCL.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.fake_cuda.device import host_view

#: torch's names for collectives of one tensor, and gloo's.
NAMES = {"all_gather_single": "_allgather_base", "reduce_scatter_single": "_reduce_scatter_base"}
NAMES |= {
    name: name for name in ("allreduce", "allgather", "broadcast", "reduce", "reduce_scatter", "gather", "scatter")
}


class DeviceGroup(dist.ProcessGroup):
    """A process group whose tensors have to lie on this process's device, as NCCL has it.

    Attributes:
        bound: the device that the process set, or that the group was bound to, before its first collective.
        calls: the collectives so far, by name, with the tensors' devices.
    """

    bound: torch.device | None = None
    calls: list[tuple[str, str]] = []  # noqa: RUF012  (of all groups together)
    #: What torch puts pickled objects on.
    _device_types = [torch.device("cuda")]  # noqa: RUF012

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)

    def barrier(self, opts: Any = None) -> Any:
        self.calls.append(("barrier", f"cuda:{torch.cuda.current_device()}"))
        return self.gloo.barrier()

    def getBackendName(self) -> str:  # noqa: N802
        return "nccl"

    def host(self, name: str, value: Any) -> Any:
        """Return a collective's argument with the host's view of each tensor, which has to be on the device."""
        if isinstance(value, (list, tuple)):
            return [self.host(name, part) for part in value]
        if not isinstance(value, Tensor):
            return value
        self.calls.append((name, str(value.device)))
        if value.device.type != "cuda":
            raise RuntimeError(f"No backend type associated with device type {value.device.type}")
        cls = type(self)
        cls.bound = cls.bound or value.device
        if value.device != cls.bound:
            raise RuntimeError(
                "Attempt to perform collective on tensor not on device passed to init_process_group: "
                f"{value.device}, not {cls.bound}"
            )
        return host_view()(value.detach())


def _collective(name: str, gloo_name: str) -> Any:
    def call(self: DeviceGroup, *args: Any, **kwargs: Any) -> Any:
        on_host = [self.host(name, arg) for arg in args], {key: self.host(name, arg) for key, arg in kwargs.items()}
        return getattr(self.gloo, gloo_name)(*on_host[0], **on_host[1])

    return call


for name, gloo_name in NAMES.items():
    setattr(DeviceGroup, name, _collective(name, gloo_name))


def install() -> None:
    """Let ``torch.distributed`` start this group for ``nccl``, and bind it to the device that it is given."""
    module: Any = dist
    module.Backend.register_backend("fake_nccl", DeviceGroup, devices=["cuda"])
    start, backend = module.init_process_group, module.get_backend

    def init_process_group(name: str | None = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        DeviceGroup.bound = device_id
        start("fake_nccl" if name == "nccl" else name, *args, **kwargs)

    module.init_process_group = init_process_group
    module.get_backend = lambda group=None: "nccl" if backend(group) == "fake_nccl" else backend(group)
