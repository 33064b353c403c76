"""Time training steps of this project and of HF PEFT with the HF Trainer, alternating.

    python -m tests.bench.bench_training --steps 4 --rounds 4
    python -m tests.bench.bench_training --frozen --dropout 0 --steps 12
    python -m tests.bench.bench_training --sides subspace packed lean compiled
    python -m tests.bench.bench_training --stages
    python -m tests.bench.bench_training --by-step zero1x1 zero2x1 --steps 12
    python -m tests.bench.bench_training --curves 20 --batch 4

All train LoRA (r 32, alpha 64, dropout as given, on q, k, v, up and down) on SmolLM2-135M, on the same rows of the
commonsense mixture with the same prompt, AdamW, loss on the answer. In each round, every side does a block of steps in
a process of its own, after a step that does not count: so each has the memory to itself, and as its users have it.
Printed are the medians over rounds of non-padding tokens a second, and ratios taken round by round.

The sides: ``subspace`` is this project by default; ``packed`` and ``compiled`` are the same with data.packing and
train.compile, ``lean`` without train.keep_memory; ``masked`` has a mask of its padding, though the model needs none;
``casts`` rounds each adapter's tensors by itself and shares no products; ``peft`` is HF PEFT with the HF Trainer as its
examples set them up.
``--frozen`` alternates, step by step in one process, this project's steps with the frozen model's own forward and
input-gradient pass on the same batches; ``--by-step`` alternates two sides in that way. ``--stages`` times ZeRO 1, 2
and 3 with one and two processes. ``--curves`` trains this project and PEFT, with two seeds of dropout each and all from
the same factors, on the same rows in the same steps, and compares their losses.

Absolute figures depend on the machine; the ratios are what to read. ``--clock cpu`` counts processor time instead, of
all processes together: for a machine that has other work.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from subspace.adapters.inject import adapters, inject, trained_parameters
from subspace.common.host_memory import manage_malloc, resident_memory, set_malloc_trim
from subspace.common.paths import REPOSITORY
from subspace.data.config import DataConfig
from subspace.data.dataset import open_data
from subspace.data.sampler import StepPlan, shard_batch
from subspace.distributed.collectives import all_reduce_host, all_reduce_sum, rank, shutdown, world_size
from subspace.distributed.deepspeed_config import compute_batch_layout, resolve_deepspeed_config
from subspace.distributed.engine import init_distributed, init_engine
from subspace.distributed.launcher import free_port
from subspace.models.config import ModelConfig
from subspace.models.lm_head import SummedLoss
from subspace.models.loading import open_model, open_tokenizer
from subspace.models.padding import needs_padding_mask
from subspace.models.prepare import model_folder
from subspace.training.acceleration import compile_layers
from subspace.training.config import TrainConfig
from subspace.training.optimizers import parameter_groups

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
RATE = 3e-4


@dataclass
class Block:
    """What a block of steps came to; memory is the most that the first process held, in MiB."""

    tokens: int
    seconds: float
    memory: int
    losses: list[float]


Run = Callable[[range], tuple[int, list[float]]]  # the steps of the plan to the tokens read and the losses


def main() -> None:
    """Run what was asked for and print the figures."""
    manage_malloc()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="steps of a block")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--rows", type=int, default=2000, help="rows of the mixture to draw from")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sides", nargs="+", default=["subspace", "lean", "peft"], choices=SIDES)
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--curves", type=int, default=0, help="steps of loss curves to compare")
    parser.add_argument("--frozen", action="store_true", help="compare with the frozen model's own passes")
    alone = [name for name in SIDES if not name.endswith("x2")]
    parser.add_argument("--by-step", nargs=2, choices=alone, help="alternate the steps of two sides in one process")
    parser.add_argument("--lean", action="store_true", help="for --frozen: without train.keep_memory")
    parser.add_argument(
        "--same-kernels", action="store_true", help="for --frozen: with this project's attention and norms"
    )
    parser.add_argument("--stages", action="store_true", help="time ZeRO 1, 2 and 3, with one and two processes")
    parser.add_argument("--block", type=int, help=argparse.SUPPRESS)  # of a process for one side
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.block is not None:
        measure(options)
        return
    if options.stages:
        options.sides = [f"zero{stage}x{ranks}" for ranks in (1, 2) for stage in (1, 2, 3)]
    by_step = options.frozen or options.by_step
    report = curves(options) if options.curves else step_by_step(options) if by_step else speeds(options)
    print(json.dumps({"batch": options.batch, "dropout": options.dropout, "clock": options.clock, **report}, indent=2))


def speeds(options: Any) -> dict[str, Any]:
    """Alternate the sides; return tokens a second and the speed of the first over each of the others."""
    blocks: dict[str, list[Block]] = {name: [] for name in options.sides}
    for number, name in itertools.product(range(options.rounds), options.sides):
        block = in_a_process(name, block=number)
        blocks[name].append(block)
        print(f"round {number}  {name:<12} {block.tokens / block.seconds:8.1f} tok/s  {block.memory} MiB", flush=True)
    per_token = {name: [block.seconds / block.tokens for block in done] for name, done in blocks.items()}
    first = options.sides[0]
    ratios = {name: np.divide(values, per_token[first]) for name, values in per_token.items() if name != first}
    return {
        "tokens_per_second": {name: round(1 / statistics.median(values), 1) for name, values in per_token.items()},
        "most_memory_mib": {name: max(block.memory for block in done) for name, done in blocks.items()},
        f"speed_of_{first}_over": {
            name: f"{np.median(values):.3f} ({values.min():.3f} to {values.max():.3f})"
            for name, values in ratios.items()
        },
    }


def step_by_step(options: Any) -> dict[str, Any]:
    """Alternate the steps of two sides in this process; return the time of the first over that of the second."""
    warnings.simplefilter("ignore")
    options.rounds = 1
    if options.frozen:
        sides = [subspace_side(options, keep_memory=not options.lean), frozen_side(options)]
    else:
        sides = [SIDES[name](options) for name in options.by_step]
    _, _, rows, plan = material(options, group_by_length=True)
    longest = max(range(1, len(plan)), key=lambda step: max(rows.train.lengths[plan[step]]))
    for step in (0, longest):  # warm up, and let the heap grow to what it will be
        for run in sides:
            run(range(step, step + 1))
    times = np.zeros((options.steps, 2))
    for step in range(options.steps):
        for side in (0, 1) if step % 2 else (1, 0):  # they take turns in going first
            began = now(options.clock)
            sides[side](range(step + 1, step + 2))
            times[step, side] = now(options.clock) - began
    ratios = np.divide(*times.T)
    return {
        "time_over_the_other": f"{np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})",
        "time_of_all_steps_over_the_other": round(float(np.divide(*times.sum(axis=0))), 3),
    }


def curves(options: Any) -> dict[str, Any]:
    """Train on the same rows in the same steps; return how far the losses are from each other."""
    found = {}
    for name, seed in itertools.product(("subspace", "peft-alike"), (0, 1)):
        found[f"{name}, seed {seed}"] = in_a_process(name, block=0, seed=seed).losses
        print(f"{name}, seed {seed}:", *(f"{loss:.4f}" for loss in found[f"{name}, seed {seed}"]), flush=True)
    pairs = itertools.combinations(found, 2)
    return {
        "mean_loss": {name: round(float(np.mean(losses)), 4) for name, losses in found.items()},
        "mean_difference_of_a_step": {
            f"{a} / {b}": f"{np.abs(np.subtract(found[a], found[b])).mean():.2g}" for a, b in pairs
        },
    }


def in_a_process(side: str, **own: int) -> Block:
    """Let a side do a block in its own process, or several."""
    ranks = int(side.partition("x")[2]) if side.startswith("zero") else 1
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    start = [sys.executable, *(launch if ranks > 1 else []), "-m", "tests.bench.bench_training"]
    told = [*sys.argv[1:], "--sides", side, *(word for key, value in own.items() for word in (f"--{key}", str(value)))]
    done = subprocess.run([*start, *told], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return Block(**json.loads(done.stdout.splitlines()[-1]))


def measure(options: Any) -> None:
    """Do a block of steps of one side, and print it."""
    warnings.simplefilter("ignore")
    run = SIDES[options.sides[0]](options)
    steps = range(options.curves)
    if not steps:
        run(range(1))
        steps = range(1 + options.block * options.steps, 1 + (options.block + 1) * options.steps)
    torch.manual_seed(options.seed)
    began = now(options.clock)
    tokens, losses = run(steps)
    block = Block(tokens, now(options.clock) - began, resident_memory("VmHWM") >> 20, losses)
    if rank() == 0:
        print(json.dumps(asdict(block)), flush=True)
    shutdown()


def now(clock: str) -> float:
    """Return seconds by the clock, of all processes together where it is the processors'."""
    if clock == "wall":
        return time.perf_counter()
    return float(all_reduce_sum(torch.tensor(time.process_time(), dtype=torch.float64)))


def material(options: Any, *, group_by_length: bool) -> tuple[ModelConfig, Any, Any, StepPlan]:
    """Return the model to open, its tokenizer, the rows, and which of them each step takes."""
    model = ModelConfig(path="smollm2-135m", dtype=options.dtype)
    tokenizer = open_tokenizer(model)
    data = open_data(DataConfig(mixture="commonsense", limit=options.rows), tokenizer, 0)
    steps = options.curves or 1 + options.rounds * options.steps
    lengths = data.train.lengths
    return (
        model,
        tokenizer,
        data,
        StepPlan(lengths, batch=options.batch, steps=steps, seed=0, group_by_length=group_by_length),
    )


def subspace_side(
    options: Any,
    *,
    stage: int = 0,
    packing: bool = False,
    keep_memory: bool = True,
    compiled: bool = False,
    casts: bool = False,
    masked: bool = False,
) -> Run:
    """This project: its engine, its loss, its batches."""
    init_distributed()
    ranks = world_size()
    opened, _, rows, plan = material(options, group_by_length=not packing)
    data = replace(rows, packing=packing)
    config = TrainConfig(batch_size=options.batch, learning_rate=RATE, warmup_steps=0, schedule="constant")
    model = open_model(opened)
    inject(model, "lora", {"r": 32, "alpha": 64, "dropout": options.dropout}, targets=TARGETS)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), fused=True)
    trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
    raw, layout = {"zero_optimization": {"stage": stage}}, compute_batch_layout(options.batch, None, ranks)
    resolved = resolve_deepspeed_config(raw, layout, dtype=options.dtype, clip=1.0)
    settings = resolved.for_adapters(trained=trained, largest=0).settings
    engine = init_engine(model, settings, optimizer, lambda step: 1.0)
    engine.train()
    if compiled:
        compile_layers(model)
    if casts:
        for adapter in adapters(model).values():
            adapter.copies.detach()
    if keep_memory:
        set_malloc_trim(False)
    loss_of = SummedLoss(engine, masks_padding=masked or needs_padding_mask(engine))

    def run(steps: range) -> tuple[int, list[float]]:
        tokens, losses = 0, []
        for step in steps:
            batch = data.batch(shard_batch(plan[step], rank(), ranks, 1)[0])
            labelled, seen = all_reduce_host([batch.num_labelled, batch.num_tokens])
            loss = loss_of(batch) * ranks / labelled
            engine.backward(loss)
            engine.step()
            tokens += seen
            losses.append(float(all_reduce_sum(loss.detach())) / ranks)
        return tokens, losses

    return run


def peft_side(options: Any, *, alike: bool = False) -> Run:
    """HF PEFT and the HF Trainer, as its examples set them up, with the published recipe's settings.

    ``alike``, its factors start as this project's, and its steps are fed the same rows.
    """
    import peft
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    opened, tokenizer, data, plan = material(options, group_by_length=alike)
    bare = open_plainly(opened)
    config = peft.LoraConfig(
        r=32, lora_alpha=64, lora_dropout=options.dropout, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    adapted: Any = peft.get_peft_model(bare, config)
    if alike:
        for name, adapter in inject(open_model(opened), "lora", {"r": 32}, targets=TARGETS).items():
            theirs = adapted.get_submodule(f"base_model.model.{name}.lora_A.default")
            theirs.weight.data.copy_(adapter.own_tensors()["A"])
    # One optimizer for all blocks, where each Trainer would make its own.
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    folder = tempfile.mkdtemp(prefix="subspace-bench-")

    def fed(number: int) -> dict[str, Any]:
        ids, start, *_ = data.train[number]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * start + ids[start:]}

    def run(steps: range) -> tuple[int, list[float]]:
        chosen = [fed(i) for step in steps for i in plan[step]]
        arguments = TrainingArguments(
            output_dir=str(Path(folder)),
            per_device_train_batch_size=options.batch,
            max_steps=len(steps),
            learning_rate=RATE,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="sequential",
            seed=options.seed,
        )
        trainer = Trainer(
            model=adapted,
            args=arguments,
            train_dataset=chosen,
            data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
            optimizers=(optimizer, schedule),
        )
        trainer.train()
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        return sum(len(row["input_ids"]) for row in chosen), losses

    return run


def open_plainly(config: ModelConfig) -> Any:
    """Open the model by transformers, which changes neither its kernels nor how memory is freed in this process."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder(config.path), dtype=getattr(torch, config.dtype))


def frozen_side(options: Any) -> Run:
    """The frozen model's forward pass and its gradient with respect to the input, on this project's batches.

    The model is as transformers opens it, or with ``--same-kernels`` as this project does.
    """
    opened, _, data, plan = material(options, group_by_length=True)
    model = (open_model(opened) if options.same_kernels else open_plainly(opened)).train()
    model.requires_grad_(False)
    assert not adapters(model)
    if not options.lean:
        set_malloc_trim(False)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    loss_of = SummedLoss(model, masks_padding=needs_padding_mask(model))

    def run(steps: range) -> tuple[int, list[float]]:
        tokens, losses = 0, []
        for step in steps:
            batch = data.batch(plan[step])
            labelled, seen = batch.num_labelled, batch.num_tokens
            loss = loss_of(batch) / labelled
            loss.backward()
            tokens += seen
            losses.append(loss.item())
        return tokens, losses

    return run


SIDES: dict[str, Callable[[Any], Run]] = {
    "subspace": subspace_side,
    "packed": partial(subspace_side, packing=True),
    "lean": partial(subspace_side, keep_memory=False),
    "compiled": partial(subspace_side, compiled=True),
    "masked": partial(subspace_side, masked=True),
    "casts": partial(subspace_side, casts=True),
    "peft": peft_side,
    "peft-alike": partial(peft_side, alike=True),
    **{f"zero{stage}x{ranks}": partial(subspace_side, stage=stage) for stage in (1, 2, 3) for ranks in (1, 2)},
}


if __name__ == "__main__":
    main()
