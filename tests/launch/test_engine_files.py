"""The ready engine configurations: each trains, on two processes, as one process does without ZeRO."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace.common.paths import REPOSITORY
from tests.distributed.test_zero import losses
from tests.helpers.material import make_material
from tests.helpers.matrix import launch

FILES = sorted(file.stem for file in (REPOSITORY / "ds_configs").glob("*.json"))
#: What is written for more devices than a test has.
SMALLER = {"zero_hpz_partition_size": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ds")
    file = make_material(root)

    def job(name: str, engine: Path) -> tuple[str, str, list[str]]:
        return (
            "run",
            str(file),
            [
                f"runs={root}",
                f"name={name}",
                f"engine={engine}",
                "train.micro_batch_size=2",
                "train.steps=3",
            ],
        )

    launch([job("reference", root / "zero0.json")], root, ranks=1)
    jobs = []
    for name in FILES:
        engine: dict[str, Any] = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())
        zero = engine["zero_optimization"]
        zero |= {key: value for key, value in SMALLER.items() if key in zero}
        (root / f"{name}.json").write_text(json.dumps(engine))
        jobs.append(job(name, root / f"{name}.json"))
    launch(jobs, root, ranks=2)
    return root


@pytest.mark.processes
@pytest.mark.parametrize("name", FILES)
def test_a_ready_configuration_trains_alike(runs: Path, name: str) -> None:
    assert torch.allclose(losses(runs / name), losses(runs / "reference"), atol=1e-5)
    engine = json.loads((runs / name / "environment.json").read_text())["engine"]
    assert engine["train_micro_batch_size_per_gpu"] == 2
    assert "auto" not in json.dumps(engine)


def test_every_file_is_explained() -> None:
    explained = re.findall(r"^\| `([\w-]+)\.json`", (REPOSITORY / "ds_configs" / "README.md").read_text(), re.MULTILINE)
    assert sorted(explained) == FILES
