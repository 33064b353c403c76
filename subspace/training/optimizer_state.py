"""What the optimizer remembers, whole and by the names of the trained tensors, whatever ZeRO stage holds it.

DeepSpeed's own checkpoints are pickles, are bound to a number of processes and a stage, and are matched by position:
one of other layers with the same shapes loads without a word. What is read here fits any layout and can only go where
its name says. Each process contributes the pieces it holds; adding their bits as integers puts them together exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subspace.adapters.inject import trained_parameters
from subspace.distributed.collectives import all_reduce_sum, gather_objects, rank, world_size
from subspace.distributed.zero import full_shape, is_sharded
from subspace.errors import UserError

MASTER = "master"  # float32 copies, where the model's own are not float32
STEP, BLOCK = "step", "block"


@dataclass(frozen=True)
class _FlatSlice:
    """A stretch of a flattened trained tensor that this process's optimizer works on."""

    name: str
    start: int  # in the flattened tensor
    key: Tensor  # under which the optimizer keeps its state
    offset: int  # in the key
    length: int

    def of(self, state: Tensor) -> Tensor:
        return state.detach().view(-1)[self.offset : self.offset + self.length]


def can_gather_optimizer_state(engine: Any) -> bool:
    """Tell whether the optimizer's state is in memory; offloaded to NVMe, it is in DeepSpeed's own swap files."""
    return not getattr(engine.optimizer, "swap_optimizer", False)


def gather_optimizer_state(engine: Any) -> dict[str, Tensor]:
    """Return the optimizer's state on the CPU as ``{"exp_avg/NAME": ...}``, flat. Collective over ranks.

    Before the first step there is none. Adam's count of steps has no axis. A state in blocks of 8 bits cannot be cut at
    a tensor's ends; it is returned as each process has it, as ``{"block/RANK/NUMBER/KEY": ...}``.
    """
    parameters, state = trained_parameters(engine.module), engine.basic_optimizer.state
    scalars: dict[str, Tensor] = {}
    flat: dict[str, list[tuple[_FlatSlice, Tensor]]] = {}
    blocks = _blocks(engine)
    for piece in _pieces(engine):
        for key, value in {} if blocks else state.get(piece.key, {}).items():
            if key == STEP:
                scalars[f"{key}/{piece.name}"] = torch.as_tensor(value).cpu().clone()  # a file takes no views
            else:
                flat.setdefault(key, []).append((piece, piece.of(value)))
        if parameters[piece.name].dtype != torch.float32:
            flat.setdefault(MASTER, []).append((piece, piece.of(piece.key)))

    whole = {name: value for found in gather_objects({**scalars, **blocks}) for name, value in found.items()}
    held = gather_objects({key: [piece.name for piece, _ in values] for key, values in flat.items()})
    for key in sorted({key for one in held for key in one}):
        names = {name for one in held for name in one.get(key, ())}
        sizes = {name: full_shape(p).numel() for name, p in parameters.items() if name in names}
        parts = _put_together(flat.get(key, []), sizes, engine.device, spread=engine.zero_optimization())
        whole |= {f"{key}/{name}": part for name, part in parts.items()}
    return whole


def restore_optimizer_state(engine: Any, whole: dict[str, Tensor]) -> None:
    """Restore the state that :func:`gather_optimizer_state` returned. The trained tensors must have been restored.

    Raises:
        UserError: a state in blocks, from another number of processes or another ZeRO stage.
    """
    optimizer, parameters = engine.basic_optimizer, trained_parameters(engine.module)
    by_name: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for name, value in whole.items():
        key, _, parameter = name.partition("/")
        if key != BLOCK:
            by_name[parameter][key] = value
    for piece in _pieces(engine):
        given = by_name[piece.name]
        stretch = slice(piece.start, piece.start + piece.length)
        if engine.zero_optimization():
            master = given.pop(MASTER)[stretch] if MASTER in given else _held_here(parameters[piece.name], piece)
            piece.of(piece.key).copy_(master)
        state = optimizer.state[piece.key] if given else {}
        for key, value in given.items():
            if key == STEP:
                state[key] = _step(optimizer, value, piece.key.device)
            else:
                if key not in state:
                    state[key] = torch.zeros_like(piece.key, requires_grad=False)
                piece.of(state[key]).copy_(value[stretch])
    _write_blocks(engine, {name: value for name, value in whole.items() if name.startswith(f"{BLOCK}/")})
    # ZeRO-1 and -2 look their state up through links that they make after their first step.
    if optimizer.state and hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _step(optimizer: torch.optim.Optimizer, value: Tensor, device: torch.device) -> Tensor | int:
    """Return a count of steps as the optimizer keeps it: bitsandbytes' as a number, torch's in a tensor of its own."""
    if not value.is_floating_point():
        return int(value)
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return value.to(device if on_device else "cpu", copy=True)


def _keys(engine: Any) -> list[Tensor]:
    """Return what this process's optimizer works on, in the model's order."""
    return list({id(piece.key): piece.key for piece in _pieces(engine)}.values())


def _blocks(engine: Any) -> dict[str, Tensor]:
    """Return this process's state as it is if that of any process is in blocks, else nothing."""
    states = [engine.basic_optimizer.state.get(key, {}) for key in _keys(engine)]
    in_blocks = any(torch.is_tensor(value) and value.dtype == torch.uint8 for one in states for value in one.values())
    if not any(gather_objects(in_blocks)):
        return {}
    return {
        f"{BLOCK}/{rank()}/{number}/{key}": torch.as_tensor(value).detach().cpu()
        for number, one in enumerate(states)
        for key, value in one.items()
    }


def _write_blocks(engine: Any, blocks: dict[str, Tensor]) -> None:
    if not blocks:
        return
    keys, optimizer = _keys(engine), engine.basic_optimizer
    own = {name: value for name, value in blocks.items() if name.startswith(f"{BLOCK}/{rank()}/")}
    states: list[dict[str, Any]] = [{} for _ in keys]
    for name, value in own.items():
        _, _, number, key = name.split("/")
        if int(number) < len(keys):
            there = keys[int(number)].device
            states[int(number)][key] = _step(optimizer, value, there) if key == STEP else value.to(there, copy=True)
    ranks = {name.split("/")[1] for name in blocks}
    fits = len(ranks) == world_size() and all(
        "state1" in state and state["state1"].numel() == key.numel() for key, state in zip(keys, states, strict=True)
    )
    if not all(gather_objects(fits)):
        raise UserError(
            "the checkpoint's optimizer state is in blocks of 8 bits, which fit the number of processes and the ZeRO "
            f"stage that it was written with alone ({len(ranks)} processes). Resume with these"
        )
    for held, state in zip(keys, states, strict=True):
        optimizer.state[held] = state


def _held_here(parameter: nn.Parameter, piece: _FlatSlice) -> Tensor:
    if is_sharded(parameter):
        held: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        return held.detach().view(-1)[: piece.length]
    return parameter.detach().reshape(-1)[piece.start : piece.start + piece.length]


def _pieces(engine: Any) -> Iterator[_FlatSlice]:
    optimizer = engine.optimizer
    for name, parameter in trained_parameters(engine.module).items():
        size = full_shape(parameter).numel()
        if is_sharded(parameter):
            group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = rank() * length
            if start < size:  # the last part is padded
                key = optimizer.fp32_partitioned_groups_flat[group]
                yield _FlatSlice(name, start, key, offset, min(length, size - start))
        elif hasattr(parameter, "_hp_mapping"):
            if (here := parameter._hp_mapping) is not None:
                key = optimizer.single_partition_of_fp32_groups[here.param_group_index]
                at, length = here.hp_fragment_address.start, here.hp_fragment_address.numel
                yield _FlatSlice(name, here.lp_fragment_address.start, key, at, length)
        else:
            yield _FlatSlice(name, 0, parameter, 0, size)


def _put_together(
    pieces: list[tuple[_FlatSlice, Tensor]], sizes: dict[str, int], device: torch.device, *, spread: bool
) -> dict[str, Tensor]:
    begins, end = {}, 0
    for name, size in sizes.items():
        begins[name], end = end, end + size
    everything = torch.zeros(end, device=device)
    for piece, values in pieces:
        begin = begins[piece.name] + piece.start
        everything[begin : begin + piece.length] = values.to(device)
    if spread and world_size() > 1:
        everything = all_reduce_sum(everything.view(torch.int32)).view(torch.float32)
    parts = torch.split(everything.cpu(), list(sizes.values()))
    return dict(zip(sizes, parts, strict=True))
