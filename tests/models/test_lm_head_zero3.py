"""An adapter on the output head, trained with the loss in parts: the same on one process and spread over two."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from subspace.common.paths import REPOSITORY
from tests.helpers.material import logged, make_material, saved_adapter, worker_command

pytestmark = pytest.mark.processes

METHODS = ("lora", "dora")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one process at stage 0 with the loss at once, and two at stage 3 with it in parts."""
    root = tmp_path_factory.mktemp("head")
    file = make_material(root)
    for ranks, stage, at_once in ((1, 0, 1 << 24), (2, 3, 384 * 20)):
        settings = [f"runs={root}", f"engine={root}/zero{stage}.json", 'targets=["lm_head","q_proj"]']
        settings += ["data.loss_on=all", "train.learning_rate=0.005", "train.validate_every=6"]
        jobs = [(str(file), [*settings, f"name={ranks}-{method}", f"method={method}"]) for method in METHODS]
        (root / "jobs.json").write_text(json.dumps(jobs))
        command = worker_command(ranks, "zero_losses", str(root / "jobs.json"), str(at_once))
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-6000:]
    return root


@pytest.mark.parametrize("method", METHODS)
def test_the_head_is_trained_in_parts_under_zero_3(runs: Path, method: str) -> None:
    one, two = (torch.tensor(logged(runs / f"{ranks}-{method}"), dtype=torch.float64) for ranks in (1, 2))
    assert one[-1] < one[0] - 0.05
    assert (one - two).abs().max() < 1e-5
    expected, found = (saved_adapter(runs / f"{ranks}-{method}") for ranks in (1, 2))
    assert any("lm_head" in name for name in expected)
    assert expected.keys() == found.keys()
    assert all(torch.allclose(tensor, found[name], atol=2e-4) for name, tensor in expected.items())
