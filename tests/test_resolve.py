"""What is known of a run before anything is loaded: ``plan`` and ``train`` refuse the same, in the same words."""

from __future__ import annotations

import gc
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace.adapters.inject import inject
from subspace.config import read_config
from subspace.errors import UserError
from subspace.planning.plan import build_plan
from subspace.resolve import resolve_run
from subspace.run import train_run
from subspace.training import acceleration
from tests.helpers.material import make_material
from tests.helpers.tiny_models import tiny_llama

CPU = torch.device("cpu")

#: Settings that do not fit, the engine's file that goes with them, and words of the message.
REFUSED: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "micro-batch": (["train.micro_batch_size=3"], {}, "does not divide the 8 rows"),
    "engine's number": ([], {"train_batch_size": 32}, "sets train_batch_size to 32"),
    "engine's section": ([], {"scheduler": {}}, "has a section 'scheduler'"),
    "engine's auto": ([], {"wall_clock_breakdown": "auto"}, 'leaves wall_clock_breakdown "auto"'),
    "stage": ([], {"zero_optimization": {"stage": 7}}, "There are 0, 1, 2, 3"),
    "dtype": ([], {"bf16": {"enabled": True}}, "enables bf16, but model.dtype is float32"),
    "offload": ([], {"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}, "offloads the weights"),
    "paged optimizer": (["train.optimizer=paged_adamw"], {}, "there is no GPU here"),
    "offloaded optimizer": (
        ["train.optimizer=adamw8bit"],
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        "works with torch's own alone",
    ),
    "liger": (["train.liger=true"], {}, "kernels of a GPU"),
    "compiler": (["train.compile=true"], {}, "needs a C++ compiler"),
    "tracker that is not installed": (["train.trackers=[wandb]"], {}, "pip install wandb"),
    "validation": (["train.validate_every=2", "data.validation=0"], {}, "needs held-out rows"),
    "packing": (["method=prompt", "data.packing=true"], {}, "before the first one only"),
    "quantised base": (["model.quantize=nf4", "method=full"], {}, "was asked for with `quantize: nf4`"),
    "aio block": (
        ["method=p-tuning", "method.hidden=8192"],
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}, "aio": {"block_size": 4096}},
        "must exceed the",
    ),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


def test_what_follows_from_the_adapters_is_added_once_they_are_there(material: Path) -> None:
    run = resolve_run(read_config(material, [f"engine={material.parent / 'zero2.json'}"]), 2, CPU)
    assert (run.layout.micro_batch, run.layout.ranks, run.trained) == (4, 2, 0)
    model = tiny_llama()
    inject(model, "lora", {"r": 4}, targets=["q_proj"])
    full = run.with_adapters(model)
    assert full.trained == 2 * 4 * (64 + 64)
    assert full.engine.settings["zero_optimization"]["reduce_bucket_size"] == full.trained
    assert "reduce_bucket_size" not in run.engine.settings["zero_optimization"]


@pytest.mark.parametrize("name", REFUSED)
def test_plan_and_train_refuse_alike(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings, engine, words = REFUSED[name]
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(acceleration.shutil, "which", lambda program: None)  # type: ignore[attr-defined]
    monkeypatch.setattr("subspace.training.compatibility.async_io_supported", lambda: True)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == "wandb" else find(module))
    config = read_config(material, [f"runs={tmp_path}", f"engine={tmp_path / 'engine.json'}", *settings])
    messages = []
    for start in (build_plan, train_run):
        with pytest.raises(UserError) as caught:
            start(config)
        messages.append(str(caught.value))
        del caught  # and with it the model, which transformers would take ZeRO-3's configuration from
        gc.collect()
    assert messages[0] == messages[1]
    assert words in messages[0]
    assert not (tmp_path / "run").exists()
