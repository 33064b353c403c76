"""Options that make a step faster or smaller: the same losses, and a clear word where the machine has not got them."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from subspace import config as config_module
from subspace.adapters.inject import inject
from subspace.errors import UserError
from subspace.run import train_run
from subspace.training.acceleration import check_accelerations, compile_layers, is_weight, offload_activations
from tests.helpers.material import logged, make_material
from tests.helpers.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


def losses(material: Path, runs: Path, name: str, *overrides: str) -> list[float]:
    return logged(train_run(config_module.read_config(material, [f"runs={runs}", f"name={name}", *overrides])))


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # torch's compiler looks where it is warned not to
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_compiled_run_has_the_same_losses(material: Path, tmp_path: Path, checkpointing: str) -> None:
    own = f"model.gradient_checkpointing={checkpointing}"
    plain, compiled = (losses(material, tmp_path, f"{on}", own, f"train.compile={on}") for on in ("false", "true"))
    assert compiled == pytest.approx(plain, abs=1e-4)


def test_all_layers_are_compiled() -> None:
    model = tiny_llama()
    inject(model, "lora")
    compile_layers(model)
    assert all(layer._compiled_call_impl is not None for layer in model.model.layers)


@pytest.mark.parametrize("option", ["train.offload_activations=true", "train.keep_memory=true"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_where_memory_lies_changes_no_loss(material: Path, tmp_path: Path, option: str, checkpointing: str) -> None:
    own = ["method.dropout=0.1", f"model.gradient_checkpointing={checkpointing}"]
    assert losses(material, tmp_path, "with", *own, option) == losses(material, tmp_path, "without", *own)


def test_weights_are_told_from_activations() -> None:
    """Of all that a pass saves, what is as large as a weight and does not change with the batch is known as one."""
    model = tiny_llama().train()
    inject(model, "lora", targets=["q_proj", "down_proj"])
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.arange(24).view(2, 12), use_cache=False)
    matrices = [tensor for tensor in saved if tensor.ndim == 2]
    assert any(is_weight(tensor) for tensor in matrices)
    assert [is_weight(t) for t in matrices] == [t.untyped_storage().data_ptr() in held for t in matrices]


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"there is none here. Set train.liger=false"):
        check_accelerations(compiled=False, liger=True, gpu=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install liger-kernel"):
        check_accelerations(compiled=False, liger=True, gpu=True)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"apt-get install g\+\+"):
        check_accelerations(compiled=True, liger=False, gpu=False)
    check_accelerations(compiled=False, liger=False, gpu=False)


@pytest.mark.gpu
def test_offloading_spares_the_gpu() -> None:
    found = {}
    for on in (False, True):
        model: Any = tiny_llama(num_hidden_layers=8).train()
        model.cuda()
        inject(model, "lora")
        ids = torch.randint(2, 300, (8, 256), generator=torch.Generator().manual_seed(0)).cuda()
        torch.cuda.reset_peak_memory_stats()
        if on:
            with offload_activations():
                loss = model(ids, labels=ids, use_cache=False).loss
        else:
            loss = model(ids, labels=ids, use_cache=False).loss
        held = torch.cuda.memory_allocated()
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found[on] = loss.item(), gradients, held
    assert found[True][0] == found[False][0]
    assert all(torch.equal(a, b) for a, b in zip(found[True][1], found[False][1], strict=True))
    assert found[True][2] < 0.7 * found[False][2]


@pytest.mark.gpu
def test_liger_has_the_same_losses(material: Path, tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel")
    plain, liger = (losses(material, tmp_path, f"{on}", f"train.liger={on}") for on in ("false", "true"))
    assert liger == pytest.approx(plain, abs=1e-3)
