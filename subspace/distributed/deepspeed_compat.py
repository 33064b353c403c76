"""Every private name of DeepSpeed that is used here, and every change that is made to it, in one place.

Checked with DeepSpeed 0.19.8. ``tests/distributed/test_deepspeed_compat.py`` has a canary for each line of the table:
the first test that fails after an upgrade names what has changed.

=============================================  =======================  ==============================================
internal name                                  what breaks without it   reason for its use
=============================================  =======================  ==============================================
parameter.ds_id, .ds_shape                     everything at ZeRO-3     no public function says whether a parameter is
                                                                        sharded and which shape it has when gathered
parameter.ds_tensor                            resume, checksums,       this process's shard; gathering the whole
                                               memory reports           tensor would move every weight
parameter.convert_to_zero_parameters           method ``full``          shards a parameter made after loading
parameter._hp_mapping                          resume at ZeRO-1/-2      the only link from a parameter to its float32
                                                                        copy and its place in it
optimizer.single_partition_of_fp32_groups      resume at ZeRO-1/-2      the float32 copies that the optimizer steps
optimizer._lazy_init_hp_params_optimizer_state schedules after resume   links restored moments to parameters, which
                                               at ZeRO-1/-2             DeepSpeed itself does after its first step
optimizer.grad_position, .get_param_id,        resume at ZeRO-3         where a parameter's shard lies in the flat
.fp32_partitioned_groups_flat                                           float32 tensors that the optimizer steps
optimizer.swap_optimizer                       checkpoints with the     its state is then in swap files and cannot be
                                               optimizer on NVMe        read from memory
optimizer.averaged_gradients                   the check for gradients  ZeRO frees ``parameter.grad`` in the backward
                                               that are not finite      pass; the public getter gathers each tensor
optimizer.loss_scaler (its variables)          resume in float16        its state is saved by DeepSpeed's own
                                                                        checkpoints only
engine.skipped_steps, .global_steps            resume, health checks    the counters have no public setters
engine.basic_optimizer                         resume                   the optimizer under ZeRO's wrapper
engine.enable_backward_allreduce               nothing; slower          at stage 0 on one process gradients are copied
                                                                        twice for an all-reduce with nobody
deepspeed.ops.__compatible_ops__               start on a CPU           init_distributed compiles an op that training
                                                                        never calls: a minute of waiting, a compiler
                                                                        that must be there, and a hang for ever where
                                                                        a killed build left its lock behind
deepspeed.utils.groups._WORLD_GROUP            a second run in one      DeepSpeed keeps its clone of the world's group
                                               process                  when that is destroyed, and uses it again
logger "DeepSpeed", FutureWarnings             nothing; noise           calls of collectives that torch has renamed
torch.utils.cpp_extension._get_build_directory check for a stale lock   DeepSpeed's JIT builds wait for the lock there
=============================================  =======================  ==============================================
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: DeepSpeed's libraries for NVMe, compiled at their first use.
NVME_LIBRARIES = ("async_io", "pin_memory")


# --- parameters ---


def is_sharded(parameter: Tensor) -> bool:
    """Return True if ZeRO-3 owns the parameter."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, sharded or not."""
    return torch.Size(getattr(parameter, "ds_shape", ())) if is_sharded(parameter) else parameter.shape


def local_shard(parameter: Tensor) -> Tensor | None:
    """Return this process's part of a parameter, flat and padded at its end; None where ZeRO-3 does not own it."""
    return getattr(parameter, "ds_tensor", None)


def shard_as(parameter: nn.Parameter, new: Iterable[nn.Parameter]) -> None:
    """Shard the parameters ``new`` as ``parameter``, which is sharded, is. Collective over ranks."""
    parameter.convert_to_zero_parameters(param_list=list(new))  # type: ignore[attr-defined]


def has_zero_optimizer(parameter: Tensor) -> bool:
    """Return True if the optimizer of ZeRO, of any stage from 1 on, works on a copy of the parameter."""
    return is_sharded(parameter) or hasattr(parameter, "_hp_mapping")


# --- what the optimizer works on ---


@dataclass(frozen=True)
class OptimizerSlice:
    """The part of a trained parameter that this process's optimizer updates.

    The parameter, flattened, from ``start`` on, ``length`` numbers, is ``key``, flattened, from ``offset`` on.

    Attributes:
        start: in the flattened parameter.
        key: the tensor under which the optimizer keeps its state.
        offset: in the flattened ``key``.
        length: in numbers.
    """

    start: int
    key: Tensor
    offset: int
    length: int


def optimizer_slice(engine: Any, parameter: nn.Parameter) -> OptimizerSlice | None:
    """Return which part of a trained parameter this process's optimizer updates, and where; None if it has none."""
    optimizer = engine.optimizer
    size = full_shape(parameter).numel()
    if is_sharded(parameter):
        # ZeRO-3: each rank has `length` numbers of every parameter, the last ranks' part being padded. All shards of a
        # parameter group lie one after the other in one flat float32 tensor.
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = torch.distributed.get_rank() * length
        if start >= size:
            return None
        return OptimizerSlice(start, optimizer.fp32_partitioned_groups_flat[group], offset, min(length, size - start))
    if hasattr(parameter, "_hp_mapping"):
        # ZeRO-1 and -2: all parameters of a group are one flat tensor, which is cut into equal parts for the ranks. A
        # parameter may lie in one part, across a cut, or wholly in the parts of others: then its mapping is None.
        if parameter._hp_mapping is None:
            return None
        mapping: Any = parameter._hp_mapping
        key = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        at = mapping.hp_fragment_address
        return OptimizerSlice(mapping.lp_fragment_address.start, key, at.start, at.numel)
    return OptimizerSlice(0, parameter, 0, size)


def basic_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the optimizer that does the steps, without ZeRO's wrapper."""
    optimizer: torch.optim.Optimizer = engine.basic_optimizer
    return optimizer


def link_optimizer_state(engine: Any) -> None:
    """Make restored optimizer state visible to ``safe_get_full_optimizer_state`` at ZeRO-1 and -2."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def optimizer_state_on_nvme(engine: Any) -> bool:
    """Return True if the optimizer's state lies in DeepSpeed's swap files."""
    return bool(getattr(engine.optimizer, "swap_optimizer", False))


def local_gradients(engine: Any) -> list[Tensor]:
    """Return the gradients that this process holds between last backward and step; none of what ZeRO offloads."""
    if engine.zero_optimization():
        averaged = getattr(engine.optimizer, "averaged_gradients", {})
        return [gradient for group in averaged.values() for gradient in group or () if gradient is not None]
    return [p.grad for p in engine.module.parameters() if p.grad is not None]


# --- the engine's counters and loss scale ---


def skipped_steps(engine: Any) -> int:
    """Return how many steps were skipped because a gradient overflowed float16."""
    return int(engine.skipped_steps)


def step_counters(engine: Any) -> dict[str, int]:
    """Return the engine's counts of steps, for :func:`restore_step_counters`."""
    return {"steps": engine.global_steps, "skipped": engine.skipped_steps}


def restore_step_counters(engine: Any, counters: Mapping[str, int]) -> None:
    """Set the engine's counts of steps."""
    engine.global_steps, engine.skipped_steps = counters["steps"], counters["skipped"]


def loss_scale(engine: Any) -> float:
    """Return the factor that the loss of the last backward pass was scaled with; 1 outside float16."""
    return float(engine.optimizer.cur_scale) if engine.fp16_enabled() else 1.0


def loss_scale_state(engine: Any) -> dict[str, Any]:
    """Return what float16's loss scaler remembers, for :func:`restore_loss_scale`; nothing outside float16."""
    scaler = vars(engine.optimizer.loss_scaler) if engine.fp16_enabled() else {}
    return {name: value for name, value in scaler.items() if name.startswith(("cur_", "last_"))}


def restore_loss_scale(engine: Any, state: Mapping[str, Any]) -> None:
    """Set what float16's loss scaler remembers."""
    if engine.fp16_enabled() and state:
        vars(engine.optimizer.loss_scaler).update(state)


def loss_scale_exhausted(engine: Any) -> bool:
    """Return True if float16's loss scale is as small as it may become."""
    scaler = engine.optimizer.loss_scaler
    return bool(scaler.dynamic and scaler.cur_scale <= scaler.min_scale)


# --- changes to DeepSpeed ---


def skip_useless_allreduce(engine: Any) -> None:
    """Keep an engine without ZeRO on one process from copying all gradients to add nothing to them."""
    engine.enable_backward_allreduce = False


def disable_shm_comm_op() -> None:
    """Keep ``deepspeed.init_distributed`` from compiling an op for CPUs that training never calls."""
    import deepspeed.ops

    # DeepSpeed asks this table whether the machine can build the op, and uses no other entry. Where it is not there
    # yet, reading it would try the compiler of every op first.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def forget_world_group() -> None:
    """Drop DeepSpeed's clone of a process group that has been destroyed, so that the next engine makes one anew."""
    if groups := sys.modules.get("deepspeed.utils.groups"):
        groups._WORLD_GROUP = None  # type: ignore[attr-defined]


def silence_deepspeed() -> None:
    """Silence what DeepSpeed says to its developers. Process-wide, so for processes of the command line only."""
    # A filter and not a level, which the import of DeepSpeed would set anew.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*", category=FutureWarning)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


# --- what the machine can do ---


def fp16_supported() -> bool:
    """Return True if the device computes in float16."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def async_io_supported() -> bool:
    """Return True if DeepSpeed's library for NVMe can be compiled and run here."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def build_lock(library: str) -> Path:
    """Return the file whose presence says that a process is compiling one of DeepSpeed's libraries."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(library, verbose=False)) / "lock"
