"""A method at every matrix of a stack of experts.

An expert's matrix is a linear layer, and the method at it is the method's own code, with its own forward pass. What is
stacked is the tensors, ``(experts, ...)``: one parameter for all experts of a module, so that ZeRO gathers one, the
optimizer moves one, and a file holds one. An expert's tensors are slices of it. An expert that no token was sent to has
zeros as its gradient, not none.

Methods of the form ``W + s B C A`` have a second form, for products that take all experts at a time: the factors of all
experts are batched and go through the same grouped product as the frozen weight. Neither forms an updated weight, of
which a mixture would need one for each expert in every pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.adapters.base import Adapter, LinearAdapter, MethodConfig
from subspace.adapters.experts.products import Matrices
from subspace.adapters.low_rank import LowRankAdapter
from subspace.adapters.penalties import charge_penalty
from subspace.kernels.dropout import dropout
from subspace.models.experts.weights import ExpertWeight

#: What an adapter is asked for that its method's class says.
FROM_METHOD = ("name", "family", "num_params", "roles", "copied_buffers", "weight_access", "delayed_grad_params")
#: Bytes that a row of a grouped product must be a multiple of.
ALIGNED = 16


def experts_refusal(method: type[Adapter]) -> str | None:
    """Return why a method of linear layers cannot be put at experts' matrices, None if it can."""
    if not issubclass(method, LinearAdapter):
        return "it does more than a linear layer's weight can"
    if any(
        getattr(method, hook).__func__ is not getattr(Adapter, hook).__func__ for hook in ("before_step", "after_step")
    ):
        return "its schedule weighs the tensors of whole layers against each other, and these hold many experts'"
    if method.attach is not Adapter.attach:
        return "it hooks into the modules around a layer"
    return "it trains a bias" if "bias" in method.roles.values() else None


class FrozenMatrix:
    """An expert's frozen matrix as the linear layer that a method calls.

    ``read`` is asked for it where the method needs it, and each time: under ZeRO-3 it is there only in a pass.
    """

    bias = None

    def __init__(self, out_features: int, in_features: int, read: Callable[[], Tensor]) -> None:
        self.out_features, self.in_features, self._read = out_features, in_features, read

    @property
    def weight(self) -> Tensor:
        return self._read()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class OneExpert:
    """Mixed into a method's class: its tensors are slices of a stack's, or values that it is lent."""

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        if name in own.get("_lent", ()):
            return own["_lent"][name]
        if "_stack" in own and name in own["_stack"].stacked_names:
            return own["_stack"].slices(name)[own["_number"]]
        return super().__getattr__(name)  # type: ignore[misc]

    def in_dtype(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a slice of what the stack's tensor is in a dtype, which is rounded once for all experts."""
        own = self.__dict__
        if own["_lent"]:
            return own["_lent"][name].to(dtype)  # type: ignore[no-any-return]
        return own["_stack"].slices(name, dtype)[own["_number"]]  # type: ignore[no-any-return]

    def cached(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Return what the stack remembers for this expert."""
        tensor: Tensor = self.__dict__["_stack"].cached((self.__dict__["_number"], key), compute)
        return tensor


class ExpertsAdapter(Adapter[Any]):
    """A method's tensors at all matrices of a stack; see the module's docstring.

    Attributes:
        stacked_names: the tensors that it holds, each ``(experts, ...)`` of the method's.
    """

    site = "linear"
    roles = {}  # noqa: RUF012  # of an instance: its method's
    base: ExpertWeight

    def __init__(self, base: ExpertWeight, config: MethodConfig, method: type[Any]) -> None:
        super().__init__(base, config)
        self.method = method
        for name in FROM_METHOD:
            setattr(self, name, getattr(method, name))
        self.num_matrices = base.num_experts
        self.in_features, self.out_features = base.in_features, base.out_features
        matrix = self._frozen(lambda: torch.empty((), dtype=base.weight.dtype, device="meta"))
        class_of_one: type[Any] = type(method.__name__, (OneExpert, method), {"__module__": method.__module__})
        for number in range(base.num_experts):  # each is drawn for itself
            one = class_of_one(matrix, config)
            self._take(one, number)
            if number == 0:
                self._charges = one.penalty() is not None
            if base.weight.is_meta:
                break  # nothing is drawn there
        own = (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False))
        self.stacked_names = frozenset(name for name, _ in own)
        self.mergeable = one.mergeable
        for name in self.stacked_names:
            delattr(one, name)
        # `_stack` and `_one` by ways past torch, which would take each for a part of the other.
        one.__dict__.update(_stack=self, _number=0, _lent={}, base=None, ends_sublayer=True)
        self._one = (one,)
        forms = (method.forward, method.hidden, method.to_lora) if issubclass(method, LowRankAdapter) else ()
        plain = forms == (LowRankAdapter.forward, LowRankAdapter.hidden, LowRankAdapter.to_lora)
        self._has_factors = plain and self.mergeable
        self._inside = False  # a forward pass of the experts
        self._slices: dict[Any, tuple[Tensor, ...]] = {}
        self._hooks: list[Any] = []

    def _frozen(self, read: Callable[[], Tensor]) -> FrozenMatrix:
        return FrozenMatrix(self.out_features, self.in_features, read)

    def _take(self, one: nn.Module, number: int) -> None:
        """Enter the tensors of an expert's adapter into the stacks."""
        for name, parameter in one.named_parameters(recurse=False):
            if number == 0:
                stack = parameter.new_empty(self.num_matrices, *parameter.shape)
                setattr(self, name, nn.Parameter(stack, requires_grad=parameter.requires_grad))
            getattr(self, name).data[number] = parameter.data
        for name, buffer in one.named_buffers(recurse=False):
            if number == 0:
                stack = buffer.new_empty(self.num_matrices, *buffer.shape)
                self.register_buffer(name, stack, persistent=name not in one._non_persistent_buffers_set)
            getattr(self, name)[number] = buffer

    @property
    def method_class(self) -> type[Adapter]:
        return self.method

    # Around a forward pass.

    def attach(self, model: nn.Module) -> None:
        experts = self.base.experts
        self._hooks = [
            experts.register_forward_pre_hook(self._begin),
            experts.register_forward_hook(self._end, always_call=True),
        ]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, experts: nn.Module, inputs: Any) -> None:
        self._inside, self._slices = True, {}

    def _end(self, experts: nn.Module, inputs: Any, output: Any) -> Any:
        # Slices are taken where they are first asked for, not before: under ZeRO-3 only then are their gradients
        # computed before the tensors are partitioned again.
        self._inside, self._slices = False, {}
        if not (self._charges and self.training and torch.is_grad_enabled() and isinstance(output, Tensor)):
            return None
        shares: Tensor = torch.vmap(lambda values: self.at(0, values).penalty())(self._stacks())
        return charge_penalty(output, shares.sum(), self.loss_tap)

    # The experts' tensors.

    def _stacks(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.stacked_names}

    def slices(self, name: str, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Return a tensor's slices, one for each expert: one operation for all, in each forward pass of the experts."""
        key = name, dtype, torch.is_grad_enabled()
        if key not in self._slices:
            found = (getattr(self, name) if dtype is None else self.in_dtype(name, dtype)).unbind(0)
            if not self._inside:
                return found
            self._slices[key] = found
        return self._slices[key]

    def at(self, number: int, values: dict[str, Tensor] | None = None) -> Any:
        """Return the method at an expert's matrix; with ``values`` in place of its tensors.

        A new object each time, since a backward pass may still hold an earlier one.
        """
        prototype: Any = self._one[0]
        one = object.__new__(type(prototype))
        one.__dict__.update(prototype.__dict__)
        base = self._frozen(lambda: self.base.matrices()[number])
        one.__dict__.update(_number=number, _lent=values or {}, base=base, training=self.training)
        one.num_siblings = self.num_siblings
        return one

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return all experts' factors of an update ``B A``, ``(experts, q, in)`` and ``(experts, out, q)``, if any."""
        if not self._has_factors:
            return None
        A, B = torch.vmap(lambda values: self.at(0, values).to_lora())(self._stacks())
        return A, self.update_scale * B

    # Products, for what stands in the weight's place.

    @property
    def matrices(self) -> Matrices:
        return Matrices(self, flipped=self.base.transposed)

    @property
    def shape(self) -> torch.Size:
        return self.matrices.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.base.weight.device

    def __getitem__(self, number: Any) -> Matrices:
        return self.matrices[number]

    def transpose(self, first: int, second: int) -> Matrices:
        return self.matrices.transpose(first, second)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Stand for the stack of matrices where torch multiplies by it."""
        args = [value.matrices if isinstance(value, cls) else value for value in args]
        kwargs = {key: value.matrices if isinstance(value, cls) else value for key, value in (kwargs or {}).items()}
        return Matrices.__torch_function__(function, types, args, kwargs)

    def one(self, x: Tensor, number: int) -> Tensor:
        """Return an expert's product, ``(..., in) -> (..., out)``."""
        method = self.at(number)
        out: Tensor = method.forward(x)
        return out if self.update_scale == 1 else torch.lerp(method.frozen(x), out, self.update_scale)

    def grouped(self, x: Tensor, offsets: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return each row's product with its expert's matrix, ``(rows, in) -> (rows, out)``.

        Args:
            x: the first expert's rows, then the second's, and so on.
            offsets: where each one's rows end, ``(experts,)``.
            multiply: the product of these rows with a stack ``(experts, in, out)``.
        """
        factors = self.factors()
        if factors is not None:
            A, B = _aligned(*(factor.to(x.dtype) for factor in factors))
            hidden = multiply(dropout(x, self.input_dropout()), A.mT)
            return multiply(x, self.base.matrices().mT).add_(multiply(hidden, B.mT))
        parts = torch.split(x, _sizes(offsets, len(x)))
        found = [self.one(rows, number) for number, rows in enumerate(parts) if len(rows)]
        return torch.cat(found) if found else x.new_empty(0, self.out_features)

    def stacked(self, x: Tensor) -> Tensor:
        """Return all experts' products, each with rows of its own, ``(experts, rows, in) -> (experts, rows, out)``."""
        factors = self.factors()
        if factors is None:
            return torch.stack([self.one(rows, number) for number, rows in enumerate(x)])
        A, B = (factor.to(x.dtype) for factor in factors)
        hidden = torch.bmm(dropout(x, self.input_dropout()), A.mT)
        return torch.baddbmm(torch.bmm(x, self.base.matrices().mT), hidden, B.mT)

    def picked(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Return each row's product with the matrix of this number, ``(rows, in) -> (rows, out)``."""
        order = numbers.argsort(stable=True)
        offsets = torch.bincount(numbers, minlength=self.num_matrices).cumsum(0)
        sizes = _sizes(offsets, len(x))

        def multiply(rows: Tensor, weight: Tensor) -> Tensor:
            return torch.cat([part @ matrix for part, matrix in zip(torch.split(rows, sizes), weight, strict=True)])

        return self.grouped(x[order], offsets, multiply)[order.argsort()]

    # From W, and into it.

    def init_from_weight(self, W: Tensor) -> None:
        """Set every expert's initial values; W is the stack as it is stored, in the dtype that it is held in."""
        for number, matrix in enumerate(W.mT if self.base.transposed else W):
            self.at(number).init_from_weight(matrix.float())

    def merged(self) -> dict[str, Tensor | None]:
        """Return the stack of updated matrices, as the frozen one lies, in float32."""
        stored = torch.empty_like(self.base.weight, dtype=torch.float32)
        matrices = stored.mT if self.base.transposed else stored
        for number, matrix in enumerate(self.base.matrices()):
            matrices[number] = self.at(number).weight(matrix.float())
        return {"weight": stored}


def _sizes(offsets: Tensor, rows: int) -> list[int]:
    """Return the number of each expert's rows; on the meta device, where nothing is known, as equal ones as can be."""
    experts = len(offsets)
    if offsets.is_meta:
        return [rows // experts + (number < rows % experts) for number in range(experts)]
    sizes: list[int] = torch.diff(offsets, prepend=offsets.new_zeros(1)).tolist()
    return sizes


def _aligned(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors with rows of zeros up to a rank that grouped products take."""
    missing = -A.shape[1] % (ALIGNED // A.itemsize)
    return (F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))) if missing else (A, B)
