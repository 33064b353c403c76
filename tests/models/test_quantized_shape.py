"""A quantised model's shape is found without spoiling what is opened after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from subspace.models.config import ModelConfig
from subspace.models.loading import open_model, open_shape
from tests.helpers.material import make_material


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_model_opens_after_its_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str, double_quant: bool
) -> None:
    monkeypatch.setattr("bitsandbytes.functional.name2qmap", {})  # as in a process that has quantised nothing yet
    make_material(tmp_path)
    config = ModelConfig(path=str(tmp_path / "model"), dtype="bfloat16", quantize=quantize, double_quant=double_quant)
    shape = open_shape(config)
    assert {parameter.device.type for parameter in shape.parameters()} == {"meta"}
    logits = open_model(config)(torch.arange(8)[None]).logits
    assert torch.isfinite(logits).all()
