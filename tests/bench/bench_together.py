"""Time steps of runs that are trained together, and of the same runs one after the other, alternating.

    python -m tests.bench.bench_together
    python -m tests.bench.bench_together --rows 4 --tokens 64
    python -m tests.bench.bench_together --methods lora dora ssb prefix

All train on SmolLM2-135M in float32, r 8, answers of six tokens, in one process. Of each number of runs N, rounds
alternate a step of all N together with a step of each alone. Printed are the processor's seconds of a step, the median
of the rounds and the least, the ratio round by round, and the resident memory that all of them take.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from subspace.adapters.inject import inject, trained_parameters
from subspace.adapters.multi_adapter import OnePass, can_batch, share_weights
from subspace.common.host_memory import manage_malloc, resident_memory, set_malloc_trim
from subspace.data.collate import IGNORE_INDEX, Batch
from subspace.models.config import ModelConfig
from subspace.models.lm_head import SummedLoss
from subspace.models.loading import open_model

ANSWER = 6
SETTINGS = {"lora": {"r": 8}, "dora": {"r": 8}, "pissa": {"r": 8}}


class Run:
    """A run of the loop's work in a step: a pass, clipping and AdamW."""

    def __init__(self, base: Any, method: str, seed: int) -> None:
        self.model: Any = share_weights(base)
        inject(self.model, method, SETTINGS.get(method, {}), seed=seed)
        self.loss = SummedLoss(self.model.train(), masks_padding=False)
        self.trained = list(trained_parameters(self.model).values())
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

    def step(self, batch: Batch) -> None:
        """Train a step alone."""
        (self.loss(batch) / batch.num_labelled).backward()  # type: ignore[no-untyped-call]
        self.update()

    def update(self) -> None:
        """Take the gradients' step."""
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def step_together(runs: Sequence[Run], shared: OnePass, batches: Sequence[Batch]) -> None:
    """Train a step of each, in one pass; those whose adapters cannot share it have their own."""
    able = [number for number, run in enumerate(runs) if can_batch(run.model)]
    chosen = [batches[number] for number in able]
    weights = [1 / batch.num_labelled for batch in chosen]
    found = shared.gradients(range(len(able)), chosen, weights, torch.device("cpu"))
    for number, (_, gradients) in zip(able, found, strict=True):
        for parameter, gradient in zip(runs[number].trained, gradients, strict=True):
            parameter.grad = gradient
        runs[number].update()
    for number in set(range(len(runs))) - set(able):
        runs[number].step(batches[number])


def make_batch(rows: int, tokens: int, vocabulary: int) -> Batch:
    """Return rows of random tokens, the last six of which are the answer."""
    ids = torch.randint(2, vocabulary, (rows, tokens))
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    return Batch.from_labels({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})


def measure(base: Any, methods: Sequence[str], rounds: int, shape: tuple[int, int]) -> str:
    """Return a row of the table, for a run of each method."""
    runs = [Run(base, method, number) for number, method in enumerate(methods)]
    shared = OnePass(share_weights(base), [run.model for run in runs if can_batch(run.model)])
    batches = [make_batch(*shape, base.config.vocab_size) for _ in runs]
    together, alone = list[float](), list[float]()
    for number in range(rounds + 1):
        began = time.process_time()
        step_together(runs, shared, batches)
        between = time.process_time()
        for run, batch in zip(runs, batches, strict=True):
            run.step(batch)
        if number:
            together.append(between - began)
            alone.append(time.process_time() - between)
    gain = statistics.median(b / a for a, b in zip(together, alone, strict=True))
    figures = [f"{statistics.median(times):.2f} ({min(times):.2f})" for times in (together, alone)]
    memory = (resident_memory("VmRSS") or 0) / 1e6
    return f"| {len(runs)} | {' | '.join(figures)} | {gain:.2f} | {memory:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--methods", nargs="+", default=["lora"], help="taken in turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    manage_malloc()
    set_malloc_trim(False)
    base: Any = open_model(ModelConfig(path="smollm2-135m", dtype="float32"))
    print("| runs | together, s a step | alone, s a step | times as fast | resident, MB |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for count in options.runs:
        methods = [options.methods[number % len(options.methods)] for number in range(count)]
        print(measure(base, methods, options.rounds, (options.rows, options.tokens)), flush=True)


if __name__ == "__main__":
    main()
