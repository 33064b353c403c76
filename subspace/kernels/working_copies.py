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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from subspace.distributed.zero import is_sharded
from subspace.kernels.low_rank import lora_down_shared

#: Elements; a copy begins at a multiple of it, for the alignment that matrix products want.
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


@dataclass
class Copies:
    """The copies of one module's sites in one pass, and the outputs of the last autograd function over them."""

    sources: list[Source]
    views: list[Tensor]
    outputs: list[Tensor] = field(default_factory=list)
    recorded: bool = False  # by autograd
    given: set[int] = field(default_factory=set)

    def take(self, index: int) -> Tensor:
        """Return a copy that nobody else reads."""
        if not self.outputs or index in self.given or self.recorded != torch.is_grad_enabled():
            self.recorded, self.given = torch.is_grad_enabled(), set()
            outputs = _Round.apply(self.views, *(source.tensor for source in self.sources))  # type: ignore[no-untyped-call]
            self.outputs = list(outputs)
        self.given.add(index)
        return self.outputs[index]


@dataclass
class Pass:
    """A forward pass of the model: its copies by module, and their dtype and device, once one was asked for."""

    kind: tuple[torch.dtype, torch.device] | None = None
    copies: dict[int, Copies] = field(default_factory=dict)


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
        self._modules: list[list[Source]] = []  # what is copied, by the module that holds the sites
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
        copies, index = found
        # Neighbours in the list and in memory.
        numbers = [n for n, source in enumerate(copies.sources) if source.width == x.shape[-1]]
        sites = [copies.sources[n].site() for n in numbers]
        if len(sites) < 2 or index not in numbers or any(other is None or other.input_dropout() for other in sites):
            return None
        stacked = _adjoining([copies.views[n] for n in numbers])
        through, hidden = lora_down_shared(x, stacked, [copies.take(n) for n in numbers])
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
            now.kind = dtype, tensor.device
            now.copies.update(_copy(self._modules, *now.kind))
        found = now.copies.get(module)
        if found is None or now.kind != (dtype, tensor.device):
            return None
        if found.sources[number].tensor is not tensor:
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
            self._modules = list(_find_sources(model, self))
            self._place = {s.key: (m, n) for m, sources in enumerate(self._modules) for n, s in enumerate(sources)}
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
    def forward(ctx: Any, views: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        outputs = tuple(view.detach() for view in views)  # which the views' next readers do not share
        ctx.mark_non_differentiable(*(o for o, t in zip(outputs, tensors, strict=True) if not t.requires_grad))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [g if n else None for g, n in zip(gradients, ctx.needs_input_grad[1:], strict=True)]
        given = [g for g in wanted if g is not None]
        if torch.is_grad_enabled():  # for a second derivative
            return None, *(None if g is None else g.to(ctx.dtype) for g in wanted)
        if not given:
            return None, *wanted
        flat = torch.empty(sum(g.numel() for g in given), dtype=ctx.dtype, device=given[0].device)
        exact = [
            part.view(g.shape) for part, g in zip(torch.split(flat, [g.numel() for g in given]), given, strict=True)
        ]
        torch._foreach_copy_(exact, given)
        parts = iter(exact)
        return None, *(None if g is None else next(parts) for g in wanted)


def _find_sources(model: nn.Module, copies: WorkingCopies) -> Iterator[list[Source]]:
    """Yield what is copied, module by module; tensors that multiply inputs of equal width are neighbours."""
    found: dict[str, list[Source]] = {}
    for name, site in model.named_modules():
        if getattr(site, "copies", None) is not copies:
            continue
        for own, tensor in site.copied_tensors().items():
            width = tensor.shape[-1] if own == site.input_factor and not site.ends_sublayer else 0
            source = Source(weakref.ref(site), (id(site), own), tensor, width)
            found.setdefault(name.rpartition(".")[0], []).append(source)
    for sources in found.values():
        yield sorted(sources, key=lambda source: -source.width)


def _copy(modules: list[list[Source]], dtype: torch.dtype, device: torch.device) -> Iterator[tuple[int, Copies]]:
    """Copy all tensors into one, by one call; yield the copies by module. A module of which one cannot be has none."""
    chosen = {n: sources for n, sources in enumerate(modules) if all(_can_copy(s.tensor, device) for s in sources)}
    starts, size = [], 0
    for sources in chosen.values():
        width = 0
        for source in sources:
            if not width or source.width != width:
                size = -(-size // ALIGNED) * ALIGNED
            width = source.width
            starts.append(size)
            size += source.tensor.numel()
    if not size:
        return
    with torch.no_grad():
        flat = torch.empty(size, dtype=dtype, device=device)
        tensors = [source.tensor for sources in chosen.values() for source in sources]
        views = [flat[i : i + t.numel()].view(t.shape) for i, t in zip(starts, tensors, strict=True)]
        torch._foreach_copy_(views, tensors)
    rest = iter(views)
    for number, sources in chosen.items():
        yield number, Copies(sources, [next(rest) for _ in sources])


def _can_copy(tensor: Tensor, device: torch.device) -> bool:
    """Return True for a whole float32 tensor on the device: no shard of ZeRO-3 or of torch's own sharding."""
    sharded = is_sharded(tensor) or hasattr(tensor, "device_mesh")
    return tensor.dtype == torch.float32 and tensor.device == device and not sharded


def _adjoining(views: list[Tensor]) -> Tensor:
    """Return matrices of equal width, which lie one after the other in memory, as one: (q, in)."""
    return views[0].as_strided((sum(len(view) for view in views), views[0].shape[1]), views[0].stride())
