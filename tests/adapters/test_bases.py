"""An adapter is of one base: loading and merging take it by its bytes from any path, and refuse every other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import subspace
from subspace.adapters import export
from subspace.adapters.export import export_merged
from subspace.adapters.inject import adapters, inject, remove_adapters, trained_parameters
from subspace.adapters.serialization import SETTINGS, load_adapter, save_adapter
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model
from tests.helpers.adapter_files import unseal
from tests.helpers.tiny_models import save_sentencepiece, tiny_llama

IDS = torch.tensor([[5, 9, 33, 7, 120, 64, 3, 17]])


@pytest.fixture
def base(tmp_path: Path) -> ModelConfig:
    tiny_llama(tmp_path / "base")
    return ModelConfig(path=str(tmp_path / "base"), dtype="float32")


@pytest.fixture
def adapter(base: ModelConfig, tmp_path: Path) -> Path:
    model = open_model(base)
    inject(model, "lora", targets=["q_proj"])
    for parameter in trained_parameters(model).values():
        parameter.data += 0.1
    return save_adapter(model, tmp_path / "adapter")


def exchange(folder: Path) -> None:
    tiny_llama(folder, seed=9)


def swap_two_layers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CHANGES = [
    (exchange, "its weights differ"),
    (swap_two_layers, "its weights differ"),
    (save_sentencepiece, "its tokenizer differs"),
]


def test_the_record_names_what_it_is_of(base: ModelConfig, adapter: Path) -> None:
    recorded = json.loads((adapter / SETTINGS).read_text())["base"]
    assert recorded["path"] == base.path
    assert all(len(recorded[key]) == 64 for key in ("weights", "layout", "tokenizer"))
    assert recorded["config"]["hidden_size"] == 64


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_another_base_at_the_same_path_is_refused(
    base: ModelConfig, adapter: Path, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    change(Path(base.path))
    for model in (open_model(base), AutoModelForCausalLM.from_pretrained(base.path)):
        with pytest.raises(UserError) as caught:
            subspace.load_adapter(model, adapter)
        assert words in str(caught.value)
        assert str(adapter) in str(caught.value)
        assert not adapters(model)
    with pytest.raises(UserError, match=words):
        export_merged(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_same_bytes_elsewhere_are_the_same_base(base: ModelConfig, adapter: Path, tmp_path: Path) -> None:
    moved = Path(base.path).rename(tmp_path / "moved")
    there = replace(base, path=str(moved))
    logits = []
    for model in (open_model(there), AutoModelForCausalLM.from_pretrained(moved), tiny_llama()):
        load_adapter(model, adapter)
        logits.append(model(IDS).logits)
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert torch.allclose(logits[0], logits[2], atol=1e-4)
    export_merged(there, adapter, tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "merge.json").read_text())
    recorded = json.loads((adapter / SETTINGS).read_text())["base"]
    assert written["base_record"] == {**recorded, "path": "moved"}


def test_a_merge_refuses_before_it_loads(
    base: ModelConfig, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange(Path(base.path))
    monkeypatch.setattr(export, "open_model", None)
    with pytest.raises(UserError, match="its weights differ"):
        export_merged(base, adapter, tmp_path / "merged")


def test_a_model_in_memory_is_compared_by_its_tensors(adapter: Path) -> None:
    with pytest.raises(UserError, match="a model in memory is another base: its weights differ"):
        load_adapter(tiny_llama(seed=9), adapter)


def test_each_of_several_adapters_of_one_load_is_compared(base: ModelConfig, adapter: Path, tmp_path: Path) -> None:
    other = replace(base, path=str(shutil.copytree(base.path, tmp_path / "other")))
    exchange(tmp_path / "other")
    strange = open_model(other)
    inject(strange, "lora", targets=["k_proj"])
    second = save_adapter(strange, tmp_path / "second")
    model = open_model(base)
    for folder in (adapter, adapter):
        load_adapter(model, folder)
        remove_adapters(model)
    with pytest.raises(UserError, match="is another base"):
        load_adapter(model, second)
    assert not adapters(model)


def test_who_wants_another_base_says_so(base: ModelConfig, adapter: Path) -> None:
    exchange(Path(base.path))
    model = open_model(base)
    load_adapter(model, adapter, any_base=True)
    assert len(adapters(model)) == 2


def test_an_adapter_of_before_loads_with_a_notice(
    base: ModelConfig, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    described = json.loads((adapter / SETTINGS).read_text())
    del described["base"]
    (adapter / SETTINGS).write_text(json.dumps(described))
    unseal(adapter)
    load_adapter(open_model(base), adapter)
    assert f"note: the adapter in {adapter} is of a version that did not record its base" in caplog.text
    export_merged(base, adapter, tmp_path / "merged")


def test_what_was_trained_is_saved_although_its_base_changed(
    base: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = open_model(base)
    inject(model, "lora")
    exchange(Path(base.path))
    folder = save_adapter(model, tmp_path / "adapter")
    assert "is saved without a record of its base" in caplog.text
    assert json.loads((folder / SETTINGS).read_text())["base"] is None
