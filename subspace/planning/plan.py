"""Estimate of a run's memory by part, disk, steps and time before anything is loaded.

No figure is fitted to a run. Weights are counted on the meta device (:mod:`subspace.planning.static_memory`),
activations by tracing a step there (:mod:`subspace.planning.activation_memory`), and memory besides tensors as the
resident memory of this process, which by then has imported the run's libraries, opened the rows, built model and
adapters, and traced a step.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from subspace.adapters.inject import inject, trained_parameters
from subspace.common.host_memory import resident_memory
from subspace.config import RunConfig, read_config
from subspace.data.collate import IGNORE_INDEX
from subspace.data.dataset import Data, is_encoded, open_data
from subspace.data.sampler import shard_batch
from subspace.data.tasks import find_mixture
from subspace.distributed.deepspeed_config import BatchLayout
from subspace.distributed.device import device
from subspace.errors import RunFailed, UserError
from subspace.models.loading import open_shape, open_tokenizer
from subspace.planning.activation_memory import ActivationMemory, BatchShape, trace_activation_memory
from subspace.planning.static_memory import MemoryItem, StaticMemory
from subspace.resolve import ResolvedRun, resolve_run, step_draw, step_plan
from subspace.training.config import STATE_BYTES

#: Assumed tokens of an answer with its EOS, where the data is not prepared.
ANSWER = 16
#: Upper end of the estimated time range, as a multiple of the time of the matrix products alone.
SLOWEST = 5.0
VERIFIED_STEPS = 3


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
            known = is_encoded(config.data, tokenizer, config.train.seed, draw)
        except UserError:
            known = False
        if known:
            return cls._from_data(config, layout, open_data(config.data, tokenizer, config.train.seed, fed=draw))
        longest = -(-config.data.max_length // 8) * 8
        columns = longest - 1 if config.data.loss_on == "all" else min(ANSWER, longest - 1)
        rows = None
        if not config.data.mixture.endswith((".json", ".jsonl", ".parquet")):
            rows = find_mixture(config.data.mixture).rows
        rows = min(rows or config.data.limit or 0, config.data.limit or rows or 0)
        steps = config.train.steps or (int(config.train.epochs * rows / layout.batch) or None)
        batch = BatchShape(layout.micro_batch, longest, columns, layout.micro_batch * columns)
        return cls(batch, "data.max_length", steps, None)

    @classmethod
    def _from_data(cls, config: RunConfig, layout: BatchLayout, data: Data) -> TrainingWork:
        lengths, steps = data.train.lengths, step_plan(data, config, layout)
        rows = [steps[number] for number in range(len(steps))]
        parts = [part for step in rows for part in shard_batch(step, 0, layout.ranks, layout.accumulate)]
        micro_batches = np.array(parts)
        longest = _shape(data, parts[int(_fed(data, micro_batches).argmax())])
        tokens = int(lengths[np.array(rows)].sum())
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
    targets = batch["labels"][:, 1:] != IGNORE_INDEX
    count, tokens = batch["input_ids"].shape
    return BatchShape(count, tokens, int(targets.any(dim=0).sum()), int(targets.sum()))


@dataclass(frozen=True)
class Plan:
    """The estimated requirements of a run. Bytes are per device, or per process on a CPU."""

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
    checkpoint: int
    adapter: int
    steps: int | None
    all_tokens: int | None
    seconds: tuple[float, float] | None
    keeps: bool = False  # freed memory stays with the process
    largest_micro_batch: int | None = None
    memory: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)

    def lines(self) -> Iterator[str]:
        """Yield the report's lines."""
        many = f"{self.processes} processes, " if self.processes > 1 else ""
        yield f"{self.method} on {self.model}: {self.trained:,} trained numbers; {many}ZeRO {self.stage}, {self.device}"
        yield f"micro-batch of {self.micro_batch} x {self.tokens} tokens ({self.lengths}), {self.accumulate} a step"
        yield ""
        for part in self.parts:
            yield f"  {part.name:<42} {_size(part.bytes):>10}{'  in host memory' if part.host else ''}"
        yield f"  {'most while loading':<42} {_size(self.loading):>10}"
        yield f"  {'most in a step':<42} {_size(self.peak):>10}"
        if self.keeps:
            yield "  train.keep_memory: freed memory stays with the process, a quarter to a half more in trials"
        yield ""
        if self.memory:
            most = self.largest_micro_batch
            answer = f"a micro-batch of {most} fits" if most else "not even a micro-batch of 1 fits"
            yield f"into {_size(self.memory)}: {answer}"
        yield f"on disk: adapter {_size(self.adapter)}, a checkpoint {_size(self.checkpoint)}"
        if self.steps:
            yield f"{self.steps:,} steps" + (f", {self.all_tokens:,} tokens" if self.all_tokens else "")
        if self.seconds:
            yield f"time here: {_time(self.seconds[0])} to {_time(self.seconds[1])}"


def build_plan(config: RunConfig, *, processes: int = 1, memory: int | None = None) -> Plan:
    """Return the estimate of a run. No weights are read and no processes started.

    Args:
        config: the run.
        processes: the number of processes of the run.
        memory: memory of a device in bytes, for which to find the largest micro-batch.

    Raises:
        UserError: settings that training would reject before loading anything.
    """
    run = resolve_run(config, processes, device())
    work = TrainingWork.of(config, run.layout)
    model, run = _shape_with_adapters(run)
    static = StaticMemory(model, run.engine.settings, processes, STATE_BYTES[config.train.optimizer], gpu=run.on_gpu)
    estimate = MemoryEstimate.of(run, model, work, static)
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
        trained=run.trained,
        parts=(*estimate.fixed, *estimate.activations.parts()),
        loading=estimate.program + static.loading(),
        peak=estimate.peak(estimate.activations),
        checkpoint=4 * run.trained + static.state,
        adapter=4 * run.trained,
        steps=work.steps,
        all_tokens=work.tokens,
        seconds=_seconds(model, config, work.tokens, processes) if work.tokens else None,
        keeps=config.train.keep_memory and not run.on_gpu,
        largest_micro_batch=None if memory is None else estimate.largest_micro_batch(model, memory),
        memory=memory,
    )


def _shape_with_adapters(run: ResolvedRun) -> tuple[Any, ResolvedRun]:
    """Return the model with adapters on the meta device, and the run with its final engine settings."""
    config = run.config
    model: Any = open_shape(config.model)
    for part in config.method:
        inject(model, part.adapter_class, part.settings, targets=part.targets, patterns=part.patterns, start=False)
    run = run.with_adapters(model)
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
        gpu: whether the device is a GPU, so that parts in CPU memory do not count.
    """

    batch: BatchShape
    activations: ActivationMemory
    accumulated: bool
    program: int
    fixed: tuple[MemoryItem, ...]
    gpu: bool

    @classmethod
    def of(cls, run: ResolvedRun, model: Any, work: TrainingWork, static: StaticMemory) -> MemoryEstimate:
        """Trace forward and backward passes of the model on the meta device."""
        accumulated = run.layout.accumulate > 1
        # The micro-batch with the most memory depends on the memory per token and label, measured on the longest one.
        batch = work.heaviest(trace_activation_memory(model, work.batch, accumulated=accumulated))
        activations = trace_activation_memory(model, batch, accumulated=accumulated)
        program = 0 if run.on_gpu else _program(run.config)
        own = [MemoryItem("Python, libraries and rows", program)] if program else []
        return cls(batch, activations, accumulated, program, (*own, *static.parts()), run.on_gpu)

    def peak(self, activations: ActivationMemory) -> int:
        """Return the peak memory of a step."""
        held = sum(part.bytes for part in self.fixed if not (part.host and self.gpu))
        gradients = sum(part.bytes for part in self.fixed if part.name == "gradients")
        # Gradients are allocated as activations are freed: the trace counts both, unless the gradients existed before.
        return max(held, held + activations.peak - (0 if self.accumulated else gradients))

    def largest_micro_batch(self, model: Any, memory: int) -> int:
        """Return the largest micro-batch, in rows, that fits into so many bytes; 0 if none does."""
        one, two = (
            self.peak(trace_activation_memory(model, _of_rows(self.batch, rows), accumulated=self.accumulated))
            for rows in (1, 2)
        )
        # Every further row needs as much memory as the second one.
        return 0 if one > memory else 1 + int((memory - one) // max(1, two - one))


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


def _seconds(model: Any, config: RunConfig, tokens: int, processes: int) -> tuple[float, float]:
    """Return the estimated range of the run's time on this machine, from a timing of its matrix products."""
    where, dtype = device(), getattr(torch, config.model.dtype)
    linears = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features"))
    # Forward, the gradient of the input, and a second forward if activations are recomputed.
    work = 2.0 * linears * tokens * (3 if config.model.gradient_checkpointing else 2)
    width = 1024
    a, b = (torch.randn(width, width, device=where).to(dtype) for _ in "ab")
    done, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < 0.3:
        (a @ b).sum().item()
        done += 1
    speed = done * 2 * width**3 / spent * (processes if where.type == "cuda" else 1)
    return work / speed, SLOWEST * work / speed


@dataclass(frozen=True)
class VerifiedPlan:
    """The estimate for three steps beside the measured values."""

    plan: Plan
    peak: int
    checkpoint: int
    seconds: float

    @property
    def predicted(self) -> int:
        """The estimated peak, while loading or in a step."""
        return max(self.plan.loading, self.plan.peak)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        measured = {"peak": self.peak, "checkpoint": self.checkpoint, "seconds": self.seconds}
        return {"predicted": self.predicted, "measured": measured, "plan": self.plan.as_dict()}

    def lines(self) -> Iterator[str]:
        """Yield the report's lines."""
        kind = "resident" if self.plan.device == "cpu" else "allocated"
        yield f"{VERIFIED_STEPS} steps of {self.plan.micro_batch} x {self.plan.tokens} tokens, run here:"
        yield f"  {'':<30} {'predicted':>10} {'measured':>10}"
        apart = 100 * (self.predicted / self.peak - 1)
        yield f"  {f'most memory, {kind}':<30} {_size(self.predicted):>10} {_size(self.peak):>10}  ({apart:+.1f} %)"
        yield f"  {'a checkpoint':<30} {_size(self.plan.checkpoint):>10} {_size(self.checkpoint):>10}"
        if self.plan.seconds:
            estimated = " to ".join(map(_time, self.plan.seconds))
            yield f"  {'time':<30} {estimated:>10}, measured {_time(self.seconds)}"


def verify_plan(file: str, settings: Sequence[str], *, processes: int = 1) -> VerifiedPlan:
    """Run three steps of a run in new processes and return the measurements beside the estimate."""
    with tempfile.TemporaryDirectory(prefix="subspace-plan-") as folder:
        few = [*settings, f"train.steps={VERIFIED_STEPS}", f"runs={folder}", "name=verify"]
        plan = build_plan(read_config(file, few), processes=processes)
        command = [sys.executable, "-m", "subspace", "train", file, *few, "--processes", str(processes)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            last = done.stdout.strip().splitlines()[-1:] or ["it said nothing"]
            raise RunFailed(f"the three steps were not trained: {last[0]}")
        run = Path(folder) / "verify"
        outcome = json.loads((run / "environment.json").read_text())["outcome"]
        saved = next((run / "checkpoints").iterdir())
        size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
    return VerifiedPlan(plan, outcome["peak_memory"], size, outcome["seconds"])


def parse_size(text: str) -> int:
    """Return the number of bytes in a size such as ``24GB`` or ``80 GiB``."""
    number = text.lower().rstrip("gib ").strip()
    try:
        return int(float(number) * (2**30 if "i" in text.lower() else 10**9))
    except ValueError:
        raise UserError(f"--memory {text} was given, but it takes gigabytes, as 24GB or 80GiB") from None


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 10**9 else f"{count / 1e6:,.1f} MB"


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"
