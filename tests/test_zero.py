"""The loop under DeepSpeed's engine: every method, ZeRO 0 to 3, one and two processes, one loss curve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from subspace import launcher
from subspace.method import methods
from subspace.paths import REPOSITORY
from tests.tiny import tiny_llama

pytestmark = pytest.mark.processes

STEPS = 20
STAGES = (0, 1, 2, 3)
WORDS = "the man reads a book to his children while she swims across a lake with some soap and water".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train all of them: one process at stage 0 as the reference, two processes at each stage."""
    root = tmp_path_factory.mktemp("zero")
    tiny_llama(root / "model")
    generator = torch.Generator().manual_seed(0)
    with (root / "data.jsonl").open("w") as file:
        for _ in range(64):
            n = int(torch.randint(3, 16, (1,), generator=generator))
            words = [WORDS[int(i)] for i in torch.randint(len(WORDS), (n,), generator=generator)]
            file.write(json.dumps({"instruction": " ".join(words[:-2]), "input": "", "output": " ".join(words[-2:])}) + "\n")
    for stage in STAGES:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
        (root / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    (root / "run.yaml").write_text(
        f"runs: {root}\n"
        f"model: {{path: {root / 'model'}, dtype: float32}}\n"
        f"data: {{mixture: {root / 'data.jsonl'}, prompt: none, max_length: 64, validation: 8}}\n"
        f"train: {{steps: {STEPS}, batch: 8, learning_rate: 0.01, warmup_steps: 2, log_every: 1, validate_every: 10, trackers: []}}\n"
    )

    def arguments(name: str, stage: int, method: str, *more: str) -> tuple[str, list[str]]:
        overrides = [f"name={name}-{method}", f"engine={root / f'zero{stage}.json'}", f"method={method}", *more]
        return str(root / "run.yaml"), overrides

    launch([arguments("one", 0, method) for method in methods()], root, ranks=1)
    two = [arguments(f"two-zero{stage}", stage, method, "train.micro_batch=2") for stage in STAGES for method in methods()]
    launch(two, root, ranks=2)
    return root


def launch(wanted: list[Any], root: Path, ranks: int) -> None:
    jobs = root / f"{ranks}.json"
    jobs.write_text(json.dumps(wanted))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--master_port", str(launcher.free_port()), "--", str(REPOSITORY / "tests" / "zero_worker.py"), str(jobs)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def losses(folder: Path, key: str = "loss") -> Tensor:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return torch.tensor([line[key] for line in lines if key in line], dtype=torch.float64)


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("stage", STAGES)
def test_loss_curve_is_that_of_one_process(runs: Path, method: str, stage: int) -> None:
    one, two = losses(runs / f"one-{method}"), losses(runs / f"two-zero{stage}-{method}")
    assert len(one) == STEPS
    assert one[-1] < one[0] - 0.05  # it learns, so there is something to agree on
    assert (one - two).abs().max() < 1e-5


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("stage", STAGES)
def test_validation_and_adapter_agree_too(runs: Path, method: str, stage: int) -> None:
    one, two = runs / f"one-{method}", runs / f"two-zero{stage}-{method}"
    assert torch.allclose(losses(one, "validation_loss"), losses(two, "validation_loss"), atol=1e-5)
    expected, found = (load_file(run / "adapter" / "adapter.safetensors") for run in (one, two))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.allclose(tensor, found[name], atol=2e-4), name
