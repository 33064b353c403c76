"""Gathering and restoring of optimizer state by parameter name, independent of ZeRO stage and number of processes.

DeepSpeed's own checkpoints are pickles, are bound to a number of processes and a stage, and are matched by position: a
checkpoint of other layers with the same shapes loads without an error. Here every value is stored under the name of the
trained tensor that it belongs to, in that tensor's own order, so that it fits any layout and can only go where its name
says.

ZeRO's memory layout, and the terms used here:

- A *slice* (:class:`OptimizerSlice`) is the part of one trained tensor that this process's optimizer updates. Without
  ZeRO it is the whole tensor. At stages 1 and 2 all tensors of a parameter group are concatenated and the result is cut
  into one part per rank, so a rank may have all, a stretch or nothing of a tensor. At stage 3 every tensor by itself is
  cut into one part per rank, the last ones padded.
- The *key* of a slice is the tensor that the optimizer was given, under which it keeps its state (``state[key]``): the
  parameter itself, or the flat float32 part, which holds the slices of many tensors one after the other.
- State in *blocks* is that of bitsandbytes' 8-bit optimizers: one scale for 256 values, across the borders of tensors.

A key has one step count. Elements that began later (:mod:`subspace.training.late_starts`) are stored with the step
count at which they did; a whole tensor that did, and is a key, has a step count of its own. Either is restored as the
other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subspace.adapters.inject import trained_parameters
from subspace.distributed.collectives import all_reduce_sum, gather_objects, rank, world_size
from subspace.distributed.deepspeed_compat import (
    OptimizerSlice,
    basic_optimizer,
    local_shard,
    optimizer_slice,
    optimizer_state_on_nvme,
)
from subspace.distributed.zero import full_shape
from subspace.errors import UserError
from subspace.training.late_starts import late_starts
from subspace.training.optimizers import allocate_state

MASTER = "master"  # float32 copies, where the model's own parameters are not float32
STEP, BEGUN, BLOCK = "step", "begun", "block"
MOMENTS_IN_BLOCKS = ("state1", "state2")


@dataclass(frozen=True)
class _NamedSlice:
    """A slice and the name of its trained tensor."""

    name: str
    at: OptimizerSlice

    def read(self, state: Tensor) -> Tensor:
        """Return this slice's values, as a view, of a tensor laid out as the key: a moment, or the key itself."""
        return state.detach().view(-1)[self.at.offset : self.at.offset + self.at.length]

    def cut(self, whole: Tensor) -> Tensor:
        """Return this slice's values, as a view, of a flattened whole tensor."""
        return whole[self.at.start : self.at.start + self.at.length]


def can_gather_optimizer_state(engine: Any) -> bool:
    """Return True if the optimizer state is in memory, not in DeepSpeed's swap files on NVMe."""
    return not optimizer_state_on_nvme(engine)


def gather_optimizer_state(engine: Any) -> dict[str, Tensor]:
    """Return the optimizer state as flat CPU tensors, ``{"exp_avg/NAME": ...}``. Collective over ranks.

    Before the first step there is none. Adam's step count is a scalar. State in blocks cannot be cut at a tensor's
    ends; it is returned as each process has it, as ``{"block/RANK/NUMBER/KEY": ...}``.
    """
    parameters, optimizer = trained_parameters(engine.module), basic_optimizer(engine)
    scalars: dict[str, Tensor] = {}
    slices: dict[str, list[tuple[_NamedSlice, Tensor]]] = {}  # by kind of state, such as exp_avg
    blocks = _own_blocks(engine)
    begun = {key: late_starts(optimizer).begun(key) for key in _keys(engine)}
    for piece in _slices(engine):
        for kind, value in {} if blocks else optimizer.state.get(piece.at.key, {}).items():
            if kind == STEP:
                scalars[f"{kind}/{piece.name}"] = torch.as_tensor(value).cpu().clone()  # safetensors cannot save views
            else:
                slices.setdefault(kind, []).append((piece, piece.read(value)))
        of_key = begun[piece.at.key]
        if of_key is not None and piece.read(of_key).any():
            slices.setdefault(BEGUN, []).append((piece, piece.read(of_key)))
        if parameters[piece.name].dtype != torch.float32:
            slices.setdefault(MASTER, []).append((piece, piece.read(piece.at.key)))

    gathered = {name: value for own in gather_objects({**scalars, **blocks}) for name, value in own.items()}
    # Ranks have different slices, and a rank without any knows neither kinds nor names. All ranks must make the same
    # calls below, so they first agree on the kinds and tensors.
    names_by_rank = gather_objects({kind: [piece.name for piece, _ in values] for kind, values in slices.items()})
    for kind in sorted({kind for names in names_by_rank for kind in names}):
        present = {name for names in names_by_rank for name in names.get(kind, ())}
        sizes = {name: full_shape(p).numel() for name, p in parameters.items() if name in present}
        whole = _merge_slices(slices.get(kind, []), sizes, engine.device, sharded=engine.zero_optimization())
        gathered |= {f"{kind}/{name}": tensor for name, tensor in whole.items()}
    return gathered


def restore_optimizer_state(engine: Any, saved: dict[str, Tensor]) -> None:
    """Restore the state that :func:`gather_optimizer_state` returned. The trained tensors must have been restored.

    Raises:
        UserError: state in blocks from another number of processes or another ZeRO stage.
    """
    optimizer, parameters = basic_optimizer(engine), trained_parameters(engine.module)
    by_name: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for name, value in saved.items():
        kind, _, parameter = name.partition("/")
        if kind != BLOCK and parameter not in by_name:
            raise UserError(f"the checkpoint has a state of {parameter}, which this model does not train")
        if kind != BLOCK:
            by_name[parameter][kind] = value
    begun: dict[Tensor, list[tuple[_NamedSlice, float, Tensor | None]]] = {}
    for piece in _slices(engine):
        values = by_name[piece.name]
        key = piece.at.key
        if engine.zero_optimization():
            # ZeRO's flat float32 copies were made of the values before the restore. They are taken from the checkpoint
            # where the model's own parameters are rounded (float16), else from the parameters, which are exact.
            master = piece.cut(values.pop(MASTER)) if MASTER in values else _model_values(parameters[piece.name], piece)
            piece.read(key).copy_(master)
        begun.setdefault(key, []).append((piece, float(values.get(STEP, 0)), values.pop(BEGUN, None)))
        state = allocate_state(optimizer, key) if values else {}
        for kind, value in values.items():
            if kind == STEP:
                other = torch.as_tensor(state.get(kind, 0)).cpu()  # of an earlier slice
                state[kind] = _step_count(optimizer, max(value, other), key.device)
            else:
                # For a key with many slices, the first one allocates the moment and each fills in its own part.
                if kind not in state:
                    state[kind] = torch.zeros_like(key, requires_grad=False)
                piece.read(state[kind]).copy_(piece.cut(value))
    _restore_blocks(engine, {name: value for name, value in saved.items() if name.startswith(f"{BLOCK}/")})
    for key, pieces in begun.items():
        _restore_late_starts(optimizer, key, pieces)


def _restore_late_starts(
    optimizer: torch.optim.Optimizer, key: Tensor, pieces: Sequence[tuple[_NamedSlice, float, Tensor | None]]
) -> None:
    """Restore where the elements of a key began, of each slice's step count and, within it, its late elements'."""
    count, found = max(step for _, step, _ in pieces), torch.zeros(key.numel(), device=key.device)
    for piece, step, begun in pieces:
        # A slice that was counted less than the key is late as a whole.
        piece.read(found).copy_((count - step) + (torch.zeros(piece.at.length) if begun is None else piece.cut(begun)))
    if found.any():
        late_starts(optimizer).restore(optimizer, key, found)


def _step_count(optimizer: torch.optim.Optimizer, value: Tensor, device: torch.device) -> Tensor | int:
    """Return a step count in the optimizer's own type: int for bitsandbytes, tensor for torch."""
    if not value.is_floating_point():
        return int(value)
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return value.to(device if on_device else "cpu", copy=True)


def _slices(engine: Any) -> Iterator[_NamedSlice]:
    """Yield this rank's slices of the trained tensors, in the model's order."""
    for name, parameter in trained_parameters(engine.module).items():
        if (at := optimizer_slice(engine, parameter)) is not None:
            yield _NamedSlice(name, at)


def _model_values(parameter: nn.Parameter, piece: _NamedSlice) -> Tensor:
    """Return the values of a slice from the model's parameters on this rank."""
    shard = local_shard(parameter)  # at stage 3, flat: it begins with the slice and ends with padding
    return piece.cut(parameter.detach().reshape(-1)) if shard is None else shard.detach().view(-1)[: piece.at.length]


def _merge_slices(
    slices: list[tuple[_NamedSlice, Tensor]], sizes: dict[str, int], device: torch.device, *, sharded: bool
) -> dict[str, Tensor]:
    """Return the full tensors, flat and on the CPU, from the slices of all ranks. Collective over ranks.

    Every rank writes its slices into zeros as long as all tensors together, and the ranks add these up. No two write to
    the same place, but a sum of floats would still turn -0.0 into 0.0: the bits are added as integers, which is exact.
    """
    begins, end = {}, 0
    for name, size in sizes.items():
        begins[name], end = end, end + size
    everything = torch.zeros(end, device=device)
    for piece, values in slices:
        begin = begins[piece.name] + piece.at.start
        everything[begin : begin + piece.at.length] = values.to(device)
    if sharded and world_size() > 1:
        everything = all_reduce_sum(everything.view(torch.int32)).view(torch.float32)
    return dict(zip(sizes, torch.split(everything.cpu(), list(sizes.values())), strict=True))


# --- state in blocks of 8 bits ---


def _keys(engine: Any) -> list[Tensor]:
    """Return the tensors that this rank's optimizer updates, each once, in the model's order."""
    return list({id(piece.at.key): piece.at.key for piece in _slices(engine)}.values())


def _own_blocks(engine: Any) -> dict[str, Tensor]:
    """Return this rank's unmodified state if any rank's is in blocks, else an empty mapping. Collective."""
    states = [basic_optimizer(engine).state.get(key, {}) for key in _keys(engine)]
    in_blocks = any(torch.is_tensor(v) and v.dtype == torch.uint8 for state in states for v in state.values())
    if not any(gather_objects(in_blocks)):
        return {}
    return {
        f"{BLOCK}/{rank()}/{number}/{kind}": torch.as_tensor(value).detach().cpu()
        for number, state in enumerate(states)
        for kind, value in state.items()
    }


def _restore_blocks(engine: Any, blocks: dict[str, Tensor]) -> None:
    """Restore state in blocks, which must match this rank's keys. Collective."""
    if not blocks:
        return
    keys, optimizer = _keys(engine), basic_optimizer(engine)
    own = {name: value for name, value in blocks.items() if name.startswith(f"{BLOCK}/{rank()}/")}
    states: list[dict[str, Tensor]] = [{} for _ in keys]
    for name, value in own.items():
        _, _, number, kind = name.split("/")
        if int(number) < len(keys):
            states[int(number)][kind] = value
    ranks = {name.split("/")[1] for name in blocks}
    fits = len(ranks) == world_size() and all(
        "state1" in state and state["state1"].numel() == key.numel() for key, state in zip(keys, states, strict=True)
    )
    # All ranks must raise together if the state of any does not fit.
    if not all(gather_objects(fits)):
        raise UserError(
            "the checkpoint's optimizer state is in blocks of 8 bits, which fit only the number of processes and the "
            f"ZeRO stage that it was written with ({len(ranks)} processes). Resume with these"
        )
    for key, saved in zip(keys, states, strict=True):
        state = allocate_state(optimizer, key)
        for kind, value in saved.items():
            if kind == STEP:
                state[kind] = _step_count(optimizer, value, key.device)
            elif kind in MOMENTS_IN_BLOCKS:
                state[kind].copy_(value)  # it may be paged, and what is copied to a device is not
            else:  # scales, and the code book, which all states share until one comes from a checkpoint
                state[kind] = value.to(key.device, copy=True)
