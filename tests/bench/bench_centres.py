"""Best learning rates of methods on a toy model, beside what the gradient at the start foretells of them.

    python -m tests.bench.bench_centres
    python -m tests.bench.bench_centres lora full liera

60 steps of 8 rows of a made-up language at nine rates from 1e-4 to 1, and the loss on 120 others. ``by l1`` and ``by
l2`` are how many half decades above the best rate of lora a method's would lie by the sum of its absolute gradients and
by their Euclidean norm; ``best`` is where it lies.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from subspace.adapters.inject import adapters, inject, trained_parameters
from subspace.models.lm_head import summed_loss
from tests.helpers.material import WORDS
from tests.helpers.tiny_models import bpe_tokenizer, tiny_llama

RATES = [10 ** (-4 + k / 2) for k in range(9)]
STEPS, BATCH, HELD_OUT = 60, 8, 120
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
METHODS = [
    "full",
    "liera",
    "spectral",
    "pissa",
    "dora",
    "trilora",
    "flora",
    "moslora",
    "milora",
    "ssb",
    "ia3",
    "bitfit",
]
METHODS += ["ssl", "prefix", "series", "adalora", "svdiff", "prompt"]
LOW_RANK = {"liera", "pissa", "dora", "lora", "trilora", "flora", "moslora", "milora", "adalora"}
OWN_SITES = ("full", "prefix", "series", "prompt")


def make_rows() -> list[list[int]]:
    """Return rows of a Markov chain over a few words, so that there is something to learn."""
    draw, tokenizer = torch.Generator().manual_seed(0), bpe_tokenizer()
    chances = torch.softmax(3 * torch.randn(len(WORDS), len(WORDS), generator=draw), 1)

    def row() -> list[int]:
        word = int(torch.randint(len(WORDS), (1,), generator=draw))
        words = [word]
        for _ in range(15):
            words.append(int(torch.multinomial(chances[words[-1]], 1, generator=draw)))
        ids: list[int] = tokenizer(" ".join(WORDS[i] for i in words))["input_ids"]
        return ids[:32]

    return [row() for _ in range(STEPS * BATCH + HELD_OUT)]


def collate(rows: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
        labels[number, 1 : len(row)] = torch.tensor(row[1:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def mean_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return summed_loss(model, batch) / int((batch["labels"] != -100).sum())


def made(method: str) -> tuple[Any, list[Tensor]]:
    model = tiny_llama().requires_grad_(False)
    fields = {"r": 4} if method in LOW_RANK else {}
    inject(model, method, fields, targets=None if method in OWN_SITES else TARGETS, seed=0)
    return model, list(trained_parameters(model).values())


def norms(method: str, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Return the sum of the absolute gradients before the first step, and their Euclidean norm."""
    model, parameters = made(method)
    mean_loss(model, batch).backward()  # type: ignore[no-untyped-call]
    found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    return float(found.abs().sum()), float(found.norm())


def trained_loss(
    method: str, rate: float, batches: list[dict[str, Tensor]], held_out: list[dict[str, Tensor]]
) -> float:
    """Return the held-out loss after training at a rate, which rises for six steps and falls to 0."""
    model, parameters = made(method)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0)
    model.train()
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 6) * (1 - step / STEPS)
        optimizer.zero_grad()
        mean_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for adapter in adapters(model).values():
            adapter.clear_cache()
    model.eval()
    with torch.no_grad():
        return sum(float(mean_loss(model, batch)) for batch in held_out) / len(held_out)


def main() -> None:
    """Print a line for each method."""
    rows = make_rows()
    batches = [collate(rows[begin : begin + BATCH]) for begin in range(0, len(rows), BATCH)]
    batches, held_out = batches[:STEPS], batches[STEPS:]
    reference: tuple[float, float, float] | None = None
    for method in ["lora", *(name for name in sys.argv[1:] or METHODS if name != "lora")]:
        l1, l2 = norms(method, batches[0])
        losses = [trained_loss(method, rate, batches, held_out) for rate in RATES]
        best = min(range(len(RATES)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
        reference = reference or (l1, l2, best)
        by = [2 * math.log10(reference[0] / l1), 2 * math.log10(reference[1] / l2)]
        told = f"by l1 {by[0]:+.1f}, by l2 {by[1]:+.1f}, best {best - reference[2]:+.0f}"
        print(f"{method:<10} {told}  {' '.join(f'{loss:.3f}' for loss in losses)}", flush=True)


if __name__ == "__main__":
    main()
