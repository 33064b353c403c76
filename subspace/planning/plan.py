"""What a run will take, told before anything is loaded: memory by part, disk, steps, time.

No figure is fitted to a run. Weights are counted on the meta device (:mod:`subspace.holdings`), activations by a step
without numbers (:mod:`subspace.rehearsal`), and what is there besides tensors by looking at this process, which by
then has imported what the run will, opened the rows, built model and adapters, and gone through a step.
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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from subspace import config as config_module
from subspace.adapters.inject import inject, trained_parameters
from subspace.adapters.registry import resolve_method
from subspace.common.host_memory import resident_memory
from subspace.config import RunConfig
from subspace.data import tasks as tasks_module
from subspace.data.collate import IGNORE_INDEX
from subspace.data.dataset import Data, Fed, is_encoded, open_data
from subspace.data.sampler import StepPlan, draw_steps, shard_batch
from subspace.distributed.deepspeed_config import (
    OFFLOAD,
    BatchLayout,
    compute_batch_layout,
    read_engine_file,
    resolve_deepspeed_config,
)
from subspace.errors import RunFailed, UserError
from subspace.models.loading import device, open_shape, open_tokenizer
from subspace.planning.activation_memory import ActivationMemory, BatchShape, trace_activation_memory
from subspace.planning.static_memory import MemoryItem, StaticMemory
from subspace.training.compatibility import check_packing
from subspace.training.config import STATE_BYTES
from subspace.training.optimizers import check_optimizer

#: Tokens of an answer and its end, where the data is not there to be looked at.
ANSWER = 16
#: The slowest step over the time of its matrix products alone: the range that is told reaches that far.
SLOWEST = 5.0
VERIFIED_STEPS = 3


@dataclass(frozen=True)
class TrainingWork:
    """What is fed: the longest micro-batch, and how much of it there is.

    Attributes:
        data: the rows, where they are encoded already. They stay open as the run will have them, because what was
            read of their files counts as held.
        micro_batches: which rows each micro-batch of the first process has.
    """

    batch: BatchShape
    lengths: str
    steps: int | None
    tokens: int | None
    data: Data | None = None
    micro_batches: npt.NDArray[np.int64] | None = None

    @classmethod
    def of(cls, config: RunConfig, layout: BatchLayout) -> TrainingWork:
        """Look at the data where it is encoded already; else take the longest rows that the run allows."""
        try:
            tokenizer = open_tokenizer(config.model)
            fed = partial(
                draw_steps,
                batch=layout.batch,
                epochs=config.train.epochs,
                steps=config.train.steps,
                seed=config.train.seed,
            )
            known = is_encoded(config.data, tokenizer, config.train.seed, fed)
        except UserError:
            known = False
        if known:
            return cls._seen(config, layout, tokenizer, fed)
        longest = -(-config.data.max_length // 8) * 8
        columns = longest - 1 if config.data.loss_on == "all" else min(ANSWER, longest - 1)
        rows = None
        if not config.data.mixture.endswith((".json", ".jsonl", ".parquet")):
            rows = tasks_module.find_mixture(config.data.mixture).rows
        rows = min(rows or config.data.limit or 0, config.data.limit or rows or 0)
        steps = config.train.steps or (int(config.train.epochs * rows / layout.batch) or None)
        batch = BatchShape(layout.micro_batch, longest, columns, layout.micro_batch * columns)
        return cls(batch, "data.max_length", steps, None)

    @classmethod
    def _seen(cls, config: RunConfig, layout: BatchLayout, tokenizer: Any, fed: Fed) -> TrainingWork:
        data = open_data(config.data, tokenizer, config.train.seed, fed=fed)
        lengths = data.train.lengths
        steps = StepPlan(
            lengths,
            batch=layout.batch,
            epochs=config.train.epochs,
            steps=config.train.steps,
            seed=config.train.seed,
            group_by_length=config.data.group_by_length,
        )
        rows = [steps[number] for number in range(len(steps))]
        parts = [part for step in rows for part in shard_batch(step, 0, layout.ranks, layout.accumulate)]
        micro_batches = np.array(parts)
        longest = _shape(data, parts[int(_fed(data, micro_batches).argmax())])
        tokens = int(lengths[np.array(rows)].sum())
        return cls(longest, "the heaviest of the data", len(steps), tokens, data, micro_batches)

    def heaviest(self, footprint: ActivationMemory) -> BatchShape:
        """Return the micro-batch that takes the most memory, going by what tokens and labels take of the longest."""
        if self.data is None or self.micro_batches is None:
            return self.batch
        lengths = self.data.train.lengths[self.micro_batches]
        labels = lengths - 1 if self.data.loss_on == "all" else self.data.train.answers[self.micro_batches]
        each = (footprint.activations + footprint.backward) / (self.batch.rows * self.batch.tokens)
        taken = each * _fed(self.data, self.micro_batches) + footprint.head / self.batch.labelled * labels.sum(axis=1)
        return _shape(self.data, self.micro_batches[int(taken.argmax())].tolist())


def _fed(data: Data, micro_batches: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the tokens of each micro-batch: with padding, or as many as its rows have where they are packed."""
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
    """What a run takes. Bytes are those of one device, or of one process on a CPU."""

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
        """Yield what a user reads."""
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
            told = f"a micro-batch of {most} fits" if most else "not even a micro-batch of 1 fits"
            yield f"into {_size(self.memory)}: {told}"
        yield f"on disk: adapter {_size(self.adapter)}, a checkpoint {_size(self.checkpoint)}"
        if self.steps:
            yield f"{self.steps:,} steps" + (f", {self.all_tokens:,} tokens" if self.all_tokens else "")
        if self.seconds:
            yield f"time here: {_time(self.seconds[0])} to {_time(self.seconds[1])}"


def build_plan(config: RunConfig, *, processes: int = 1, memory: int | None = None) -> Plan:
    """Tell what a run takes. No weight is read and no process started.

    Args:
        config: the run.
        processes: how many it will have.
        memory: bytes of a device into which the largest micro-batch is to fit.
    """
    layout = compute_batch_layout(config.train.batch, config.train.micro_batch, processes)
    if config.data.packing:
        check_packing([resolve_method(part.name)[0] for part in config.method])
    raw = read_engine_file(config.engine)
    gpu = device().type == "cuda"
    work = TrainingWork.of(config, layout)
    model: Any = open_shape(config.model)
    for part in config.method:
        inject(model, part.name, part.settings, targets=part.targets, patterns=part.patterns, start=False)
    trained = trained_parameters(model)
    count = sum(tensor.numel() for tensor in trained.values())
    largest = max(tensor.numel() for tensor in trained.values())
    engine, _ = resolve_deepspeed_config(
        raw, layout, dtype=config.model.dtype, clip=config.train.clip, largest_adapter=largest, trained=count
    )
    if engine["fp16"]["enabled"] or engine["bf16"]["enabled"]:
        for tensor in trained.values():
            tensor.data = tensor.data.to(getattr(torch, config.model.dtype))
    check_optimizer(config.train.optimizer, gpu=gpu, offloaded=OFFLOAD in engine["zero_optimization"])
    holdings = StaticMemory(model, engine, processes, STATE_BYTES[config.train.optimizer], gpu=gpu)
    accumulated = layout.accumulate > 1
    batch = work.heaviest(trace_activation_memory(model, work.batch, accumulated=accumulated))
    footprint = trace_activation_memory(model, batch, accumulated=accumulated)
    seconds = _seconds(model, config, work.tokens, processes) if work.tokens else None
    program = 0 if gpu else _program(config)
    fixed = [*([MemoryItem("Python, libraries and rows", program)] if program else []), *holdings.parts()]
    held = sum(part.bytes for part in fixed if not (part.host and gpu))
    gradients = sum(part.bytes for part in fixed if part.name == "gradients")

    def peak(footprint: ActivationMemory) -> int:
        # Gradients come as activations go: a rehearsal counts both, unless they were there before.
        return max(held, held + footprint.peak - (0 if accumulated else gradients))

    found = Plan(
        model=config.model.path,
        method=config.methods,
        device=str(device()),
        processes=processes,
        stage=holdings.stage,
        micro_batch=layout.micro_batch,
        accumulate=layout.accumulate,
        tokens=batch.tokens,
        lengths=work.lengths,
        trained=count,
        parts=(
            *fixed,
            MemoryItem("activations kept for the backward pass", footprint.activations),
            MemoryItem("output head and loss", footprint.head),
            MemoryItem("more in the backward pass", footprint.backward),
        ),
        loading=program + holdings.loading(),
        peak=peak(footprint),
        checkpoint=4 * count + holdings.state,
        adapter=4 * count,
        steps=work.steps,
        all_tokens=work.tokens,
        seconds=seconds,
        keeps=config.train.keep_memory and not gpu,
    )
    if memory is None:
        return found
    # What a row takes more is the same for every row.
    one, two = (peak(trace_activation_memory(model, _of_rows(batch, rows), accumulated=accumulated)) for rows in (1, 2))
    most = 0 if one > memory else 1 + int((memory - one) // max(1, two - one))
    return dataclasses.replace(found, memory=memory, largest_micro_batch=most)


def _of_rows(batch: BatchShape, rows: int) -> BatchShape:
    return dataclasses.replace(batch, rows=rows, labelled=max(1, batch.labelled * rows // batch.rows))


def _program(config: RunConfig) -> int:
    """Return what this process holds, which has no numbers, with all imported that the run will."""
    names = ["subspace.run", "deepspeed", "transformers.modeling_utils", "accelerate"]
    names += ["torch._inductor.lowering"]  # which DeepSpeed imports as its engine starts
    names += ["bitsandbytes"] if config.model.quantize != "none" else []
    names += ["torch.utils.tensorboard"] if "tensorboard" in config.train.trackers else []
    for name in names:
        importlib.import_module(name)
    return resident_memory()


def _seconds(model: Any, config: RunConfig, tokens: int, processes: int) -> tuple[float, float]:
    """Return a range of the run's time on this machine, from the time of its matrix products alone."""
    where, dtype = device(), getattr(torch, config.model.dtype)
    linears = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features"))
    # Forward, the gradient of the input, and once more forward where activations are computed again.
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
    """A plan of three steps, and what three steps took."""

    plan: Plan
    peak: int
    checkpoint: int
    seconds: float

    @property
    def predicted(self) -> int:
        """The most that was told, while loading or in a step."""
        return max(self.plan.loading, self.plan.peak)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        measured = {"peak": self.peak, "checkpoint": self.checkpoint, "seconds": self.seconds}
        return {"predicted": self.predicted, "measured": measured, "plan": self.plan.as_dict()}

    def lines(self) -> Iterator[str]:
        """Yield what a user reads."""
        kind = "resident" if self.plan.device == "cpu" else "allocated"
        yield f"{VERIFIED_STEPS} steps of {self.plan.micro_batch} x {self.plan.tokens} tokens, run here:"
        yield f"  {'':<30} {'predicted':>10} {'measured':>10}"
        apart = 100 * (self.predicted / self.peak - 1)
        yield f"  {f'most memory, {kind}':<30} {_size(self.predicted):>10} {_size(self.peak):>10}  ({apart:+.1f} %)"
        yield f"  {'a checkpoint':<30} {_size(self.plan.checkpoint):>10} {_size(self.checkpoint):>10}"
        if self.plan.seconds:
            told = " to ".join(map(_time, self.plan.seconds))
            yield f"  {'time':<30} {told:>10}, measured {_time(self.seconds)}"


def verify_plan(file: str, settings: Sequence[str], *, processes: int = 1) -> VerifiedPlan:
    """Run three steps of a run in fresh processes, and return them beside their plan."""
    with tempfile.TemporaryDirectory(prefix="subspace-plan-") as folder:
        few = [*settings, f"train.steps={VERIFIED_STEPS}", f"runs={folder}", "name=verify"]
        told = build_plan(config_module.read_config(file, few), processes=processes)
        command = [sys.executable, "-m", "subspace", "train", file, *few, "--processes", str(processes)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            last = done.stdout.strip().splitlines()[-1:] or ["it said nothing"]
            raise RunFailed(f"the three steps were not trained: {last[0]}")
        run = Path(folder) / "verify"
        outcome = json.loads((run / "environment.json").read_text())["outcome"]
        saved = next((run / "checkpoints").iterdir())
        size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
    return VerifiedPlan(told, outcome["peak_memory"], size, outcome["seconds"])


def parse_size(text: str) -> int:
    """Return the bytes that ``24GB`` or ``80 GiB`` stand for."""
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
