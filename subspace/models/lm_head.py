"""The output head applied to the needed tokens only: the loss of a batch, and logits at chosen positions.

A language model applies its output head to every token, but a loss or score needs only few of them. Both functions act
*inside* the model's own forward pass, because only there does ZeRO-3 hold the head's weight whole, and because this
keeps the model's own operations before and after the head (norms, soft caps, scales).

How the loss leaves the model: during the call the head is asked for the loss instead of logits, so the model's
``.logits`` is that loss. It has to be returned, and not passed aside, since DeepSpeed sets up its backward pass on what
modules return: the engine on the model's output (it prepares its buckets there), ZeRO-3 on the head's (it gathers the
weight again). Models that change their logits after the head (Gemma 2 caps them, Granite and Cohere scale them) would
change the loss; that is detected by comparing the model's output with the tensor that the head returned, and such
models run again with all logits of the labelled columns.

Shapes: (B) rows, (T) tokens, (C) columns in which any row has a label, (N) labelled tokens, (H) hidden size,
(V) vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from subspace.common.patching import patched
from subspace.data.collate import Batch, JoinedBatch, Sequences
from subspace.distributed.collectives import gather_objects
from subspace.distributed.zero import is_sharded
from subspace.kernels.cross_entropy import chunked_cross_entropy, cross_entropy_each, num_chunks, summed_cross_entropy
from subspace.models.transformers_compat import attention_kernel, flash_attention_inputs, known_packing

#: Returns the loss of a head, hidden states ``(N, H)`` and targets ``(N,)``: a scalar, or that of each part.
HeadLoss = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]


class SummedLoss:
    """The summed cross entropy of a model, or of the model inside an engine.

    Use one object for all batches of a model: it remembers whether the model changes its logits, which costs a second
    forward pass to find out.

    Attributes:
        model: the model or engine.
        masks_padding: whether the model gets the attention mask; see :func:`padding.needs_padding_mask`. Packed rows
            never have one.
        device_type: the type of the device whose memory bounds how many logits exist at a time; None is the batch's.
        one_sequence: whether packed rows must be in one sequence, for flash attention.
        postprocesses_logits: True if the model was found to change its head's output.
    """

    def __init__(self, model: Any, *, masks_padding: bool = True, device_type: str | None = None) -> None:
        self.model = model
        self.masks_padding = masks_padding
        self.device_type = device_type
        self.one_sequence = attention_kernel(_unwrapped(model).config).startswith("flash")
        self.postprocesses_logits = False

    def __call__(self, batch: Batch) -> Tensor:
        """Return the cross entropy summed over a batch's labelled tokens, in nats, float32. Reads no values.

        The batch is on the model's device; packed rows are in one sequence if :attr:`one_sequence` is true.
        """
        masked = self.masks_padding and batch.position_ids is None
        return self.at(
            batch.input_ids,
            batch.attention_mask if masked else None,
            batch.columns,
            batch.targets,
            batch.labelled,
            positions=batch.position_ids,
            sequences=batch.sequences,
        )

    def at(
        self,
        ids: Tensor,
        mask: Tensor | None,
        columns: Tensor,
        targets: Tensor,
        labelled: Tensor,
        *,
        positions: Tensor | None = None,
        sequences: Sequences | None = None,
    ) -> Tensor:
        """Return the summed cross entropy of targets at known positions. Reads no values, so it also runs on ``meta``.

        Args:
            ids: ``(B, T)``.
            mask: attention mask in a form that the model accepts, or None.
            columns: ``(C,)``, the columns of ``ids`` that are followed by a target in some row.
            targets: ``(B * C,)``, what follows the tokens of these columns, row by row, or IGNORE_INDEX.
            labelled: ``(N,)``, where ``targets`` is not IGNORE_INDEX.
            positions: ``(B, T)``, for packed rows.
            sequences: the bounds of packed rows in one sequence, for flash attention.
        """
        inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": False, "logits_to_keep": columns}
        if sequences:
            inputs |= flash_attention_inputs(sequences.starts, sequences.longest)
        with known_packing(packed=positions is not None):
            return self._run(ids, inputs, targets, labelled)

    def each(self, joined: JoinedBatch) -> Tensor:
        """Return the cross entropy summed over the labelled tokens of each part of a batch, ``(parts,)``.

        Not under ZeRO-3.
        """
        batch = joined.batch
        masked = self.masks_padding and batch.position_ids is None
        inputs = {
            "attention_mask": batch.attention_mask if masked else None,
            "position_ids": batch.position_ids,
            "use_cache": False,
            "logits_to_keep": batch.columns,
        }
        vocabulary = getattr(_unwrapped(self.model).get_output_embeddings(), "out_features", 0)
        with known_packing(packed=batch.position_ids is not None):
            if vocabulary and not self.postprocesses_logits:
                device = self.device_type or batch.input_ids.device.type
                chunks = partial(num_chunks, vocabulary=vocabulary, device=device)
                ending = partial(cross_entropy_each, counts=joined.labelled, chunks=chunks)
                if (loss := self._at_head(batch.input_ids, inputs, batch.targets, batch.labelled, ending)) is not None:
                    return loss.view(-1)
            logits: Tensor = self.model(input_ids=batch.input_ids, **inputs).logits
        tokens = [rows * len(batch.columns) for rows in joined.rows]
        parts = zip(logits.flatten(0, 1).split_with_sizes(tokens), batch.targets.split_with_sizes(tokens), strict=True)
        return torch.stack([summed_cross_entropy(*part) for part in parts])

    def _run(self, ids: Tensor, inputs: dict[str, Any], targets: Tensor, labelled: Tensor) -> Tensor:
        head = _unwrapped(self.model).get_output_embeddings()
        vocabulary = getattr(head, "out_features", 0)
        if vocabulary and not self.postprocesses_logits:
            chunks = num_chunks(len(labelled), vocabulary, self.device_type or ids.device.type)
            if any(is_sharded(tensor) for inside in head.children() for tensor in inside.parameters()):
                # The frozen head inside an adapter is gathered for each chunk, which all processes must do equally
                # often. A head that is sharded itself is gathered once, round its forward pass.
                chunks = max(gather_objects(chunks))
            ending = partial(chunked_cross_entropy, chunks=chunks)
            if (loss := self._at_head(ids, inputs, targets, labelled, ending)) is not None:
                return loss.view(())
        logits: Tensor = self.model(input_ids=ids, **inputs).logits
        return summed_cross_entropy(logits.flatten(0, 1), targets)

    def _at_head(
        self, ids: Tensor, inputs: dict[str, Any], targets: Tensor, labelled: Tensor, loss: HeadLoss
    ) -> Tensor | None:
        """Return the loss that the head returned in place of logits; None if the model changes what it returns."""
        head = _unwrapped(self.model).get_output_embeddings()
        ending = _LossInPlaceOfLogits(head.forward, targets, labelled, loss)
        with patched(head, "forward", ending), _last_hook(head, ending.remember):
            out: Tensor = self.model(input_ids=ids, **inputs).logits
        if ending.is_unchanged(out):
            return out
        self.postprocesses_logits = True
        return None  # the saved tensors go: there is no backward pass for them


def summed_loss(model: Any, batch: Batch | Mapping[str, Tensor]) -> Tensor:
    """Return :class:`SummedLoss` of a single batch, which may be the tensors that :func:`collate` returns."""
    loss = SummedLoss(model)
    if isinstance(batch, Mapping):
        batch = Batch.from_labels(batch, one_sequence=loss.one_sequence)
    return loss(batch)


class _LossInPlaceOfLogits:
    """Replacement of the head's forward for one call of the model; it returns and remembers the loss."""

    def __init__(self, run_head: Any, targets: Tensor, labelled: Tensor, find_loss: HeadLoss) -> None:
        self.run_head, self.targets, self.labelled, self.find_loss = run_head, targets, labelled, find_loss
        self.loss: Tensor | None = None
        self.version: int | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the loss, ``(n, 1, 1)`` because logits have three dimensions, of hidden states ``(B, C, H)``."""
        at_labels = hidden.flatten(0, 1)[self.labelled]
        return self.find_loss(self.run_head, at_labels, self.targets[self.labelled]).view(-1, 1, 1)

    def remember(self, head: nn.Module, inputs: Any, loss: Tensor) -> None:
        """Forward hook: remember the head's final output, after DeepSpeed's hooks."""
        self.loss, self.version = loss, _version(loss)

    def is_unchanged(self, out: Tensor) -> bool:
        """Return True if ``out`` is the remembered loss: same memory and shape, and not written to since.

        Not compared by value, which would wait for the GPU, nor by identity alone, since ZeRO-3's hooks on the modules
        around the head make aliases. On ``meta`` all addresses are zero, but there is no ZeRO-3 either.
        """
        loss = self.loss
        if loss is None or out.shape != loss.shape or out.dtype != loss.dtype or _version(loss) != self.version:
            return False
        return out is loss or (not out.is_meta and out.data_ptr() == loss.data_ptr())


def _version(tensor: Tensor) -> int | None:
    """Return a tensor's version counter, or None in inference mode, which has none."""
    return None if tensor.is_inference() else tensor._version


@contextmanager
def _last_hook(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def lm_head_on_positions(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Apply the output head to these positions of the flattened batch only: logits are ``(1, len(positions), V)``.

    Args:
        model: the model.
        positions: ``(N,)``, indices into ``B * T`` tokens.
    """

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].flatten(0, 1)[positions][None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()


def _unwrapped(model: Any) -> Any:
    """Return the model inside an engine, or the model itself."""
    return getattr(model, "module", model)
