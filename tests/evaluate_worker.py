"""Scores a tiny model in the processes that a launcher started; tests/test_evaluate.py reads what it leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from subspace import evaluate
from subspace.distributed import leave
from subspace.engine import start_engine, start_processes
from subspace.results import TaskResult
from tests.items import items
from tests.tiny import bpe_tokenizer, tiny_llama


def score(folder: Path, protocol: str, stage: int) -> list[TaskResult]:
    """Score the tiny model on made-up items of two tasks, under an engine where ``stage`` is 3."""
    import datasets

    vars(evaluate)["task_items"] = lambda name, split: datasets.Dataset.from_list(items(name, 21))
    model = tiny_llama().requires_grad_(False)
    if stage == 3:
        model.lm_head.requires_grad_(True)  # an engine wants something to train
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        settings |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
        optimizer = torch.optim.AdamW(model.lm_head.parameters())
        model = start_engine(model, settings, optimizer, lambda step: 1.0).module
    config = evaluate.EvaluateConfig(protocol=protocol, tasks="piqa,hellaswag", limit=17, batch_tokens=300)
    return evaluate.evaluate(model, bpe_tokenizer(), config, folder, model_name="tiny")


def main() -> None:
    """Score in each of the ways that the first argument lists; every rank leaves what it was given back."""
    start_processes(minutes=5)
    for folder, protocol, stage in json.loads(sys.argv[1]):
        results = score(Path(folder), protocol, stage)
        rank = torch.distributed.get_rank()
        values = [[result.task, result.metrics, result.fingerprint] for result in results]
        Path(folder, f"rank{rank}.json").write_text(json.dumps(values))
    leave()


if __name__ == "__main__":
    main()
