"""Score a tiny model in the processes that a launcher started; evaluation/test_evaluate.py reads what it leaves."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from subspace.common.paths import REPOSITORY
from subspace.data import samples as samples_module
from subspace.distributed.collectives import shutdown
from subspace.distributed.deepspeed_config import resolve_deepspeed_config_for_inference
from subspace.distributed.engine import init_distributed, init_inference_engine
from subspace.evaluation import config as config_module
from subspace.evaluation import evaluate as evaluate_module
from subspace.evaluation.config import EvaluationSubject
from subspace.evaluation.results import TaskResult
from subspace.evaluation.subjects import evaluate_subjects
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model, open_tokenizer
from tests.helpers.items import items
from tests.helpers.tiny_models import bpe_tokenizer, tiny_llama

SETTINGS: dict[str, Any] = {"tasks": "piqa,hellaswag", "limit": 9, "batch_tokens": 300}
ZERO3 = str(REPOSITORY / "ds_configs" / "zero3.json")


def score(
    folder: Path, protocol: str, stage: int, count: int = 21, model_name: str = "tiny", **settings: Any
) -> list[TaskResult]:
    """Score a model on ``count`` made-up items a task, or on real ones if 0; under an engine where ``stage`` is 3."""
    if model_name == "tiny":
        model, tokenizer = tiny_llama().requires_grad_(False), bpe_tokenizer()
    else:
        which = ModelConfig(path=model_name, dtype="float32")
        model, tokenizer = open_model(which), open_tokenizer(which)
    if stage == 3:
        model = init_inference_engine(model, resolve_deepspeed_config_for_inference(ZERO3, "float32")).module
    config = config_module.EvaluateConfig(protocol=protocol, **{**SETTINGS, **settings})
    with made_items(count) if count else nullcontext():
        return evaluate_module.evaluate(model, tokenizer, config, folder, model_name=model_name)


@contextmanager
def made_items(count: int) -> Iterator[None]:
    """Let so many made-up items stand for those of every task."""
    import datasets

    def made(name: str, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_list(items(name, count))

    with mock.patch.object(samples_module, "task_items", made):
        yield


def score_subjects(folder: Path, protocol: str, stage: int, base: str, methods: list[str]) -> list[TaskResult]:
    """Score a saved model as it is and with saved adapters, on made-up items; spread over the processes at stage 3."""
    settings = {**SETTINGS, "engine": ZERO3 if stage == 3 else None}
    config = config_module.EvaluateConfig(protocol=protocol, **settings)
    model = ModelConfig(path=f"{base}/base", dtype="float32")
    subjects = [EvaluationSubject(model, config, folder / "base")]
    subjects += [EvaluationSubject(model, config, folder / name, Path(base, name), name) for name in methods]
    with made_items(21):
        return [result for results in evaluate_subjects(subjects) for result in results]


def main() -> None:
    """Score in each of the ways that the first argument lists; every rank leaves what it was given back."""
    init_distributed(minutes=5)
    for folder, protocol, stage, settings in json.loads(sys.argv[1]):
        results = (score_subjects if "methods" in settings else score)(Path(folder), protocol, stage, **settings)
        rank = torch.distributed.get_rank()
        values = [[result.task, result.metrics, result.fingerprint] for result in results]
        Path(folder, f"rank{rank}.json").write_text(json.dumps(values))
        gc.freeze()  # what is imported by now, so that the engines' full collections are short
    shutdown()


if __name__ == "__main__":
    main()
