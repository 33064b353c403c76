r"""Copies of all adapters' tensors in the dtype that the frozen model computes in, made by one call a forward pass.

When: a base in 16 bits with float32 adapters, inside a forward pass of the model that they were injected into, in
training and in evaluation. A float32 base needs no copies, and nothing here runs.

Gain: a LoRA site launched two casts forward, two backward; now a whole model launches one copy a pass, and each module
that holds sites one a backward pass. Sites that read the same input share their products (:func:`lora_down_shared`).
On a GPU small products wait for launches, so launches are what counts (`tests/bench/RESULTS.md`).

Why one pass and no longer: the values move with the optimizer's steps, with loading and with schedules, and writes
through ``.data`` leave no trace. No copy outlives the forward pass that it was made for, so none can be stale; that
costs one call more a pass than copies that are kept from step to step, and needs nobody's promise.

=====================================  ===================================================================
asked                                  answer
=====================================  ===================================================================
inside the model's forward pass        a copy, made with all others where the first one is asked for
while backward recomputes that pass    the same, so that what is recomputed is what was computed
anywhere else (a part of the model     none: the caller rounds the tensor itself
called by itself), under ZeRO-3, in a
compiled layer, in another thread
=====================================  ===================================================================

Copies lie in one flat tensor. Those of one module's sites (an attention's q, k and v) are the outputs of one autograd
function, whose backward pass receives their gradients and hands them on in float32, by one call too. Each output is
given out once, to one reader: so its gradient is never a sum that was rounded to 16 bits. Whoever asks a second time
gets outputs of a new function, over the same copies.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from subspace.distributed.zero import is_sharded
from subspace.kernels.low_rank import lora_down_shared

#: Elements; what has a multiple of it comes first, so that it is aligned as matrix products want it.
ALIGNED = 64


class Site(Protocol):
    """An adapter, as far as it is known here."""

    #: The tensor that multiplies the layer's input first, ``(r, in)``, if the method has one.
    input_factor: ClassVar[str | None]
    #: Its input is not that of the module's other sites: it ends the module.
    ends_sublayer: bool

    def copied_tensors(self) -> Mapping[str, Tensor]: ...
    def input_dropout(self) -> float: ...


@dataclass(frozen=True)
class Source:
    """A tensor to copy.

    Attributes:
        site: weak, since the sites hold all of this.
        name: the tensor's, in the site.
        tensor: itself.
        width: of the input that it multiplies, where other sites may multiply the same; else 0.
    """

    site: weakref.ref[Any]
    key: tuple[int, str]
    tensor: Tensor
    width: int


@dataclass(frozen=True)
class Stack:
    """First factors that multiply inputs of one width: their numbers in the module, and where they lie in the copy."""

    numbers: list[int]
    start: int
    rows: int


@dataclass(frozen=True)
class Module:
    """The sites of one module, such as an attention's q, k and v: what is copied of them, and which copies that is."""

    sources: list[Source]
    tensors: list[Tensor]
    places: list[int]
    stacks: dict[int, Stack]  # by width


class Copies:
    """The copies of one module's sites in one pass, and the outputs of the last autograd function over them."""

    def __init__(self, module: Module, views: list[Tensor]) -> None:
        self.module = module
        self.outputs: Sequence[Tensor] = [views[place] for place in module.places]
        self._recorded: bool | None = None  # whether by autograd
        self._given: set[int] = set()

    def take(self, number: int) -> Tensor:
        """Return a copy that nobody else reads."""
        records = torch.is_grad_enabled()
        if number in self._given or self._recorded is not records:
            fresh = self.outputs if self._recorded is None else [output.detach() for output in self.outputs]
            self.outputs = _Round.apply(fresh, *self.module.tensors)  # type: ignore[no-untyped-call]
            self._recorded = records
            self._given.clear()
        self._given.add(number)
        return self.outputs[number]


class Pass:
    """A forward pass of the model: the copies of the modules that were called in it.

    Attributes:
        kind: dtype and device of the copies, once one was asked for.
        flat: all of them.
        copies: by the module's number.
    """

    def __init__(self) -> None:
        self.kind: tuple[torch.dtype, torch.device] | None = None
        self.flat = torch.empty(0)
        self.views: list[Tensor] = []
        self.copies: dict[int, Copies] = {}

    def copy(self, tensors: list[Tensor], expected: int, dtype: torch.dtype, device: torch.device) -> None:
        """Copy all tensors by one call, unless one has lost values since the last look, as to a shard of ZeRO-3."""
        self.kind = dtype, device
        size = sum(tensor.numel() for tensor in tensors)
        if not size or size != expected:
            return
        with torch.no_grad():
            self.flat = torch.empty(size, dtype=dtype, device=device)
            self.views = _parts(self.flat, tensors)
            torch._foreach_copy_(self.views, tensors)


@dataclass
class Pending:
    """A shared product that some of its readers have not fetched yet. It holds an activation, and what that was."""

    x: Tensor
    version: int
    through: Tensor
    hidden: dict[int, Tensor]  # by the reader's id


class WorkingCopies:
    """The working copies of one model, whose adapters all have the same object."""

    def __init__(self) -> None:
        self._attached = False
        self._handles: list[Any] = []
        self._clear()

    def _clear(self) -> None:
        self._modules: list[Module] = []
        self._tensors: list[Tensor] = []  # of all modules, as their copies lie in memory
        self._size = 0
        self._place: dict[tuple[int, str], tuple[int, int]] = {}  # of a tensor: its module and its number there
        self._look = True  # whether the next pass must look for them again
        self._inside = False
        self._pass: Pass | None = None  # the present one, or the last that may have a backward pass
        self._recorded: Pass | None = None  # the last one that may
        self._pending: Pending | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_attached": self._attached}  # a copied model has the hooks, too, and makes copies of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self._attached = state["_attached"]

    def attach(self, model: nn.Module) -> None:
        """Take each forward pass of the model as one in which no tensor changes."""
        self._attached = self._look = True
        if not self._handles:
            self._handles = [
                model.register_forward_pre_hook(self._begin),
                model.register_forward_hook(self._end, always_call=True),
            ]

    def detach(self) -> None:
        """Undo :meth:`attach`."""
        for handle in self._handles:
            handle.remove()
        self._attached, self._handles = False, []
        self._clear()

    def get(self, site: Site, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the copy of a site's tensor in a dtype, or None where there is none. Gradients reach the tensor."""
        found = self._find((id(site), name), tensor, dtype)
        return None if found is None else found[0].take(found[1])

    def share(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return x for the site's frozen layer, and its first factor's product with x, ``(..., r)``.

        All sites of the module that read x, the same object, share the product. None where a site has it for itself, as
        where one of them drops values of its input. The site must not drop any.
        """
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
            return None
        pending = self._pending
        known = pending is not None and pending.x is x and pending.version == x._version
        if pending is None or not known or id(site) not in pending.hidden:
            pending = self._pending = self._multiply(site, x)
            if pending is None:
                return None
        h = pending.hidden.pop(id(site))
        if not pending.hidden:
            self._pending = None
        return pending.through, h

    def _multiply(self, site: Site, x: Tensor) -> Pending | None:
        """Multiply x by the first factors of all sites that may share it. Which do shows when they are called."""
        name = site.input_factor
        if name is None or site.ends_sublayer:
            return None
        factor: Tensor = getattr(site, name)
        if factor.dtype == x.dtype:
            return None
        found = self._find((id(site), name), factor, x.dtype)
        if found is None:
            return None
        copies, number = found
        stack = copies.module.stacks.get(x.shape[-1])
        if stack is None or number not in stack.numbers:
            return None
        sites = [copies.module.sources[n].site() for n in stack.numbers]
        if any(other is None or other.input_dropout() for other in sites):
            return None
        assert self._pass is not None
        width = x.shape[-1]
        stacked = self._pass.flat.as_strided((stack.rows, width), (width, 1), stack.start)
        through, hidden = lora_down_shared(x, stacked, [copies.take(n) for n in stack.numbers])
        return Pending(x, x._version, through, {id(other): h for other, h in zip(sites, hidden, strict=True)})

    def _find(self, key: tuple[int, str], tensor: Tensor, dtype: torch.dtype) -> tuple[Copies, int] | None:
        """Return the copies of a module and a tensor's number there; None where it has none that is right now."""
        now = self._pass
        if now is None:
            return None
        if key not in self._place:
            self._look = True  # it came after the last look
            return None
        module, number = self._place[key]
        if not self._inside and torch._C._current_graph_task_id() == -1:
            # Called by itself after a pass. What backward recomputes of this call must find no copies, either.
            now.copies.pop(module, None)
            return None
        if now.kind is None and self._inside:
            now.copy(self._tensors, self._size, dtype, tensor.device)
        if now.kind != (dtype, tensor.device) or not now.views:
            return None
        found = now.copies.get(module)
        if found is None:
            if not self._inside:
                return None  # its part of the pass that is recomputed had none
            found = now.copies[module] = Copies(self._modules[module], now.views)
        if found.module.tensors[number] is not tensor:
            self._look = True  # it was replaced after the last look
            return None
        return found, number

    def _begin(self, model: nn.Module, inputs: Any) -> None:
        """Start a pass."""
        if not self._attached or torch.compiler.is_compiling():
            return
        if threading.current_thread() is not threading.main_thread():
            return
        if self._look:
            self._modules, self._tensors = _find_modules(model, self)
            self._size = sum(tensor.numel() for tensor in self._tensors)
            self._place = {
                source.key: (m, n) for m, module in enumerate(self._modules) for n, source in enumerate(module.sources)
            }
            self._look, self._recorded = False, None
        self._inside, self._pass, self._pending = True, Pass(), None

    def _end(self, model: nn.Module, inputs: Any, output: Any) -> None:
        """End it. Its copies stay for what backward may recompute of it; those of a pass without gradient do not."""
        if torch.compiler.is_compiling() or threading.current_thread() is not threading.main_thread():
            return
        self._inside, self._pending = False, None
        if torch.is_grad_enabled():
            self._recorded = self._pass
        else:
            self._pass = self._recorded


class _Round(torch.autograd.Function):
    """Autograd function ``tensors -> views``, where the views hold the tensors' values, rounded."""

    @staticmethod
    def forward(ctx: Any, views: Sequence[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype, trained = tensors[0].dtype, ctx.needs_input_grad[1:]
        if not all(trained):
            ctx.mark_non_differentiable(*(view for view, needed in zip(views, trained, strict=True) if not needed))
        return tuple(views)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        trained = ctx.needs_input_grad[1:]
        given = [g for g, needed in zip(gradients, trained, strict=True) if needed and g is not None]
        exact = given
        if torch.is_grad_enabled():  # for a second derivative
            exact = [g.to(ctx.dtype) for g in given]
        elif given:
            flat = torch.empty(sum(g.numel() for g in given), dtype=ctx.dtype, device=given[0].device)
            exact = _parts(flat, given)
            torch._foreach_copy_(exact, given)
        if len(given) == len(gradients):
            return None, *exact
        parts = iter(exact)
        return None, *(next(parts) if n and g is not None else None for g, n in zip(gradients, trained, strict=True))


def _parts(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Return views of a flat tensor, one after the other, in the shapes of others; in one call, for there are many."""
    return list(_unflatten_dense_tensors(flat, like))  # type: ignore[no-untyped-call]


def _find_modules(model: nn.Module, copies: WorkingCopies) -> tuple[list[Module], list[Tensor]]:
    """Return what is copied by module, and all of it in the order of memory.

    Factors that multiply inputs of equal width are neighbours. A module of which not all can be copied is left out.
    """
    found: dict[str, list[Source]] = {}
    for name, site in model.named_modules():
        if getattr(site, "copies", None) is not copies:
            continue
        for own, tensor in site.copied_tensors().items():
            width = tensor.shape[-1] if own == site.input_factor and not site.ends_sublayer else 0
            source = Source(weakref.ref(site), (id(site), own), tensor, width)
            found.setdefault(name.rpartition(".")[0], []).append(source)
    chosen = [
        sorted(sources, key=lambda source: -source.width)
        for sources in found.values()
        if all(_can_copy(source.tensor) for source in sources)
    ]
    ordered = [(m, n) for m, sources in enumerate(chosen) for n in range(len(sources))]
    ordered.sort(key=lambda at: chosen[at[0]][at[1]].tensor.numel() % ALIGNED != 0)
    tensors = [chosen[m][n].tensor for m, n in ordered]
    starts = [0, *accumulate(tensor.numel() for tensor in tensors)]
    places = {at: place for place, at in enumerate(ordered)}
    modules = []
    for m, sources in enumerate(chosen):
        own = [places[m, n] for n in range(len(sources))]
        stacks = {}
        for width in {source.width for source in sources if source.width}:
            numbers = [n for n, source in enumerate(sources) if source.width == width]
            if len(numbers) > 1 and own[numbers[-1]] - own[numbers[0]] == len(numbers) - 1:
                rows = sum(len(sources[n].tensor) for n in numbers)
                stacks[width] = Stack(numbers, starts[own[numbers[0]]], rows)
        modules.append(Module(sources, [source.tensor for source in sources], own, stacks))
    return modules, tensors


def _can_copy(tensor: Tensor) -> bool:
    """Return True for a whole float32 tensor: no shard of ZeRO-3 or of torch's own sharding."""
    return tensor.dtype == torch.float32 and not is_sharded(tensor) and not hasattr(tensor, "device_mesh")
