"""Scores a tiny model in the processes that a launcher started; tests/test_evaluate.py reads what it leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from subspace import evaluate
from subspace.distributed import leave
from subspace.engine import start_engine, start_processes
from subspace.model import ModelConfig, open_model, open_tokenizer
from subspace.prepare import task_items
from subspace.results import TaskResult
from tests.items import items
from tests.tiny import bpe_tokenizer, tiny_llama

SETTINGS = {"tasks": "piqa,hellaswag", "limit": 17, "batch_tokens": 300}
PREPARED = task_items


def score(
    folder: Path, protocol: str, stage: int, count: int = 21, model_name: str = "tiny", **settings: Any
) -> list[TaskResult]:
    """Score a model on ``count`` made-up items a task, or on real ones if 0; under an engine where ``stage`` is 3."""
    import datasets

    def made(name: str, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_list(items(name, count))

    if model_name == "tiny":
        model, tokenizer = tiny_llama().requires_grad_(False), bpe_tokenizer()
    else:
        which = ModelConfig(path=model_name, dtype="float32")
        model, tokenizer = open_model(which), open_tokenizer(which)
    if stage == 3:
        model.lm_head.requires_grad_(True)  # an engine wants something to train
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        engine = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        engine |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
        optimizer = torch.optim.AdamW(model.lm_head.parameters())
        model = start_engine(model, engine, optimizer, lambda step: 1.0).module
    config = evaluate.EvaluateConfig(protocol=protocol, **{**SETTINGS, **settings})
    with mock.patch.object(evaluate, "task_items", made if count else PREPARED):
        return evaluate.evaluate(model, tokenizer, config, folder, model_name=model_name)


def main() -> None:
    """Score in each of the ways that the first argument lists; every rank leaves what it was given back."""
    start_processes(minutes=5)
    for folder, protocol, stage, settings in json.loads(sys.argv[1]):
        results = score(Path(folder), protocol, stage, **settings)
        rank = torch.distributed.get_rank()
        values = [[result.task, result.metrics, result.fingerprint] for result in results]
        Path(folder, f"rank{rank}.json").write_text(json.dumps(values))
    leave()


if __name__ == "__main__":
    main()
