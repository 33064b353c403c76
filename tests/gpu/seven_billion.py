"""Step 3: a model of LLaMA-7B's shape with random weights, LoRA r 32 on q, k, v, up and down, 16 rows of 128 tokens."""

from __future__ import annotations

import functools
import gc
import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from subspace.distributed.engine import init_distributed
from subspace.training.acceleration import compile_layers
from tests.bench import bench_7b
from tests.bench.bench_7b import Rows, Step
from tests.bench.random_model import write_random
from tests.gpu.cases import Check, Figures, LeftOut, Missed
from tests.helpers.material import logged, write_rows

#: In place of the true shape's values.
TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SPACE = 15e9  # bytes


def write_7b(check: Check) -> None:
    """Write the model's files."""
    check.case("write", _write, check)


def _write(check: Check) -> Figures:
    folder = check.folder("write-7b") / "model"
    free = shutil.disk_usage(check.out).free
    if not check.tiny and free < SPACE:
        raise Missed(f"{free / 1e9:.0f} GB are free at {check.out}, and the model takes 13.5. Name a folder: --out DIR")
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    written = write_random(folder.with_suffix(".partial"), "llama-7b", **(TINY if check.tiny else {}))
    seconds = time.perf_counter() - began
    folder.with_suffix(".partial").rename(folder)
    return {"GB": written / 1e9, "seconds": seconds, "GB/s": written / 1e9 / seconds}


def model_7b(check: Check) -> Path:
    """Return the model's folder; write it if it is not there (any more)."""
    folder = check.folder("write-7b") / "model"
    if not folder.exists():
        _write(check)
    return folder


# Steps.


def nf4(check: Check) -> None:
    """Load in NF4; frozen passes; this project's steps; where their time goes."""
    _ours(check, "nf4")


def bf16(check: Check) -> None:
    """Do the same in bfloat16."""
    _ours(check, "none")


def nf4_peft(check: Check) -> None:
    """HF PEFT's steps on an NF4 base."""
    _theirs(check, "nf4")


def bf16_peft(check: Check) -> None:
    """HF PEFT's steps on a bfloat16 base."""
    _theirs(check, "none")


def _ours(check: Check, quantize: str) -> None:
    init_distributed()
    opened = functools.cache(lambda: bench_7b.ours(str(model_7b(check)), quantize, checkpointing=False))

    def load() -> Figures:
        model_7b(check)
        return _load(opened)

    def frozen() -> Figures:
        with bench_7b.frozen(opened()[0]) as step:
            return steps(check, step)

    started = functools.cache(lambda: opened()[1]())
    check.case("load", load)
    check.case("frozen: forward, input gradient", frozen)
    check.case("subspace", lambda: steps(check, started()))
    check.case("subspace, profile", lambda: profile(check, started(), _batch(check)))

    def compiled() -> Figures:
        compile_layers(opened()[0])
        began = time.perf_counter()
        float(started()(_batch(check)))
        return {"seconds of the first step": time.perf_counter() - began, **steps(check, started())}

    check.case("subspace, compiled", compiled)


def _theirs(check: Check, quantize: str) -> None:
    try:
        import peft  # noqa: F401
    except ImportError:

        def missing() -> Figures:
            raise LeftOut("peft is not installed")

        check.case("PEFT", missing)
        return
    opened = functools.cache(lambda: bench_7b.theirs(str(model_7b(check)), quantize, checkpointing=False))
    started = functools.cache(lambda: opened()[1]())
    model_7b(check)
    check.case("PEFT, load", _load, opened)
    check.case("PEFT", lambda: steps(check, started()))
    check.case("PEFT, profile", lambda: profile(check, started(), _batch(check)))


def _load(opened: Any) -> Figures:
    bench_7b.forget_most()
    began = time.perf_counter()
    opened()
    seconds = time.perf_counter() - began
    gc.collect()
    return {"seconds": seconds, "GB at most": bench_7b.held(most=True) / 1e9, "GB": bench_7b.held() / 1e9}


def _batch(check: Check) -> Rows:
    return bench_7b.rows(384, *((2, 16) if check.tiny else (16, 128)))  # words that the tokenizer has, too


def steps(check: Check, step: Step) -> Figures:
    """Time 20 steps of the same batch after three that do not count."""
    batch, count = _batch(check), 2 if check.tiny else 20
    bench_7b.forget_most()
    losses = [float(step(batch)) for _ in range(3)]
    began = time.perf_counter()
    for _ in range(count):
        last = step(batch)
    losses.append(float(last))  # waits for the device
    seconds = (time.perf_counter() - began) / count
    if not all(abs(loss) < 1e4 for loss in losses):
        raise Missed("a loss is not finite", losses=losses)
    return {
        "tokens/s": batch["input_ids"].numel() / seconds,
        "seconds": seconds,
        "GB at most": bench_7b.held(most=True) / 1e9,
        "first loss": losses[0],
        "last loss": losses[-1],
    }


def profile(check: Check, step: Step, batch: Rows, count: int = 3) -> Figures:
    """Count the kernels of a step and the share of its time in which none runs; on a CPU, operators and no share."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.on_gpu else [])]
    float(step(batch))
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(count):
            last = step(batch)
        float(last)
        seconds = time.perf_counter() - began
    kind = torch.autograd.DeviceType.CUDA if check.on_gpu else torch.autograd.DeviceType.CPU  # type: ignore[attr-defined]
    recorded: Any = profiler.events()
    # An annotation, as of an optimizer's step, spans kernels and is none.
    events = [e for e in recorded if e.device_type == kind and not getattr(e, "is_user_annotation", False)]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    times: Counter[str] = Counter()
    for event in events:
        times[event.name[:60]] += event.time_range.elapsed_us()
    figures: Figures = {"kernels a step": round(len(events) / count), "profiled seconds": seconds / count}
    figures["idle share"] = max(0.0, 1 - busy(spans) / 1e6 / seconds) if check.on_gpu else "-"
    figures["most time (ms a step)"] = [f"{us / 1000 / count:.2f} {name}" for name, us in times.most_common(12)]
    return figures


def busy(spans: list[tuple[float, float]]) -> float:
    """Return how long at least one of some spans of time, sorted by their beginnings, lasts."""
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


# The plan, and the loop as users run it.


def plan(check: Check) -> None:
    """Hold `subspace plan` to three steps of a run, and time the whole loop."""
    for quantize in ("nf4", "none"):
        check.case(f"plan --verify, {quantize}", _verify, check, quantize)
    for quantize in ("nf4", "none"):
        check.case(f"subspace train, {quantize}", _loop, check, quantize)


def _configuration(check: Check, quantize: str) -> tuple[str, list[str]]:
    model = model_7b(check)
    rows, tokens = (2, 32) if check.tiny else (16, 128)
    data = check.root / "data.jsonl"
    if not data.exists():
        write_rows(data, rows=64 if check.tiny else 512, words=(tokens // 4, tokens // 3))
    file = check.root / "run.yaml"
    file.write_text(
        f"model: {{path: {model}, dtype: bfloat16}}\n"
        f"method: {{name: lora, r: 32, alpha: 64}}\ntargets: {bench_7b.TARGETS}\n"
        f"data: {{mixture: {data}, prompt: none, validation: 0, max_length: {tokens}}}\n"
        f"train: {{batch_size: {rows}, micro_batch_size: {rows}, warmup_steps: 1, trackers: [], save_every: 0}}\n"
        f"engine: {check.root}/zero0.json\n"
    )
    (check.root / "zero0.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    return str(file), [f"model.quantize={quantize}", f"runs={check.root}"]


def _verify(check: Check, quantize: str) -> Figures:
    from subspace.planning.verification import verify_plan

    file, settings = _configuration(check, quantize)
    found = verify_plan(file, [*settings, "train.save_every=3"])
    apart = found.predicted / found.peak - 1
    figures = {
        "GB told": found.predicted / 1e9,
        "GB measured": found.peak / 1e9,
        "told over measured": apart,
        "MB of a checkpoint told": found.plan.checkpoint / 1e6,
        "measured": found.checkpoint / 1e6,
        "seconds": found.seconds,
    }
    if not check.tiny and abs(apart) > 0.15:
        raise Missed("told and measured are more than 15 % apart", **figures)
    return figures


def _loop(check: Check, quantize: str) -> Figures:
    from subspace.config import read_config
    from subspace.run import train_run

    file, settings = _configuration(check, quantize)
    name = f"loop-{quantize}"
    shutil.rmtree(check.root / name, ignore_errors=True)
    folder = train_run(read_config(file, [*settings, f"name={name}", f"train.steps={4 if check.tiny else 30}"]))
    figures = {
        "tokens/s of the last ten steps": logged(folder, "tokens_per_second")[-1],
        "GB at most": logged(folder, "peak_memory")[-1] / 1e9,
        "last loss": logged(folder)[-1],
    }
    gc.collect()
    if check.on_gpu:
        torch.cuda.empty_cache()
    return figures
