"""What the model's own code finds in place of a stack of experts' matrices: products with it, and no weight.

transformers computes a mixture by one of several functions (``experts_implementation``): one expert after the other,
all by one grouped product, or with a matrix gathered for each token; Llama 4 multiplies its whole stack. Their code is
left as it is. It indexes the stack, turns it round and multiplies by it, and :class:`Matrices` stands for the tensor in
that: each product is computed as the adapter's ``W x + s B A x``, so that no updated weight is ever formed. Whatever
else is asked of it is an error, since another result would be silently that of the frozen model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subspace.errors import UserError

#: ``x @ M`` in the forms that torch gives it.
PRODUCTS = frozenset({"matmul", "__matmul__", "mm"})
#: Products of rows that are sorted by expert with each one's matrix.
GROUPED = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})


class Matrices:
    """Adapted matrices in the place of a tensor ``(experts, a, b)``, ``(rows, a, b)`` or ``(a, b)``.

    Args:
        adapter: computes the products.
        flipped: whether a matrix is ``(in, out)``, so that ``x @ M`` is the product, and not ``(out, in)``.
        picked: the number of one expert, or those of one for each row, ``(rows,)``; None is the whole stack.
    """

    def __init__(self, adapter: Any, *, flipped: bool, picked: int | Tensor | None = None) -> None:
        self.adapter, self.flipped, self.picked = adapter, flipped, picked
        weight = adapter.base.weight
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        matrix = (adapter.base.in_features, adapter.base.out_features)
        number = [adapter.base.num_experts] if picked is None else list(picked.shape) if _is_tensor(picked) else []  # type: ignore[union-attr]
        self.shape = torch.Size([*number, *(matrix if flipped else matrix[::-1])])

    def __getitem__(self, number: Any) -> Matrices:
        if self.picked is not None or not (isinstance(number, int) or (_is_tensor(number) and number.ndim < 2)):
            raise unknown(f"[{number!r}]")
        if _is_tensor(number) and number.ndim == 0:
            number = int(number)
        return Matrices(self.adapter, flipped=self.flipped, picked=number)

    def transpose(self, first: int, second: int) -> Matrices:
        if {first % len(self.shape), second % len(self.shape)} != {len(self.shape) - 2, len(self.shape) - 1}:
            raise unknown(f"transpose({first}, {second})")
        return self.mT

    @property
    def mT(self) -> Matrices:  # noqa: N802
        return Matrices(self.adapter, flipped=not self.flipped, picked=self.picked)

    @property
    def T(self) -> Matrices:  # noqa: N802
        return self.transpose(0, 1)

    def t(self) -> Matrices:
        return self.transpose(0, 1)

    def dim(self) -> int:
        return len(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def data_ptr(self) -> int:
        """Return the frozen stack's address: transformers looks at its alignment before it calls a kernel."""
        return int(self.adapter.base.weight.data_ptr())

    def __getattr__(self, name: str) -> Any:
        raise unknown(name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        name, kwargs = getattr(function, "__name__", str(function)).rpartition(".")[2], kwargs or {}
        if name == "grouped_mm_fallback" or "grouped_mm_fallback" in str(function):
            name = "grouped_mm_fallback"
        if name == "linear":
            return _linear(*args, **kwargs)
        if name in GROUPED:
            return _grouped(function, *args, **kwargs)
        if name == "bmm":
            return _batched(*args, **kwargs)
        if name in PRODUCTS:
            x, matrix = args
            if isinstance(matrix, cls) and matrix.flipped and isinstance(matrix.picked, int):
                return matrix.adapter.one(x, matrix.picked)  # type: ignore[no-any-return]
        raise unknown(name)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _linear(x: Tensor, matrix: Matrices, bias: Tensor | None = None) -> Tensor:
    if matrix.flipped or not isinstance(matrix.picked, int):
        raise unknown("linear")
    out: Tensor = matrix.adapter.one(x, matrix.picked)
    return out if bias is None else out + bias


def _grouped(function: Any, x: Tensor, matrix: Matrices, offs: Tensor, **others: Any) -> Tensor:
    if not matrix.flipped or matrix.picked is not None or any(value is not None for value in others.values()):
        raise unknown("grouped_mm")
    out: Tensor = matrix.adapter.grouped(x, offs, lambda rows, weight: function(rows, weight, offs=offs))
    return out


def _batched(first: Any, second: Any) -> Tensor:
    """``bmm`` of rows with the whole stack, or of single rows with one matrix each, from either side."""
    matrix, x = (second, first) if isinstance(second, Matrices) else (first, second)
    if isinstance(matrix.picked, int) or matrix.flipped != (matrix is second):
        raise unknown("bmm")
    if matrix.picked is None:
        out: Tensor = matrix.adapter.stacked(x if matrix.flipped else x.mT)
        return out if matrix.flipped else out.mT
    side = 1 if matrix.flipped else 2  # of the single row or column
    if x.shape[side] != 1:
        raise unknown("bmm")
    return matrix.adapter.picked(x.squeeze(side), matrix.picked).unsqueeze(side)  # type: ignore[no-any-return]


def unknown(what: str) -> Exception:
    """Return the error for a use of the stack that is not known."""
    return UserError(
        f"the model's experts were asked for `{what}`, which their adapters do not know. Open the model with "
        "experts_implementation='eager' or 'grouped_mm', or leave the experts out of `targets`"
    )
