"""CUDA without a GPU: builds ``device.cpp``, loads it before torch, and lets ``torch.cuda`` answer for it.

Only for a process of its own, whose first import this is: ``device.load()``, then everything else. Nothing here imports
torch by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import platformdirs

SOURCE = Path(__file__).with_name("device.cpp")
#: What a device says of itself: an H100's size.
DEVICES, MEMORY = 2, 80 << 30


def reason_not_to() -> str | None:
    """Return why there can be no such device here, or None if there can."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    if runpy.run_path(str(_torch_folder() / "version.py"))["cuda"] is not None:
        return "this torch is built for CUDA, which cannot have a second one"
    if compiler() is None:
        return "needs a C++ compiler: c++ or g++, or one named by CXX"
    return None


def compiler() -> str | None:
    """Return a C++ compiler, or None."""
    return next(
        (found for name in (os.environ.get("CXX"), "c++", "g++") if name and (found := shutil.which(name))), None
    )


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def build() -> Path:
    """Return the shared library, compiled for this torch at the first use: about twenty seconds."""
    torch = _torch_folder()
    key = hashlib.sha256(SOURCE.read_bytes() + (torch / "version.py").read_bytes()).hexdigest()[:16]
    library = platformdirs.user_cache_path("subspace") / "fake_cuda" / f"{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        partial = Path(folder) / library.name
        command = [compiler() or "c++", "-std=c++20", "-O0", "-shared", "-fPIC", str(SOURCE), "-o", str(partial)]
        command += [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
        partial.rename(library)  # several processes may build it at once
    return library


def load() -> Any:
    """Load the device, import torch and return it."""
    assert "torch" not in sys.modules, "torch has looked for CUDA already"
    os.environ["DS_ACCELERATOR"] = "cuda"
    library, folder = build(), _torch_folder() / "lib"
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    native = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    for name in ("fake_cuda_used", "fake_cuda_peak"):
        getattr(native, name).restype = ctypes.c_int64
    # It registers CUDA kernels of its own at import, where it sees CUDA. Its CPU kernels serve the device.
    import bitsandbytes  # noqa: F401
    import torch

    for operation in torch._C._dispatch_get_all_op_names():
        namespace, _, name = operation.partition("::")
        if namespace == "bitsandbytes" and torch._C._dispatch_has_kernel_for_dispatch_key(operation, "CPU"):
            native.fake_cuda_serve(namespace.encode(), name.encode())
    nvtx, nccl = dict.fromkeys(("range_push", "range_pop"), lambda *args: 0), {"version": lambda: (2, 27, 0)}
    for owner, names in ((torch.cuda, _functions(torch, native)), (torch.cuda.nvtx, nvtx), (torch.cuda.nccl, nccl)):
        for name, value in names.items():
            assert hasattr(owner, name), name
            if isinstance(value, FunctionType):  # torch's compiler wants another function for each name
                value = FunctionType(value.__code__, value.__globals__, name, value.__defaults__, value.__closure__)
            setattr(owner, name, value)
    torch.UntypedStorage.clone = functools.partialmethod(_clone, torch.UntypedStorage.clone)  # type: ignore[assignment]
    return torch


def _clone(storage: Any, clone: Any) -> Any:
    """Copy a storage, as deepcopy does; that of a device would be made by CUDA's allocator."""
    import torch

    if storage.device.type != "cuda":
        return clone(storage)
    return torch.empty(storage.nbytes(), dtype=torch.uint8, device=storage.device).untyped_storage().copy_(storage)


def _functions(torch: Any, native: Any) -> dict[str, Any]:
    """Return what stands in place of ``torch.cuda``'s names."""

    def index(device: Any = None) -> int:
        if isinstance(device, int):
            return device if device >= 0 else native.fake_cuda_current()
        found = torch.device(device).index if device is not None else None
        return int(native.fake_cuda_current() if found is None else found)

    started: set[bool] = set()

    def set_device(device: Any) -> None:
        started.add(True)
        if not 0 <= index(device) < DEVICES:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        native.fake_cuda_set(index(device))

    def exchange(device: int) -> int:
        before = int(native.fake_cuda_current())
        if device >= 0:
            set_device(device)
        return before

    class Stream(torch.Stream):  # type: ignore[misc]
        def __new__(cls, device: Any = None, priority: int = 0, **more: Any) -> Any:
            return super().__new__(cls, device=torch.device("cuda", index(device)))

    class Event(torch.Event):  # type: ignore[misc]
        def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Any:
            return super().__new__(cls, device="cuda")

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    def used(device: Any = None) -> int:
        return int(native.fake_cuda_used(index(device)))

    def peak(device: Any = None) -> int:
        return int(native.fake_cuda_peak(index(device)))

    properties = SimpleNamespace(
        name="CUDA of ordinary memory", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132, warp_size=32
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: bool(started),
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        **dict.fromkeys(("init", "_lazy_init"), lambda: started.add(True)),
        **dict.fromkeys(("synchronize", "empty_cache", "ipc_collect", "set_sync_debug_mode"), nothing),
        **dict.fromkeys(("manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all"), nothing),
        # Kernels of the CPU draw from the CPU's generator.
        "default_generators": (torch.default_generator,) * DEVICES,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()] * DEVICES,
        "device_count": lambda: DEVICES,
        "current_device": lambda: int(native.fake_cuda_current()),
        "set_device": set_device,
        **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), exchange),
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (MEMORY - used(device), MEMORY),
        **dict.fromkeys(("memory_allocated", "memory_reserved"), used),
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), peak),
        "reset_peak_memory_stats": lambda device=None: native.fake_cuda_reset_peak(index(device)),
        "memory_stats": lambda device=None: {},
        "Stream": Stream,
        "Event": Event,
        **dict.fromkeys(("current_stream", "default_stream"), Stream),
        "stream": contextlib.nullcontext,
        "set_stream": nothing,
    }


@functools.cache
def host_view() -> Any:
    """Return the function that shows a device's tensor as one of the host, in the same memory."""
    import torch

    return torch.ops.fake_cuda.host
