"""What only a CUDA device can show. Run with ``bash tests/run.sh -m gpu``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from subspace import config as config_module
from subspace.run import train_run
from tests.helpers.material import logged, make_material, saved_adapter

pytestmark = pytest.mark.gpu

SETTINGS = ["train.steps=12", "model.dtype=bfloat16"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("quantize", ["none", "nf4", "fp4"])
def test_trains_on_the_gpu(tmp_path: Path, stage: int, quantize: str) -> None:
    file = make_material(tmp_path)
    own = [f"engine={tmp_path / f'zero{stage}.json'}", f"model.quantize={quantize}", f"runs={tmp_path}", "name=run"]
    folder = train_run(config_module.read_config(file, [*SETTINGS, *own]))
    losses = logged(folder)
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.isfinite(tensor).all() for tensor in saved_adapter(folder).values())


def test_float16_trains_on_the_gpu(tmp_path: Path) -> None:
    file = make_material(tmp_path)
    own = [f"engine={tmp_path / 'zero1.json'}", f"runs={tmp_path}", "name=run", "model.dtype=float16"]
    losses = logged(train_run(config_module.read_config(file, ["train.steps=24", *own])))
    assert losses[-1] < losses[0] - 0.3
