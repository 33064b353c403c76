"""DeepSpeed's configuration: filled from the run, refused where it contradicts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from subspace.common.paths import REPOSITORY
from subspace.distributed.deepspeed_config import (
    EngineConfig,
    compute_batch_layout,
    read_engine_file,
    resolve_deepspeed_config,
)
from subspace.errors import UserError
from tests.helpers.material import make_material, saved_adapter

LAYOUT = compute_batch_layout(16, 4, 2)
ALL = sorted(file for file in (REPOSITORY / "ds_configs").glob("*.json"))


def resolve(engine: dict[str, Any], dtype: str = "bfloat16") -> EngineConfig:
    return resolve_deepspeed_config(engine, LAYOUT, dtype=dtype, clip=1.0)


def filled(engine: dict[str, Any], dtype: str = "bfloat16", *, largest: int = 0) -> dict[str, Any]:
    return resolve(engine, dtype).for_adapters(trained=10 * largest, largest=largest).settings


def test_layout() -> None:
    assert (LAYOUT.micro_batch, LAYOUT.accumulate, LAYOUT.ranks) == (4, 2, 2)
    assert compute_batch_layout(16, None, 2).micro_batch == 8


def test_batch_that_the_processes_cannot_share() -> None:
    with pytest.raises(
        UserError, match=r"train\.batch_size is 16 rows a step, which 3 processes cannot share evenly\. Try 15, 18"
    ):
        compute_batch_layout(16, None, 3)


def test_micro_batch_that_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"does not divide the 8 rows .* Use one of 1, 2, 4, 8"):
        compute_batch_layout(16, 3, 2)


@pytest.mark.parametrize("file", ALL, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_ready_files_are_filled(file: Path, dtype: str) -> None:
    engine = filled(read_engine_file(file), dtype)
    assert engine["train_batch_size"] == 16
    assert engine["train_micro_batch_size_per_gpu"] * engine["gradient_accumulation_steps"] * 2 == 16
    assert engine["fp16"]["enabled"] == (dtype == "float16")
    assert not engine["bf16"]["enabled"]
    assert "auto" not in json.dumps(engine)


@pytest.mark.parametrize(("dtype", "section"), [("float16", {}), ("bfloat16", {"bf16": {"enabled": True}})])
def test_stage_0_in_16_bits_runs_as_stage_1(dtype: str, section: dict[str, Any]) -> None:
    engine = resolve({"zero_optimization": {"stage": 0}, **section}, dtype)
    assert engine.stage == 1
    assert "runs as stage 1" in engine.notices[0]


def test_stage_0_in_full_precision_stays() -> None:
    engine = resolve({"zero_optimization": {"stage": 0}})
    assert engine.stage == 0
    assert not engine.notices


def test_what_auto_stands_for_is_told() -> None:
    engine = resolve_deepspeed_config(
        {"gradient_clipping": "auto", "fp16": {"enabled": "auto"}}, LAYOUT, dtype="float32", clip=0.5
    )
    assert engine.notices == ['the engine\'s JSON: "auto" is gradient_clipping=0.5, fp16.enabled=False']


def test_what_follows_from_the_adapters_may_be_auto_and_is_told_when_they_are_counted() -> None:
    engine = resolve({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}})
    assert "reduce_bucket_size" not in engine.settings["zero_optimization"]
    assert not engine.notices
    counted = engine.for_adapters(trained=1234, largest=100)
    assert counted.settings["zero_optimization"]["reduce_bucket_size"] == 1234
    assert counted.notices == ['the engine\'s JSON: "auto" is zero_optimization.reduce_bucket_size=1234']
    assert "reduce_bucket_size" not in engine.settings["zero_optimization"]


def test_weights_on_nvme_are_not_read_ahead() -> None:
    weights = {"device": "nvme", "nvme_path": "somewhere"}
    engine = filled({"zero_optimization": {"stage": 3, "offload_param": weights}})
    assert engine["zero_optimization"]["stage3_prefetch_bucket_size"] == 0


def test_gradients_stay_in_memory_with_the_optimizer_on_nvme() -> None:
    away: dict[str, Any] = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
    assert filled(away, largest=100)["aio"]["block_size"] == 2**20
    assert filled(away, largest=2**20)["aio"]["block_size"] == 2**22 + 4096
    given = {**away, "aio": {"block_size": 2**20}}
    assert filled(given, largest=100)["aio"]["block_size"] == 2**20
    with pytest.raises(UserError, match=r"block_size to 1048576, but .* exceed the 1048576 bytes .* Write \"auto\""):
        filled(given, largest=2**18)


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.skipif(not AsyncIOBuilder().is_compatible(verbose=False), reason="needs libaio")
def test_tensors_after_one_of_odd_size_train_with_the_optimizer_on_nvme(tmp_path: Path) -> None:
    """DoRA's magnitudes, 64 numbers, put what follows them where DeepSpeed could not read a gradient of a megabyte."""
    file, found = make_material(tmp_path), []
    settings = [f"runs={tmp_path}", "train.steps=4", "train.learning_rate=0.001", "targets=[q_proj]"]
    settings += ["method=dora", "method.r=4200", "method.alpha=1000"]
    for name in ("cpu", "nvme"):
        zero = {"stage": 3, "offload_optimizer": {"device": name, "nvme_path": str(tmp_path / "swapped")}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
        own = [f"name={name}", f"engine={tmp_path / name}.json"]
        command = [sys.executable, "-m", "subspace", "train", str(file), *settings, *own, "--processes", "1"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(saved_adapter(tmp_path / name))
    assert max(tensor.nbytes for tensor in found[0].values()) > 2**20
    assert all(torch.allclose(tensor, found[1][name], atol=1e-5) for name, tensor in found[0].items())


def test_adapters_are_held_whole_at_stage_3() -> None:
    engine = filled({"zero_optimization": {"stage": 3}}, largest=352_256)
    assert engine["zero_optimization"]["stage3_param_persistence_threshold"] == 352_256


def test_a_given_threshold_stays() -> None:
    engine = filled({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}, largest=352_256)
    assert engine["zero_optimization"]["stage3_param_persistence_threshold"] == 0


@pytest.mark.parametrize(
    ("engine", "dtype", "message"),
    [
        ({"train_batch_size": 32}, "bfloat16", r"sets train_batch_size to 32, but train\.batch_size is 16"),
        ({"gradient_clipping": 5.0}, "bfloat16", r"gradient_clipping to 5\.0, but train\.max_grad_norm is 1\.0"),
        ({"optimizer": {"type": "AdamW"}}, "bfloat16", "section 'optimizer', which the run's `train` settings replace"),
        ({"bf16": {"enabled": True}}, "float32", "enables bf16, but model.dtype is float32"),
        ({"fp16": {"enabled": False}}, "float16", "disables fp16, but model.dtype is float16"),
        ({"zero_optimization": {"stage": 4}}, "bfloat16", "stage to 4. There are 0, 1, 2, 3"),
        ({"wall_clock_breakdown": "auto"}, "bfloat16", 'leaves wall_clock_breakdown "auto"'),
    ],
)
def test_contradictions_are_refused(engine: dict[str, Any], dtype: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        filled(engine, dtype)


def test_broken_file_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{\n  "a": 1,\n  "b" 2\n}')
    with pytest.raises(UserError, match=r"x\.json, line 3 is not JSON"):
        read_engine_file(tmp_path / "x.json")


def test_missing_file() -> None:
    with pytest.raises(UserError, match=r"no file nowhere\.json"):
        read_engine_file("nowhere.json")
