"""Optional accelerations: compiled layers, Liger kernels, activations offloaded to CPU memory.

They change results by rounding only.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subspace.errors import UserError
from subspace.models.transformers_compat import decoder_layers

SMALL = 1024  # elements; smaller tensors are not worth moving
AHEAD = 4  # saved tensors that are on their way to the host, or back, while others are computed with


def check_accelerations(*, compiled: bool, liger: bool, gpu: bool) -> None:
    """Raise UserError for unavailable accelerations."""
    if compiled and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise UserError(
            "train.compile needs a C++ compiler, and neither g++ nor clang++ is here. Install one (apt-get install "
            "g++), or set train.compile=false"
        )
    if liger and not gpu:
        raise UserError("train.liger asks for kernels of a GPU, and there is none here. Set train.liger=false")
    if liger and importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "train.liger needs the package liger-kernel, which is not installed. Install it (pip install "
            "liger-kernel), or set train.liger=false"
        )


def compile_layers(model: Any) -> None:
    """Compile each decoder layer at its first forward pass.

    Not the whole model, as DeepSpeed's ``engine.compile`` does: that would recompile for every batch
    length, while identical layers share one compilation.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UserError(f"train.compile knows no layers of {type(model).__name__}. Set train.compile=false")
    for layer in layers:
        layer.compile(dynamic=True)


def is_weight(tensor: Tensor) -> bool:
    """Return True for a parameter or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def _leaves(tensor: Tensor) -> bool:
    """Return True for a tensor worth moving to CPU memory."""
    return tensor.is_cuda and tensor.numel() >= SMALL and not is_weight(tensor)


class offload_activations(torch.autograd.graph.saved_tensors_hooks):  # noqa: N801
    """Context of a forward pass that keeps what is saved for the backward pass, except weights, in CPU memory.

    A tensor that several operations save, as the projections of an attention and their adapters do with their input,
    is copied once in each direction. Copies run on a stream of their own, beside the computation: to the host behind
    the forward pass, by at most :data:`AHEAD` tensors, and back to the device ahead of the backward pass by as many.
    """

    def __init__(self) -> None:
        self.known: dict[Any, weakref.ref[_Offloaded]] = {}
        self.leaving: deque[tuple[Tensor, Any]] = deque()
        self.last: weakref.ref[_Offloaded] | None = None
        self.streams: dict[torch.device, Any] = {}
        super().__init__(self._pack, self._unpack)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._let_go(0)
        self.known.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _Offloaded:
        if not _leaves(tensor):
            return tensor
        # The same memory, unchanged: its version counts the writes to it. The reference tells memory that was freed,
        # and may have been given to another tensor at the same address.
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        packed = self.known[key]() if key in self.known else None
        if packed is None or packed.storage() is None:
            packed = self._to_host(tensor)
            self.known[key] = self.last = weakref.ref(packed)
        packed.readers += 1
        return packed

    def _to_host(self, tensor: Tensor) -> _Offloaded:
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        with self._beside(tensor.device) as copied:
            host.copy_(tensor.detach(), non_blocking=True)
        if copied:
            self.leaving.append((tensor, copied))  # its memory must not be used again before the copy has been made
            self._let_go(AHEAD)
        return _Offloaded(tensor.device, host, weakref.ref(tensor.untyped_storage()), self.last)

    def _let_go(self, keep: int) -> None:
        """Let go of the tensors on their way to the host, but for the last ``keep``, once their copies are made."""
        while len(self.leaving) > keep:
            tensor, copied = self.leaving.popleft()
            torch.cuda.current_stream(tensor.device).wait_event(copied)

    def _unpack(self, packed: Tensor | _Offloaded) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor, arrived = packed.back or self._to_device(packed)
        if arrived:
            torch.cuda.current_stream(packed.device).wait_event(arrived)
        packed.readers -= 1
        packed.back = (tensor, arrived) if packed.readers > 0 else None
        # The backward pass reads in the opposite order: what was saved before this is needed next.
        before = packed
        for _ in range(AHEAD):
            following = before.previous() if before.previous else None
            if following is None:
                break
            before = following
            if before.readers > 0 and before.back is None:
                before.back = self._to_device(before)
        return tensor

    def _to_device(self, packed: _Offloaded) -> tuple[Tensor, Any]:
        # Allocated here, for the stream that computes, and not where it is copied: memory belongs to a stream.
        tensor = torch.empty_like(packed.host, device=packed.device)
        with self._beside(packed.device) as arrived:
            tensor.copy_(packed.host, non_blocking=True)
        return tensor, arrived

    @contextmanager
    def _beside(self, device: torch.device) -> Iterator[Any]:
        """Run the block on the stream for copies, after what is queued; yield an event of its end, None on a CPU."""
        if device.type != "cuda":
            yield None
            return
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream, event = self.streams[device], torch.cuda.Event()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield event
            event.record(stream)


@dataclass(eq=False)
class _Offloaded:
    """A saved tensor in CPU memory.

    Attributes:
        device: the tensor's.
        host: its values.
        storage: the memory that it had on the device.
        previous: what was saved before it.
        readers: operations that saved it and have not read it yet.
        back: the tensor on its device again, and the event of its arrival, while there are readers.
    """

    device: torch.device
    host: Tensor
    storage: weakref.ref[Any]
    previous: weakref.ref[_Offloaded] | None
    readers: int = 0
    back: tuple[Tensor, Any] | None = None
