"""All uses of DeepSpeed's private names, and all patches of it.

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
optimizer.grad_position, .get_param_id,        resume at ZeRO-3         where a parameter's shard lies in the flat
.fp32_partitioned_groups_flat                                           float32 tensors that the optimizer steps
optimizer.swap_optimizer                       checkpoints with the     its state is then in swap files and cannot be
                                               optimizer on NVMe        read from memory
optimizer.averaged_gradients                   the check for gradients  ZeRO frees ``parameter.grad`` in the backward
                                               that are not finite      pass; the public getter gathers each tensor
parameter._hp_mapping.get_lp_grad_fragment,    AdaLoRA at ZeRO-1/-2     the public getter of a full gradient makes an
._hp_grad                                                               all-reduce for each tensor
optimizer.norm_for_param_grads                 the same, where the      the gradients themselves are still on their
                                               optimizer is offloaded   way to CPU memory
optimizer.loss_scaler (its variables)          resume in float16        its state is saved by DeepSpeed's own
                                                                        checkpoints only
engine.skipped_steps, .global_steps            resume, health checks    the counters have no public setters
engine.basic_optimizer                         resume                   the optimizer under ZeRO's wrapper
zero.stage_1_and_2 and zero.stage3's           nothing; slower on a     in every step they wait for the GPU, to find
is_invalid_grad_norm, runtime.engine's         GPU                      what the health check finds at log_every, or to
clip_grad_norm_, optimizer.check_grad_overflow                          copy a number
and mask_nan_or_inf_with_val_inplace
engine.enable_backward_allreduce               nothing; slower          at stage 0 on one process gradients are copied
                                                                        twice for an all-reduce of one rank
deepspeed.ops.__compatible_ops__               start on a CPU           init_distributed compiles an op that training
                                                                        never calls: a minute of waiting, a compiler
                                                                        that must be there, and a hang for ever where
                                                                        a killed build left its lock behind
deepspeed.utils.groups._WORLD_GROUP            a second run in one      DeepSpeed keeps its clone of the world's group
                                               process                  when that is destroyed, and uses it again
logger "DeepSpeed", FutureWarnings             nothing; noise           calls of collectives that torch has renamed
launcher.multinode_runner.PDSHRunner, its      arguments that a shell   it quotes nothing, and ends other people's
arguments, launcher.runner.PDSHRunner          reads, on several hosts  processes; see :mod:`subspace.distributed.hosts`
runtime.compiler.compile                       a second of each start   its Muon, in no use here, loads torch's compiler
zero.partition_parameters.zero3_linear_wrap    adapters at experts,     for good in the place of torch's ``linear``,
                                               after ZeRO-3             whose protocol it does not keep
torch.utils.cpp_extension._get_build_directory check for a stale lock   DeepSpeed's JIT builds wait for the lock there
=============================================  =======================  ==============================================
"""

from __future__ import annotations

import logging
import runpy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspace.common.patching import patched

#: DeepSpeed's libraries for NVMe, compiled at their first use.
NVME_LIBRARIES = ("async_io", "pin_memory")


# --- parameters ---


def is_sharded(parameter: Tensor) -> bool:
    """Return True if ZeRO-3 owns the parameter."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the full shape of a parameter, sharded or not."""
    return torch.Size(getattr(parameter, "ds_shape", ())) if is_sharded(parameter) else parameter.shape


def local_shard(parameter: Tensor) -> Tensor | None:
    """Return this rank's shard of a parameter, flat and padded at its end; None if it is not sharded."""
    return getattr(parameter, "ds_tensor", None)


def shard_as(parameter: nn.Parameter, new: Iterable[nn.Parameter]) -> None:
    """Shard the parameters ``new`` in the same way as the sharded ``parameter``. Collective over ranks."""
    parameter.convert_to_zero_parameters(param_list=list(new))  # type: ignore[attr-defined]


def has_zero_optimizer(parameter: Tensor) -> bool:
    """Return True if a ZeRO optimizer (stage 1 to 3) updates a copy of the parameter."""
    return is_sharded(parameter) or hasattr(parameter, "_hp_mapping")


@dataclass(frozen=True)
class OptimizerSlice:
    """The slice of a trainable parameter that this rank's optimizer updates.

    ``length`` elements of the flattened parameter from ``start`` are those of the flattened ``key`` from ``offset``.

    Attributes:
        start: index in the flattened parameter.
        key: the tensor under which the optimizer keeps its state.
        offset: index in the flattened ``key``.
        length: number of elements.
    """

    start: int
    key: Tensor
    offset: int
    length: int


def optimizer_slice(engine: Any, parameter: nn.Parameter) -> OptimizerSlice | None:
    """Return the slice of a trainable parameter that this rank's optimizer updates; None if there is none."""
    optimizer = engine.optimizer
    size = full_shape(parameter).numel()
    if is_sharded(parameter):
        # ZeRO-3: each rank has `length` elements of every parameter, the last ranks' part being padded. All shards of a
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
    """Return the underlying optimizer without ZeRO's wrapper."""
    optimizer: torch.optim.Optimizer = engine.basic_optimizer
    return optimizer


def optimizer_state_on_nvme(engine: Any) -> bool:
    """Return True if the optimizer state is in DeepSpeed's swap files."""
    return bool(getattr(engine.optimizer, "swap_optimizer", False))


def local_gradients(engine: Any) -> list[Tensor]:
    """Return this rank's gradients between the last backward pass and the step, without those offloaded by ZeRO."""
    if engine.zero_optimization():
        averaged = getattr(engine.optimizer, "averaged_gradients", {})
        return [gradient for group in averaged.values() for gradient in group or () if gradient is not None]
    return [p.grad for p in engine.module.parameters() if p.grad is not None]


def has_spread_gradient(parameter: nn.Parameter) -> bool:
    """Return True if the ZeRO optimizer holds the gradient, and ``parameter.grad`` is none or a rounded one."""
    rounded = getattr(parameter, "_hp_grad", None) is not None
    return has_zero_optimizer(parameter) and (parameter.grad is None or rounded)


def local_gradient(parameter: nn.Parameter) -> tuple[int, Tensor] | None:
    """Return this rank's part of a ZeRO parameter's gradient, flat, and its start in the flattened parameter.

    None if this rank has no part of it. Valid between the last backward pass and the step.
    """
    if is_sharded(parameter):
        from deepspeed.utils import safe_get_local_grad

        part = safe_get_local_grad(parameter).flatten()  # the last ranks' are padded
        start, size = torch.distributed.get_rank() * part.numel(), full_shape(parameter).numel()
        return (start, part[: size - start]) if start < size else None
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    part = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()  # type: ignore[attr-defined]
    at = mapping.lp_fragment_address
    if part.numel() == parameter.numel():  # an engine in bfloat16 has the whole gradient on each rank
        part = part[at.start : at.start + at.numel]
    return at.start, part


def offloaded_gradient_norms(engine: Any) -> list[Tensor]:
    """Return the norms, scalars, of this rank's gradients that ZeRO has moved to CPU memory or disk; none otherwise.

    DeepSpeed computes them on the device before it moves a gradient, so that reading them waits for no copy.
    """
    return list(getattr(engine.optimizer, "norm_for_param_grads", {}).values()) if engine.zero_optimization() else []


def skipped_steps(engine: Any) -> int:
    """Return the number of steps skipped because a gradient overflowed float16."""
    return int(engine.skipped_steps)


def step_counters(engine: Any) -> dict[str, int]:
    """Return the engine's step counters, for :func:`restore_step_counters`."""
    return {"steps": engine.global_steps, "skipped": engine.skipped_steps}


def restore_step_counters(engine: Any, counters: Mapping[str, int]) -> None:
    """Restore the engine's step counters."""
    engine.global_steps, engine.skipped_steps = counters["steps"], counters["skipped"]


def loss_scale(engine: Any) -> float:
    """Return the loss scale of the last backward pass; 1 without float16."""
    return float(engine.optimizer.cur_scale) if engine.fp16_enabled() else 1.0


def loss_scale_state(engine: Any) -> dict[str, Any]:
    """Return the state of float16's loss scaler, for :func:`restore_loss_scale`; empty without float16."""
    scaler = vars(engine.optimizer.loss_scaler) if engine.fp16_enabled() else {}
    return {name: value for name, value in scaler.items() if name.startswith(("cur_", "last_"))}


def restore_loss_scale(engine: Any, state: Mapping[str, Any]) -> None:
    """Restore the state of float16's loss scaler."""
    if engine.fp16_enabled() and state:
        vars(engine.optimizer.loss_scaler).update(state)


def loss_scale_exhausted(engine: Any) -> bool:
    """Return True if float16's loss scale is at its minimum."""
    scaler = engine.optimizer.loss_scaler
    return bool(scaler.dynamic and scaler.cur_scale <= scaler.min_scale)


# --- patches of DeepSpeed ---


def keep_linear_protocol() -> None:
    """Let the ``linear`` that DeepSpeed puts in the place of torch's, at ZeRO-3 and ever after, honour its protocol.

    Behind its autograd function, what only stands for a tensor, as an expert's matrix does, has no gradients.
    """
    from deepspeed.runtime.zero import linear, partition_parameters

    partition_parameters.zero3_linear_wrap = _linear
    if torch.nn.functional.linear is linear.zero3_linear_wrap:  # it has been put there already
        torch.nn.functional.linear = _linear


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    product = zero3_linear_wrap if isinstance(weight, Tensor) else torch._C._nn.linear
    return product(input, weight, bias)


@contextmanager
def steps_without_reads(engine: Any) -> Iterator[None]:
    """Inside the block, let ``engine.step()`` read nothing from the GPU, nor wait for it to copy a number there.

    DeepSpeed would skip a step whose gradient norm is not finite; now whoever calls has to look for that. Nothing is
    changed in float16, whose loss scale depends on it, nor with an offloaded optimizer, whose gradients the CPU has.
    """
    optimizer = engine.optimizer
    offloaded = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    if engine.fp16_enabled() or offloaded:
        yield
        return
    from deepspeed.runtime import engine as engine_module
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    with ExitStack() as stack:
        for module in (stage_1_and_2, stage3):
            stack.enter_context(patched(module, "is_invalid_grad_norm", lambda norm: False))
            stack.enter_context(patched(module, "mask_nan_or_inf_with_val_inplace", _mask_not_finite))
        stack.enter_context(patched(engine_module, "clip_grad_norm_", _clip_gradients))
        if hasattr(optimizer, "check_grad_overflow"):
            stack.enter_context(patched(optimizer, "check_grad_overflow", False))
        yield


def _mask_not_finite(value: Tensor, device: Any = None, val: float = -1.0) -> None:
    """Do what ``mask_nan_or_inf_with_val_inplace`` does, without copying the number to the device."""
    value.masked_fill_(~value.isfinite(), val)


def _clip_gradients(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2, mpu: Any = None) -> Tensor:
    """Do what ``clip_grad_norm_`` does in the same order, for one norm and no model parallelism, but copy nothing."""
    assert norm_type == 2, "DeepSpeed asks for another norm than it did"
    assert mpu is None, "DeepSpeed runs with model parallelism"
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm([gradient.float() for gradient in gradients], 2)
    norm = torch.stack(list(norms)).pow(2.0).sum().pow(0.5)
    ranks = torch.distributed.get_world_size()
    norm = norm * 1.0 / float(ranks)
    if ranks > 1:
        torch.distributed.all_reduce(norm)
    scale = (torch.full_like(norm, max_norm) / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale)
    return norm


def skip_useless_allreduce(engine: Any) -> None:
    """Disable the all-reduce of gradients in an engine without ZeRO on one process, which would only copy them."""
    engine.enable_backward_allreduce = False


def import_muon() -> None:
    """Import DeepSpeed's Muon, as ZeRO does to see whether it is the optimizer, without torch's compiler."""
    from deepspeed.runtime import compiler

    with patched(compiler, "compile", lambda: lambda function: function):
        from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401


def disable_shm_comm_op() -> None:
    """Prevent ``deepspeed.init_distributed`` from compiling a CPU op that training never calls."""
    import deepspeed.ops

    # DeepSpeed looks up in this table whether the machine can build the op, and uses no other entry. If it is not there
    # yet, reading it would try the compiler of every op first.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def forget_world_group() -> None:
    """Drop DeepSpeed's clone of a process group that has been destroyed, so that the next engine makes one anew."""
    if groups := sys.modules.get("deepspeed.utils.groups"):
        groups._WORLD_GROUP = None  # type: ignore[attr-defined]


def run_pdsh_launcher(arguments: Sequence[str], command: Callable[..., tuple[list[str], dict[str, str]]]) -> None:
    """Run DeepSpeed's launcher for several hosts with another command; it ends with SystemExit where that failed.

    Args:
        arguments: the launcher's.
        command: makes the command that starts the launcher of each host, and its environment, of that one's options and
            words, the variables that DeepSpeed passes on, the hosts' names, and the environment of this process.
    """
    from deepspeed.launcher import multinode_runner, runner

    class QuotingRunner(multinode_runner.PDSHRunner):  # type: ignore[misc]
        def add_export(self, key: str, var: str) -> None:
            self.exports[key] = var

        def parse_user_args(self) -> list[str]:
            return list(self.args.user_args)

        def get_cmd(
            self, environment: dict[str, str], active_resources: Mapping[str, object]
        ) -> tuple[list[str], list[str], dict[str, str]]:
            given = self.args
            words = [f"--world_info={self.world_info_base64}", f"--master_addr={given.master_addr}"]
            words += [f"--master_port={given.master_port}"]
            words += [f"--{flag}" for flag in ("module", "no_local_rank") if getattr(given, flag)]
            words += [f"--log_level={given.log_level}", self.user_script, *self.user_arguments]
            started, variables = command(words, self.exports, [*active_resources], environment)
            # The second command is the one that would end whatever looks like this run; our wrapper ends it.
            return started, ["true"], variables

    runner.PDSHRunner = QuotingRunner
    runner.main([*arguments])


def run_node_launcher(arguments: Sequence[str]) -> None:
    """Run DeepSpeed's launcher of one host's processes; it ends with SystemExit where one of them failed."""
    sys.argv[1:] = arguments
    runpy.run_module("deepspeed.launcher.launch", run_name="__main__", alter_sys=True)


def silence_deepspeed() -> None:
    """Silence DeepSpeed's internal log messages. Process-wide, so for processes of the command line only."""
    # A filter and not a level, which the import of DeepSpeed would overwrite.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*", category=FutureWarning)


def fp16_supported() -> bool:
    """Return True if the device supports float16."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def async_io_supported() -> bool:
    """Return True if DeepSpeed's NVMe library can be compiled and used on this machine."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def build_lock(library: str) -> Path:
    """Return the lock file that exists while a process compiles one of DeepSpeed's libraries."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(library, verbose=False)) / "lock"
