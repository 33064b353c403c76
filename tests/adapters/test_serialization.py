"""Adapter files: what is written is what is read, in a fresh model, and nothing is half-written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from subspace.adapters.inject import adapter_groups, adapters, inject, trained_parameters
from subspace.adapters.registry import list_methods
from subspace.adapters.serialization import SETTINGS, TENSORS, load_adapter, save_adapter
from subspace.errors import UserError
from tests.helpers.tiny_models import tiny, tiny_llama

IDS = torch.tensor([[5, 9, 33, 7, 120, 64, 3, 17]])


def trained(method: str = "lora") -> torch.nn.Module:
    model = tiny_llama()
    inject(model, method, seed=1)
    torch.manual_seed(0)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("method", list_methods())
def test_a_fresh_model_gives_equal_logits(method: str, tmp_path: Path) -> None:
    model = trained(method)
    save_adapter(model, tmp_path / "adapter", model="tiny")
    fresh = tiny_llama()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    assert not torch.allclose(fresh(IDS).logits, tiny_llama()(IDS).logits, atol=1e-3)
    assert not trained_parameters(fresh)


def test_two_methods_in_one_file(tmp_path: Path) -> None:
    model = tiny_llama()
    inject(model, "lora", {"r": 4}, targets=["q_proj"])
    inject(model, "ssl", targets=["up_proj"])
    for parameter in trained_parameters(model).values():
        parameter.data += 0.1
    save_adapter(model, tmp_path / "adapter")
    fresh = tiny_llama()
    load_adapter(fresh, tmp_path / "adapter", trained=True)
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    assert trained_parameters(fresh).keys() == trained_parameters(model).keys()


def test_files_are_small_and_plain(tmp_path: Path) -> None:
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    assert sorted(file.name for file in folder.iterdir()) == [SETTINGS, TENSORS]
    stored = load_file(folder / TENSORS)
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in trained_parameters(model).values())
    assert json.loads((folder / SETTINGS).read_text())["adapters"][0]["method"] == "lora"


def test_not_finite_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    before = (folder / TENSORS).read_bytes()
    next(iter(adapters(model).values())).trained()["A"].data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj\.A is not finite"):
        save_adapter(model, folder)
    assert (folder / TENSORS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_no_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model has no adapters"):
        save_adapter(tiny_llama(), tmp_path / "adapter")


def test_missing_folder() -> None:
    with pytest.raises(UserError, match=r"no adapter in nowhere: adapter\.json is not there"):
        load_adapter(tiny_llama(), "nowhere")


def test_adapter_of_another_shape(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path / "adapter", model="tiny-64")
    with pytest.raises(UserError, match="does not fit this model in .* tensors"):
        load_adapter(tiny_llama(hidden_size=128, head_dim=32), tmp_path / "adapter")


def test_adapter_of_another_architecture(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path / "adapter", model="tiny-64")
    with pytest.raises(UserError, match=r"trained on tiny-64\) does not fit this model"):
        load_adapter(tiny("phi3", num_hidden_layers=1), tmp_path / "adapter")


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = save_adapter(trained(), tmp_path / "adapter")
    tensors = load_file(folder / TENSORS)
    del tensors["model.layers.1.mlp.up_proj.B"]
    save_file(tensors, folder / TENSORS)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.B is missing from the file"):
        load_adapter(tiny_llama(), folder)


@pytest.mark.parametrize("file", [SETTINGS, TENSORS])
def test_damaged_file(tmp_path: Path, file: str) -> None:
    folder = save_adapter(trained(), tmp_path / "adapter")
    (folder / file).write_bytes((folder / file).read_bytes()[:40])
    with warnings.catch_warnings(), pytest.raises(UserError, match="is damaged"):
        load_adapter(tiny_llama(), folder)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    folder = save_adapter(trained(), tmp_path / "adapter")
    monkeypatch.setattr("subspace.adapters.serialization.save_file", full)
    with pytest.raises(UserError, match="could not be saved in .*: No space left on device"):
        save_adapter(trained("ssl"), folder)
    assert json.loads((folder / SETTINGS).read_text())["adapters"][0]["method"] == "lora"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_settings_by_site_come_back(tmp_path: Path) -> None:
    model = tiny_llama()
    inject(model, "adalora", {"r": 6}, patterns={"q_proj": {"r": 3}})
    inject(model, "houlsby", {"bottleneck": 8}, targets=["o_proj"])
    save_adapter(model, tmp_path / "adapter")
    other = tiny_llama()
    load_adapter(other, tmp_path / "adapter")
    for site, adapter in adapters(model).items():
        same = adapters(other)[site]
        assert same.config == adapter.config
        assert same.num_siblings == adapter.num_siblings
    assert [len(group) for group in adapter_groups(other)] == [len(group) for group in adapter_groups(model)]


def test_the_published_ia3_comes_back(tmp_path: Path) -> None:
    model = tiny_llama()
    inject(model, "ia3", {"variant": "original"})
    save_adapter(model, tmp_path / "adapter")
    other = tiny_llama()
    load_adapter(other, tmp_path / "adapter")
    assert {site: a.config for site, a in adapters(other).items()} == {
        site: a.config for site, a in adapters(model).items()
    }
