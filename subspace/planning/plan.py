"""Estimate of a run's memory by part, disk, steps and time before anything is loaded.

No figure is fitted to a run. Weights are counted on the meta device (:mod:`subspace.planning.static_memory`),
activations by tracing a step there (:mod:`subspace.planning.activation_memory`). Memory besides tensors is, on a CPU,
the resident memory of this process, which by then has imported the run's libraries, opened the rows, built model and
adapters, and traced a step; on a GPU, estimates that the report names as such (:mod:`subspace.planning.devices`).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from subspace.adapters.inject import trained_parameters
from subspace.adapters.parameter_count import count_trained
from subspace.common.host_memory import available_memory, resident_memory
from subspace.config import RunConfig
from subspace.data.config import TASK_LENGTH
from subspace.data.dataset import Data, is_encoded, open_data
from subspace.data.sampler import shard_batch
from subspace.data.tasks import find_mixture
from subspace.distributed.deepspeed_config import BatchLayout
from subspace.distributed.device import device
from subspace.errors import UserError
from subspace.models.loading import model_limits, open_tokenizer
from subspace.planning.activation_memory import ActivationMemory, BatchShape, trace_activation_memory
from subspace.planning.devices import CUDA_CONTEXT, DeviceSpec, PlannedDevice, gpu_overheads
from subspace.planning.run_time import matrix_work, seconds_here, seconds_on
from subspace.planning.static_memory import MemoryItem, StaticMemory
from subspace.resolve import ResolvedRun, data_settings, resolve_run, shape_with_adapters, step_draw, step_plan
from subspace.training.config import STATE_BYTES

#: Assumed tokens of an answer with its EOS, where the data is not prepared.
ANSWER = 16


@dataclass(frozen=True)
class TrainingWork:
    """The training workload: the longest micro-batch, and the numbers of steps and tokens.

    Attributes:
        data: the rows, if they are tokenised already. They stay open, as in the run, because the file pages read count
            as resident memory.
        micro_batches: the rows of each micro-batch of rank 0.
    """

    batch: BatchShape
    lengths: str
    steps: int | None
    tokens: int | None
    data: Data | None = None
    micro_batches: npt.NDArray[np.int64] | None = None

    @classmethod
    def of(cls, config: RunConfig, layout: BatchLayout) -> TrainingWork:
        """Return the workload of the data if it is tokenised already, else that of the longest rows allowed."""
        try:
            tokenizer = open_tokenizer(config.model)
            draw = step_draw(config, layout)
            data = data_settings(config)
            limits = model_limits(config.model)
            # How long rows of one's own are is known once they are encoded.
            own = any(part.data for part in find_mixture(config.data.mixture).parts)
            known = own or is_encoded(data, tokenizer, config.train.seed, draw, limits)
        except UserError:
            known = False
        if known:
            return cls._from_data(
                config, layout, open_data(data, tokenizer, config.train.seed, fed=draw, limits=limits)
            )
        longest = -(-(config.data.max_length or TASK_LENGTH) // 8) * 8
        columns = longest - 1 if config.data.loss_on == "all" else min(ANSWER, longest - 1)
        rows = find_mixture(config.data.mixture).rows
        rows = min(rows or config.data.limit or 0, config.data.limit or rows or 0)
        steps = config.train.steps or (math.ceil(round(config.train.epochs * rows) / layout.batch) or None)
        batch = BatchShape(
            layout.micro_batch, longest, columns, layout.micro_batch * columns, masked=config.data.packing
        )
        return cls(batch, "data.max_length", steps, None)

    @classmethod
    def _from_data(cls, config: RunConfig, layout: BatchLayout, data: Data) -> TrainingWork:
        lengths, steps = data.train.lengths, step_plan(data, config, layout)
        # A smaller last step needs no more memory than a full one, where there is one.
        rows = [steps[number] for number in range(len(steps) - steps.ends_small)]
        parts = [part for step in rows for part in shard_batch(step, 0, layout.ranks, layout.accumulate) if part]
        largest = max(map(len, parts))
        micro_batches = np.array([part for part in parts if len(part) == largest])
        longest = _shape(data, parts[int(_fed(data, micro_batches).argmax())])
        tokens = int(lengths[steps.all_rows].sum())
        return cls(longest, "the heaviest of the data", len(steps), tokens, data, micro_batches)

    def heaviest(self, footprint: ActivationMemory) -> BatchShape:
        """Return the micro-batch with the most memory, estimated from the longest one's memory per token and label."""
        if self.data is None or self.micro_batches is None:
            return self.batch
        lengths = self.data.train.lengths[self.micro_batches]
        labels = lengths - 1 if self.data.loss_on == "all" else self.data.train.answers[self.micro_batches]
        each = (footprint.activations + footprint.backward) / (self.batch.rows * self.batch.tokens)
        taken = each * _fed(self.data, self.micro_batches) + footprint.head / self.batch.labelled * labels.sum(axis=1)
        return _shape(self.data, self.micro_batches[int(taken.argmax())].tolist())


def _fed(data: Data, micro_batches: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the tokens of each micro-batch: padding included, or those of its rows if packed."""
    lengths = data.train.lengths[micro_batches]
    counts: npt.NDArray[np.int64] = lengths.sum(axis=1) if data.packing else lengths.max(axis=1) * lengths.shape[1]
    return counts


def _shape(data: Data, rows: Sequence[int]) -> BatchShape:
    batch = data.batch(rows)
    count, tokens = batch.input_ids.shape
    return BatchShape(count, tokens, len(batch.columns), batch.num_labelled, masked=data.packing)


@dataclass(frozen=True)
class Plan:
    """The estimated requirements of a run. Bytes are per device, or per process on a CPU.

    Attributes:
        parts: what the memory consists of, in host memory where an item says so.
        loading: the most while the model loads.
        peak: the most in a step. On a GPU, of tensors, as torch counts them.
        overheads: what a GPU's memory holds besides tensors.
        needed: the most that the device must have, loading and overheads included.
        seconds: the range of the run's time; None where it cannot be estimated.
        longest_rows: whether the time is that of rows as long as data.max_length, because the data is not here.
        planned_for: the GPU that --device names; None for this machine.
    """

    model: str
    method: str
    device: str
    processes: int
    stage: int
    micro_batch: int
    accumulate: int
    tokens: int
    lengths: str
    trained: int
    parts: tuple[MemoryItem, ...]
    loading: int
    peak: int
    overheads: tuple[MemoryItem, ...]
    needed: int
    checkpoint: int
    adapter: int
    steps: int | None
    all_tokens: int | None
    seconds: tuple[float, float] | None
    longest_rows: bool = False
    planned_for: str | None = None
    keeps: bool = False  # freed memory stays with the process
    largest_micro_batch: int | None = None
    memory: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)

    def lines(self) -> Iterator[str]:
        """Yield the report's lines."""
        many = f"{self.processes} processes, " if self.processes > 1 else ""
        device = self.planned_for or self.device
        yield f"{self.method} on {self.model}: {self.trained:,} trained numbers; {many}ZeRO {self.stage}, {device}"
        yield f"micro-batch of {self.micro_batch} x {self.tokens} tokens ({self.lengths}), {self.accumulate} a step"
        yield ""
        for part in (*self.parts, *self.overheads):
            yield f"  {part.name:<42} {format_bytes(part.bytes):>10}{'  in host memory' if part.host else ''}"
        yield f"  {'most while loading':<42} {format_bytes(self.loading):>10}"
        yield f"  {'most in a step':<42} {format_bytes(self.peak):>10}"
        if self.overheads:
            yield f"  {'needed of the device, estimates included':<42} {format_bytes(self.needed):>10}"
        if self.keeps:
            yield "  train.keep_memory: freed memory stays with the process, a quarter to a half more in trials"
        yield ""
        if self.memory:
            most = self.largest_micro_batch
            answer = f"a micro-batch of {most} fits" if most else "not even a micro-batch of 1 fits"
            yield f"into {format_bytes(self.memory)}: {answer}"
        yield f"on disk: adapter {format_bytes(self.adapter)}, a checkpoint {format_bytes(self.checkpoint)}"
        if self.steps:
            yield f"{self.steps:,} steps" + (f", {self.all_tokens:,} tokens" if self.all_tokens else "")
        if self.seconds:
            where = f"on {self.planned_for}" if self.planned_for else "here"
            rows = ", were every row as long as data.max_length" if self.longest_rows else ""
            yield f"time {where}: {format_time(self.seconds[0])} to {format_time(self.seconds[1])}{rows}"


def build_plan(
    config: RunConfig, *, processes: int = 1, memory: int | None = None, on: PlannedDevice | None = None
) -> Plan:
    """Return the estimate of a run. No weights are read and no processes started.

    Args:
        config: the run.
        processes: the number of processes of the run.
        memory: memory of a device in bytes, for which to find the largest micro-batch; default: that of ``on``.
        on: the GPU to plan for, which need not be here; None plans for this machine.

    Raises:
        UserError: settings that training would reject before loading anything.
    """
    run = resolve_run(config, processes, torch.device("cuda") if on else device(), here=on is None)
    memory = on.memory if on and memory is None else memory
    work = TrainingWork.of(config, run.layout)
    model, run = _shape_with_adapters(run)
    static = StaticMemory(model, run.engine.settings, processes, STATE_BYTES[config.train.optimizer], gpu=run.on_gpu)
    estimate = MemoryEstimate.of(run, model, work, static, on.spec if on else None)
    tokens = work.tokens or (work.steps and work.steps * run.layout.batch * work.batch.tokens)
    loading = estimate.program + static.loading()
    return Plan(
        model=config.model.path,
        method=config.methods,
        device=str(run.device),
        processes=processes,
        stage=static.stage,
        micro_batch=run.layout.micro_batch,
        accumulate=run.layout.accumulate,
        tokens=estimate.batch.tokens,
        lengths=work.lengths,
        trained=count_trained(model),
        parts=(*estimate.fixed, *estimate.activations.parts()),
        loading=loading,
        peak=estimate.peak(estimate.activations),
        overheads=estimate.overheads(estimate.activations),
        needed=max(estimate.needed(estimate.activations), loading + estimate.context),
        checkpoint=4 * run.trained + static.state,
        adapter=4 * run.trained,
        steps=work.steps,
        all_tokens=work.tokens,
        seconds=_seconds(run, model, static, work, tokens, on),
        longest_rows=not work.tokens,
        planned_for=str(on) if on else None,
        keeps=config.train.keep_memory and not run.on_gpu,
        largest_micro_batch=None if memory is None else estimate.largest_micro_batch(model, memory),
        memory=memory,
    )


def room_for_runs(config: RunConfig) -> int:
    """Return how many runs like this one fit into this machine's free memory when they are trained together.

    A further run takes what so many more rows of a micro-batch take: its adapters are small beside them.
    """
    free = torch.cuda.mem_get_info(device())[0] if device().type == "cuda" else available_memory()[0]
    found = build_plan(config, memory=free)
    return max(1, (found.largest_micro_batch or 0) // found.micro_batch)


def _shape_with_adapters(run: ResolvedRun) -> tuple[Any, ResolvedRun]:
    """Return the model with adapters on the meta device, and the run with its final engine settings."""
    config = run.config
    model, run = shape_with_adapters(run)
    if run.engine.settings["fp16"]["enabled"] or run.engine.settings["bf16"]["enabled"]:
        for tensor in trained_parameters(model).values():
            tensor.data = tensor.data.to(getattr(torch, config.model.dtype))
    return model, run


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of a step in bytes, per device, or per process on a CPU.

    Attributes:
        batch: the micro-batch with the most memory.
        activations: its activation memory.
        accumulated: whether gradients of an earlier micro-batch exist already.
        program: memory of Python, libraries and rows on a CPU; 0 on a GPU.
        fixed: static memory, in use between two steps.
        ranks: the number of processes.
        gpu: whether the device is a GPU, so that parts in CPU memory do not count.
        spec: the GPU's figures, if they are known.
    """

    batch: BatchShape
    activations: ActivationMemory
    accumulated: bool
    program: int
    fixed: tuple[MemoryItem, ...]
    ranks: int
    gpu: bool
    spec: DeviceSpec | None = None

    @classmethod
    def of(
        cls, run: ResolvedRun, model: Any, work: TrainingWork, static: StaticMemory, spec: DeviceSpec | None = None
    ) -> MemoryEstimate:
        """Trace forward and backward passes of the model on the meta device."""
        how = {"accumulated": run.layout.accumulate > 1, "gpu": run.on_gpu}
        # The micro-batch with the most memory depends on the memory per token and label, measured on the longest one.
        batch = work.heaviest(trace_activation_memory(model, work.batch, **how))
        activations = trace_activation_memory(model, batch, **how)
        program = 0 if run.on_gpu else _program(run.config)
        own = [MemoryItem("Python, libraries and rows", program)] if program else []
        fixed = (*own, *static.parts())
        return cls(batch, activations, how["accumulated"], program, fixed, run.layout.ranks, run.on_gpu, spec)

    def peak(self, activations: ActivationMemory) -> int:
        """Return the peak memory of a step."""
        held = sum(part.bytes for part in self.fixed if not (part.host and self.gpu))
        gradients = sum(part.bytes for part in self.fixed if part.name == "gradients")
        # Gradients are allocated as activations are freed: the trace counts both, unless the gradients existed before.
        return max(held, held + activations.peak - (0 if self.accumulated else gradients))

    def overheads(self, activations: ActivationMemory) -> tuple[MemoryItem, ...]:
        """Return what a GPU's memory holds besides tensors; nothing for a CPU."""
        return gpu_overheads(self.ranks, self.spec, activations.peak) if self.gpu else ()

    @property
    def context(self) -> int:
        """Bytes of a GPU's memory that are in use before the first tensor."""
        return CUDA_CONTEXT if self.gpu else 0

    def needed(self, activations: ActivationMemory) -> int:
        """Return the memory that the device must have for a step."""
        return self.peak(activations) + sum(item.bytes for item in self.overheads(activations))

    def largest_micro_batch(self, model: Any, memory: int) -> int:
        """Return the largest micro-batch, in rows, that fits into so many bytes; 0 if none does."""

        def needed(rows: int) -> int:
            batch = _of_rows(self.batch, rows)
            return self.needed(trace_activation_memory(model, batch, accumulated=self.accumulated, gpu=self.gpu))

        one, two = needed(1), needed(2)
        # Every further row needs about as much memory as the second one; the head's part may grow otherwise.
        each = max(1, two - one)
        most = 0 if one > memory else 1 + (memory - one) // each
        while most > 1 and (taken := needed(most)) > memory:
            most -= max(1, (taken - memory) * (most - 1) // (taken - one))  # by what a row takes on average
        return most


def _of_rows(batch: BatchShape, rows: int) -> BatchShape:
    return dataclasses.replace(batch, rows=rows, labelled=max(1, batch.labelled * rows // batch.rows))


def _program(config: RunConfig) -> int:
    """Return the resident memory of this process, without weights, after importing all of the run's libraries."""
    names = ["subspace.run", "deepspeed", "transformers.modeling_utils", "accelerate"]
    names += ["torch._inductor.lowering"]  # imported by DeepSpeed when its engine starts
    names += ["bitsandbytes"] if config.model.quantize != "none" else []
    names += ["torch.utils.tensorboard"] if "tensorboard" in config.train.trackers else []
    for name in names:
        importlib.import_module(name)
    return resident_memory()


def _seconds(
    run: ResolvedRun, model: Any, static: StaticMemory, work: TrainingWork, tokens: int | None, on: PlannedDevice | None
) -> tuple[float, float] | None:
    """Return the estimated range of the run's time; None for a GPU of unknown speed or data of unknown size."""
    if not (tokens and work.steps):
        return None
    config, processes = run.config, run.layout.ranks
    recomputed = config.model.gradient_checkpointing
    products = matrix_work(model, tokens, recomputed=recomputed)
    if on is None:
        return seconds_here(products, getattr(torch, config.model.dtype), run.device, processes)
    if on.spec is None:
        return None
    micro_batches = work.steps * run.layout.accumulate
    moved = static.moved_by_a_pass(getattr(torch, config.model.dtype).itemsize)
    return seconds_on(on.spec, products, config.model.dtype, moved, micro_batches, processes, recomputed=recomputed)


def format_bytes(count: int) -> str:
    """Return a number of bytes in MB or GB."""
    return f"{count / 1e9:,.2f} GB" if count >= 10**9 else f"{count / 1e6:,.1f} MB"


def format_time(seconds: float) -> str:
    """Return a time in the largest unit of which it has two."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"
