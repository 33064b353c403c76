"""A tiny model, a few rows and a configuration: all that a training run needs, in a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from subspace.adapters.serialization import TENSORS
from subspace.common.paths import REPOSITORY
from tests.helpers.tiny_models import tiny_llama

WORDS = [
    "the",
    "man",
    "reads",
    "a",
    "book",
    "to",
    "his",
    "children",
    "while",
    "she",
    "swims",
    "across",
    "lake",
    "with",
    "soap",
]
STAGES = (0, 1, 2, 3)


def worker_command(ranks: int, worker: str, *arguments: str) -> list[str]:
    """Return the command that runs a script of tests/workers in so many processes."""
    folder = REPOSITORY / "tests" / "workers"
    return [sys.executable, str(folder / "start_ranks.py"), str(ranks), str(folder / f"{worker}.py"), *arguments]


def make_material(root: Path, rows: int = 48) -> Path:
    """Fill a folder and return its ``run.yaml``; ``zero0.json`` to ``zero3.json`` lie beside it."""
    tiny_llama(root / "model")
    write_rows(root / "data.jsonl", rows)
    for stage in STAGES:
        # Without the threshold, everything in a model as small as this would be held whole at stage 3.
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
        (root / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    (root / "run.yaml").write_text(
        f"model: {{path: {root / 'model'}, dtype: float32}}\n"
        "method: {name: lora, r: 4}\n"
        f"data: {{mixture: {root / 'data.jsonl'}, prompt: none, max_length: 64, validation: 8}}\n"
        "train: {steps: 6, batch_size: 8, learning_rate: 0.01, warmup_steps: 1, log_every: 1, trackers: []}\n"
        "evaluate: {tasks: openbookqa}\n"
        f"engine: {root / 'zero0.json'}\n"
    )
    return root / "run.yaml"


def write_rows(file: Path, rows: int, words: tuple[int, int] = (4, 16)) -> None:
    """Write so many rows, each of at least ``words[0]`` and fewer than ``words[1]`` words, three of them the answer."""
    generator = torch.Generator().manual_seed(0)
    with file.open("w") as opened:
        for _ in range(rows):
            count = int(torch.randint(*words, (1,), generator=generator))
            chosen = [WORDS[int(i)] for i in torch.randint(len(WORDS), (count,), generator=generator)]
            opened.write(json.dumps({"instruction": " ".join(chosen[:-3]), "output": " ".join(chosen[-3:])}) + "\n")


def logged(folder: Path, key: str = "loss") -> list[float]:
    """Return what a run logged under a key."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def saved_adapter(folder: Path) -> dict[str, Tensor]:
    """Return the tensors that a run saved."""
    return load_file(folder / "adapter" / TENSORS)
