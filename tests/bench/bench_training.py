"""Time training steps of this project and of HF PEFT with the HF Trainer, alternating in one process.

    python -m tests.bench.bench_training --steps 6 --rounds 4

Both train LoRA (r 32, alpha 64, dropout as given, on q, k, v, up and down) on SmolLM2-135M in float32, on the same
rows of the commonsense mixture with the same prompt, 16 rows a step, AdamW, loss on the answer. Each round runs a
block of steps of one, then of the other. Printed are the medians over rounds of non-padding tokens a second, their
ratio, and the mean losses. Besides, the time of the frozen model's own forward and input-gradient pass on the same
batches.

Absolute figures depend on the machine; the ratio is what to read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from subspace.batches import DataConfig, StepPlan, open_data
from subspace.engine import fill, lay_out, start_engine, start_processes
from subspace.inject import inject, trained_parameters
from subspace.loss import summed_loss
from subspace.model import ModelConfig, open_model, open_tokenizer
from subspace.train import TrainConfig, count_tokens, parameter_groups

MODEL = ModelConfig(path="smollm2-135m", dtype="float32")
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
BATCH = 16


def main() -> None:
    """Run the rounds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="steps of a block")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2000, help="rows of the mixture to draw from")
    parser.add_argument("--dropout", type=float, default=0.05)
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    start_processes()
    tokenizer = open_tokenizer(MODEL)
    data = open_data(DataConfig(mixture="commonsense", limit=options.rows), tokenizer, 0)
    sides: dict[str, Callable[[int, int], tuple[int, float, float]]] = {
        "subspace": subspace_side(data, options),
        "peft + Trainer": peft_side(data, tokenizer, options),
        "frozen model": frozen_side(data, options),
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for block in range(options.rounds + 1):
        for name, run in sides.items():
            tokens, seconds, loss = run(block, options.steps)
            if block:  # the first block warms up
                speeds[name].append(tokens / seconds)
                losses[name].append(loss)
                print(f"round {block}  {name:<15} {tokens / seconds:8.0f} tok/s  loss {loss:.4f}", flush=True)

    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(
        json.dumps(
            {
                "dropout": options.dropout,
                "tokens_per_second": {name: round(value) for name, value in medians.items()},
                "mean_loss": {name: round(statistics.mean(values), 4) for name, values in losses.items()},
                "subspace_over_peft": round(medians["subspace"] / medians["peft + Trainer"], 2),
                "time_over_frozen_model": round(medians["frozen model"] / medians["subspace"], 2),
            },
            indent=2,
        )
    )


def plan_of(data: Any, steps: int, *, group_by_length: bool) -> StepPlan:
    """Draw the steps of all blocks."""
    return StepPlan(data.train.lengths, batch=BATCH, steps=steps, epochs=1.0, seed=0, group_by_length=group_by_length)


def subspace_side(data: Any, options: Any) -> Callable[[int, int], tuple[int, float, float]]:
    """This project: its engine, its loss, its batches."""
    config = TrainConfig(batch=BATCH, learning_rate=3e-4, warmup_steps=0, schedule="constant")
    model = open_model(MODEL)
    inject(model, "lora", {"r": 32, "alpha": 64, "dropout": options.dropout}, targets=TARGETS)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), fused=True)
    engine_config, _ = fill({"zero_optimization": {"stage": 0}}, lay_out(BATCH, None, 1), dtype="float32", clip=1.0)
    engine = start_engine(model, engine_config, optimizer, lambda step: 1.0)
    plan = plan_of(data, (options.rounds + 1) * options.steps, group_by_length=True)

    def run(block: int, steps: int) -> tuple[int, float, float]:
        engine.train()
        tokens, total, began = 0, 0.0, time.perf_counter()
        for step in range(block * steps, (block + 1) * steps):
            batch = data.batch(plan[step])
            labelled, seen = count_tokens([batch])
            loss = summed_loss(engine, batch) / labelled
            engine.backward(loss)
            engine.step()
            tokens, total = tokens + seen, total + loss.item()
        return tokens, time.perf_counter() - began, total / steps

    return run


def peft_side(data: Any, tokenizer: Any, options: Any) -> Callable[[int, int], tuple[int, float, float]]:
    """HF PEFT and the HF Trainer, as its examples set them up, with the published recipe's settings."""
    import peft
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = open_model(MODEL)
    config = peft.LoraConfig(
        r=32, lora_alpha=64, lora_dropout=options.dropout, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    rows = []
    for number in range(len(data.train)):
        row = data.train[number]
        labels = [-100] * row.answer_start + list(row.input_ids[row.answer_start :])
        rows.append({"input_ids": list(row.input_ids), "attention_mask": [1] * len(row.input_ids), "labels": labels})
    folder = tempfile.mkdtemp(prefix="subspace-bench-")
    plan = plan_of(data, (options.rounds + 1) * options.steps, group_by_length=False)

    def run(block: int, steps: int) -> tuple[int, float, float]:
        chosen = [rows[i] for step in range(block * steps, (block + 1) * steps) for i in plan[step]]
        arguments = TrainingArguments(
            output_dir=str(Path(folder)),
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            logging_steps=steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(
            model=adapted,
            args=arguments,
            train_dataset=chosen,
            data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
        )
        began = time.perf_counter()
        outcome = trainer.train()
        return sum(len(r["input_ids"]) for r in chosen), time.perf_counter() - began, outcome.training_loss

    return run


def frozen_side(data: Any, options: Any) -> Callable[[int, int], tuple[int, float, float]]:
    """The frozen model's forward pass and its gradient with respect to the input, on this project's batches."""
    model = open_model(MODEL).train()
    assert not trained_parameters(model)
    plan = plan_of(data, (options.rounds + 1) * options.steps, group_by_length=True)
    embedding = model.get_input_embeddings()

    def run(block: int, steps: int) -> tuple[int, float, float]:
        tokens, total, began = 0, 0.0, time.perf_counter()
        handle = embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        for step in range(block * steps, (block + 1) * steps):
            batch = data.batch(plan[step])
            labelled, seen = count_tokens([batch])
            loss = summed_loss(model, batch) / labelled
            loss.backward()  # type: ignore[no-untyped-call]
            tokens, total = tokens + seen, total + loss.item()
        handle.remove()
        return tokens, time.perf_counter() - began, total / steps

    return run


if __name__ == "__main__":
    main()
