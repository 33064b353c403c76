"""Tensor-by-tensor reading of safetensors checkpoints, with bounded host memory.

transformers maps files into memory: every page that was touched stays resident until the last tensor is loaded, so on a
CPU a quantised model needs the memory of the unquantised one while it loads. And under ZeRO-3 it reads all tensors of a
checkpoint before it shards the first. Tensors that stay as they are stored are left mapped: processes of
one machine share them, and the system may drop them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._pytree import tree_map_only

from subspace.common.host_memory import set_malloc_trim
from subspace.models.transformers_compat import reading_files_with

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}


@contextlib.contextmanager
def streaming_safetensors(folder: Path, *, mmap_dtype: torch.dtype | None, lazy: bool) -> Iterator[None]:
    """Inside the block, make transformers read the files of a model's folder tensor by tensor.

    Args:
        folder: the model's; files of other folders are opened as usual.
        mmap_dtype: dtype of the tensors that are used as stored, if any; they stay memory-mapped.
        lazy: return each tensor as a :class:`LazyTensor`, for code that asks for all tensors at once.
    """
    open_file = partial(_LazyShard if lazy else _open, mmap_dtype=mmap_dtype)
    set_malloc_trim(True)
    with reading_files_with(open_file, folder):
        yield


def _open(
    file: str | Path, framework: str = "pt", device: str = "cpu", backend: str = "", *, mmap_dtype: Any = None
) -> Any:
    """Open a file as ``safetensors.safe_open`` does, memory-mapped only if all its tensors have ``mmap_dtype``."""
    mapped = safe_open(file, framework=framework, device=device)
    stored = {mapped.get_slice(name).get_dtype() for name in mapped.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118
    if {DTYPES.get(dtype) for dtype in stored} == {mmap_dtype}:
        return mapped
    return safe_open(file, framework=framework, device=device, backend="pread")


class _LazyShard:
    """Replacement for the object that ``safetensors.safe_open`` returns, which yields lazy tensors."""

    def __init__(self, file: str | Path, *args: Any, mmap_dtype: Any, **kwargs: Any) -> None:
        self.path, self.file = file, _open(file, *args, **kwargs)

    def __enter__(self) -> _LazyShard:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def get_tensor(self, name: str) -> Tensor:
        stored = self.file.get_slice(name)
        return LazyTensor(self.path, name, stored.get_shape(), DTYPES[stored.get_dtype()])


class LazyTensor(Tensor):
    """A tensor in a file, with shape and dtype; every operation on it reads the values from the file."""

    path: str | Path
    key: str

    @staticmethod
    def __new__(cls, path: str | Path, key: str, shape: list[int], dtype: torch.dtype) -> LazyTensor:
        tensor: LazyTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        tensor.path, tensor.key = path, key
        return tensor

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def read(self) -> Tensor:
        """Return the values, read from the file."""
        with _open(self.path) as file:
            values: Tensor = file.get_tensor(self.key)
        return values

    @classmethod
    def __torch_dispatch__(cls, run: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(cls, cls.read, (args, kwargs or {}))
        return run(*args, **kwargs)
