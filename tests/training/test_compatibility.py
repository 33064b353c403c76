"""What does not go together is refused before anything is loaded, with what does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch.utils import cpp_extension

from subspace import config as config_module
from subspace.adapters.registry import resolve_method
from subspace.distributed.deepspeed_compat import NVME_LIBRARIES
from subspace.distributed.deepspeed_config import compute_batch_layout, resolve_deepspeed_config
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from subspace.run import train_run
from subspace.training.compatibility import find_incompatibility, find_missing_requirement
from tests.helpers.material import make_material

CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "somewhere"}


def filled(dtype: str, zero: dict[str, Any]) -> dict[str, Any]:
    layout = compute_batch_layout(8, 4, 1)
    return resolve_deepspeed_config({"zero_optimization": zero}, layout, dtype=dtype, clip=1.0).settings


def said(model: ModelConfig, zero: dict[str, Any], method: str = "lora") -> str | None:
    cls, settings = resolve_method(method)
    return find_incompatibility(model, [(cls, cls.Config(**settings))], filled(model.dtype, zero))


@pytest.mark.parametrize(
    ("model", "zero", "words"),
    [
        ({}, {"stage": 0, "offload_optimizer": CPU}, ["at ZeRO stage 0", "Set stage 1"]),
        ({}, {"stage": 2, "offload_optimizer": NVME}, ["optimizer to NVMe at ZeRO stage 2", "Set it to cpu"]),
        ({}, {"stage": 2, "offload_param": CPU}, ["weights at ZeRO stage 2", "Set stage 3"]),
        ({}, {"stage": 3, "offload_param": NVME}, ["as float32", "model.dtype is bfloat16", "to cpu"]),
        ({"dtype": "float32", "quantize": "nf4"}, {"stage": 3, "offload_param": NVME}, ["`quantize: nf4`", "to cpu"]),
        ({"dtype": "float32", "quantize": "int8"}, {"stage": 3, "offload_param": NVME}, ["`quantize: int8`", "to cpu"]),
    ],
)
def test_what_never_goes_is_refused(model: dict[str, Any], zero: dict[str, Any], words: list[str]) -> None:
    reason = said(ModelConfig(**model), zero)
    assert reason
    assert all(word in reason for word in words), reason


@pytest.mark.parametrize(
    ("model", "zero"),
    [
        ({"quantize": "nf4"}, {"stage": 3, "offload_param": CPU, "offload_optimizer": CPU}),
        ({"quantize": "int8"}, {"stage": 3}),
        ({"dtype": "float32"}, {"stage": 3, "offload_param": NVME}),
        ({"quantize": "nf4"}, {"stage": 3, "offload_optimizer": NVME}),
        ({}, {"stage": 1, "offload_optimizer": CPU}),
        ({}, {"stage": 0, "offload_optimizer": {"device": "none"}}),
    ],
)
def test_what_goes_is_let_through(model: dict[str, Any], zero: dict[str, Any]) -> None:
    assert said(ModelConfig(**model), zero) is None


def test_a_method_that_quantised_weights_cannot_serve_is_refused() -> None:
    reason = said(ModelConfig(quantize="fp4"), {"stage": 1}, "svdiff")
    assert reason is not None
    assert "`quantize: fp4`" in reason
    assert "method.p" in reason


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let this machine be able to compile for NVMe, and return where."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=True: True)
    return tmp_path


@pytest.mark.parametrize("library", NVME_LIBRARIES)
def test_the_lock_of_a_build_that_was_killed_does_not_hang(builds: Path, library: str) -> None:
    engine = filled("float32", {"stage": 3, "offload_param": NVME})
    assert find_missing_requirement(ModelConfig(dtype="float32"), engine) is None
    lock = Path(cpp_extension._get_build_directory(library, verbose=False)) / "lock"
    lock.touch()
    reason = find_missing_requirement(ModelConfig(dtype="float32"), engine)
    assert reason is not None
    assert f"{lock} says" in reason
    assert "remove that file" in reason


@pytest.mark.parametrize("what", ["offload_param", "offload_optimizer"])
def test_a_machine_without_libaio_is_told(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=True: False)
    engine = filled("float32", {"stage": 3, what: NVME})
    assert "libaio-dev" in str(find_missing_requirement(ModelConfig(dtype="float32"), engine))


def test_a_run_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    file = make_material(tmp_path)
    (tmp_path / "engine.json").write_text('{"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}')
    settings = [f"engine={tmp_path / 'engine.json'}", f"runs={tmp_path}", "model.path=nowhere"]
    with pytest.raises(UserError, match="offloads the weights at ZeRO stage 1"):
        train_run(config_module.read_config(file, settings))
    assert not (tmp_path / "run").exists()
