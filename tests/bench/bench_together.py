"""Time steps of runs that are trained together, and of the same runs one after the other, alternating.

    python -m tests.bench.bench_together
    python -m tests.bench.bench_together --rows 4 --tokens 64
    python -m tests.bench.bench_together --methods lora dora ssb prefix

All train on SmolLM2-135M in float32, r 8, answers of six tokens, in one process. Of each number of runs N, rounds
alternate a step of all N together with a step of each alone. Printed are the seconds of a step (the processor's; on a
GPU, those of the clock), the median of the rounds and the least, the ratio round by round, and the memory that all of
them take (resident; on a GPU, the most that was allocated).
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
from subspace.common.host_memory import manage_malloc, set_malloc_trim
from subspace.data.collate import IGNORE_INDEX, Batch
from subspace.distributed.device import device, on_gpu
from subspace.models.config import ModelConfig
from subspace.models.lm_head import SummedLoss
from subspace.models.loading import open_model
from tests.bench.bench_7b import forget_most, held

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
        (self.loss(batch.to(device())) / batch.num_labelled).backward()  # type: ignore[no-untyped-call]
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
    found = shared.gradients(range(len(able)), chosen, weights, device())
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


def clock() -> float:
    """Return seconds: the processor's, or on a GPU the clock's as soon as it has ended its work."""
    if not on_gpu():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(base: Any, methods: Sequence[str], rounds: int, shape: tuple[int, int]) -> dict[str, float]:
    """Return the seconds of a step of a run of each method, together and alone, and the gain."""
    forget_most()
    runs = [Run(base, method, number) for number, method in enumerate(methods)]
    shared = OnePass(share_weights(base), [run.model for run in runs if can_batch(run.model)])
    batches = [make_batch(*shape, base.config.vocab_size) for _ in runs]
    together, alone = list[float](), list[float]()
    for number in range(rounds + 1):
        began = clock()
        step_together(runs, shared, batches)
        between = clock()
        for run, batch in zip(runs, batches, strict=True):
            run.step(batch)
        if number:
            together.append(between - began)
            alone.append(clock() - between)
    return {
        "runs": len(runs),
        "together, s a step": statistics.median(together),
        "least, together": min(together),
        "alone, s a step": statistics.median(alone),
        "least, alone": min(alone),
        "times as fast": statistics.median(b / a for a, b in zip(together, alone, strict=True)),
        "MB": held(most=on_gpu()) / 1e6,
    }


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
    print("| runs | together, s a step (least) | alone, s a step (least) | times as fast | MB |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for count in options.runs:
        methods = [options.methods[number % len(options.methods)] for number in range(count)]
        found = measure(base, methods, options.rounds, (options.rows, options.tokens))
        print("| {:.0f} | {:.3f} ({:.3f}) | {:.3f} ({:.3f}) | {:.2f} | {:,.0f} |".format(*found.values()), flush=True)


if __name__ == "__main__":
    main()
