"""Activation-memory estimation on the meta device.

The model's own code runs forward and backward on tensors that have shapes but no values, and a tracker records their
allocation and release. So the estimate contains exactly the tensors that the model, its adapters, gradient
checkpointing and the loss save for the backward pass, for any architecture and method. Workspace that a kernel
allocates internally is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subspace.common.patching import patched
from subspace.kernels import dropout, low_rank
from subspace.models.bitsandbytes_compat import int8_products_on_meta
from subspace.models.lm_head import SummedLoss
from subspace.planning.static_memory import MemoryItem


@dataclass(frozen=True)
class BatchShape:
    """The shape of a micro-batch: rows, tokens of each with padding, columns with a label, and labelled tokens.

    ``masked`` if attention gets a mask, as for packed rows; otherwise it only knows that the model is causal.
    """

    rows: int
    tokens: int
    columns: int
    labelled: int
    masked: bool = False


@dataclass(frozen=True)
class ActivationMemory:
    """Activation memory in bytes, beyond the model and its adapters.

    Attributes:
        activations: saved for the backward pass when the output head starts.
        head: additional memory of head and loss.
        backward: additional memory of the backward pass, such as recomputed activations.
        peak: the maximum, with the gradients that exist by then.
        left: memory remaining after the backward pass: gradients.
    """

    activations: int
    head: int
    backward: int
    peak: int
    left: int

    def parts(self) -> tuple[MemoryItem, ...]:
        """Return the components of the peak, for a report."""
        return (
            MemoryItem("activations kept for the backward pass", self.activations),
            MemoryItem("output head and loss", self.head),
            MemoryItem("more in the backward pass", self.backward),
        )


def trace_activation_memory(
    model: Any, batch: BatchShape, *, accumulated: bool = False, gpu: bool = False
) -> ActivationMemory:
    """Return the activation memory of a forward and backward pass of a model on the meta device.

    Args:
        model: with its adapters.
        batch: the micro-batch.
        accumulated: whether gradients of an earlier micro-batch exist already; they are not counted.
        gpu: whether the step is that of a GPU, whatever this machine has: its dropout and its chunks of the loss.
    """
    assert next(model.parameters()).is_meta
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if accumulated and parameter.requires_grad else None
    with torch.device("meta"):
        ids = torch.zeros(batch.rows, batch.tokens, dtype=torch.int64)
        # In the form that reaches attention.
        mask = torch.ones(batch.rows, 1, batch.tokens, batch.tokens, dtype=torch.bool) if batch.masked else None
        columns = torch.zeros(batch.columns, dtype=torch.int64)
        targets = torch.zeros(batch.rows * batch.columns, dtype=torch.int64)
        labelled = torch.zeros(batch.labelled, dtype=torch.int64)

    tracker, at_head = MemoryTracker(), []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda *_: at_head.append(tracker.live))
    model.train()
    with _kernels(gpu=gpu), tracker:
        loss = SummedLoss(model, device_type="cuda" if gpu else "cpu").at(ids, mask, columns, targets, labelled)
        with_head = tracker.peak
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
    hook.remove()
    left = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    model.zero_grad()
    return ActivationMemory(
        activations=at_head[0],
        head=max(0, with_head - at_head[0]),
        backward=max(0, tracker.peak - max(with_head, at_head[0])),
        peak=tracker.peak,
        left=left,
    )


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that counts the bytes of tensors allocated inside it and still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, run: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            self._see(value, 0)
        out = run(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            self._see(value, 1)
        return out

    def _see(self, value: Any, counts: int) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes() * counts
        self.known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        del self.known[key]
        self.live -= size


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Run fused attention, as on CPU and GPU; the meta device would choose the unfused one."""
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out


def _grouped_mm(x: Tensor, weight: Tensor, *, offs: Tensor | None = None, **others: Any) -> Tensor:
    """Run a mixture's grouped product as one matrix's; the meta device would take bfloat16 alone."""
    if has_torch_function((weight,)):
        product: Tensor = handle_torch_function(_grouped_mm, (weight,), x, weight, offs=offs, **others)
        return product
    return x @ weight[0]


def _dropped_indices(count: int, p: float) -> Tensor:
    """Return as many indices as sparse dropout, used on CPU, draws and saves for the backward pass."""
    return torch.empty(dropout.indices_drawn(count, p), dtype=torch.int64, device="meta")


@contextlib.contextmanager
def _kernels(*, gpu: bool) -> Iterator[None]:
    """Patch kernels so that the same operations are traced as training runs."""
    # Not a torch dispatch mode, which the thread that recomputes activations would not inherit.
    with contextlib.ExitStack() as stack:
        stack.enter_context(patched(nn.functional, "scaled_dot_product_attention", _attention))
        if hasattr(nn.functional, "grouped_mm"):
            stack.enter_context(patched(nn.functional, "grouped_mm", _grouped_mm))
        # What int8's CUDA products keep for the backward pass is what these keep: their input.
        with contextlib.suppress(ImportError):
            stack.enter_context(int8_products_on_meta())
        if not gpu:
            for module in (dropout, low_rank):
                stack.enter_context(patched(module, "use_sparse_dropout", lambda x, p: p <= dropout.SPARSE))
                stack.enter_context(patched(module, "sample_dropped_indices", _dropped_indices))
        yield
