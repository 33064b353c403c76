"""Adapter files: what is written is what is read, in a fresh model, and nothing is half-written."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from subspace.adapters.inject import adapter_groups, adapters, inject, trained_parameters
from subspace.adapters.registry import list_methods
from subspace.adapters.serialization import FORMAT, SETTINGS, TENSORS, load_adapter, read_adapter, save_adapter
from subspace.errors import UserError
from tests.helpers import adapter_files
from tests.helpers.adapter_files import reseal, unseal
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
    reseal(folder)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.B is missing from the file"):
        load_adapter(tiny_llama(), folder)


@pytest.mark.parametrize("file", [SETTINGS, TENSORS])
def test_damaged_file(tmp_path: Path, file: str) -> None:
    folder = save_adapter(trained(), tmp_path / "adapter")
    (folder / file).write_bytes((folder / file).read_bytes()[:40])
    with warnings.catch_warnings(), pytest.raises(UserError, match="is (damaged|not JSON)"):
        load_adapter(tiny_llama(), folder)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    folder = save_adapter(trained(), tmp_path / "adapter")
    monkeypatch.setattr("subspace.adapters.serialization.save_file", full)
    with pytest.raises(UserError, match="could not be saved in .*no space is left on the disk"):
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


# Seals.


def test_a_flipped_bit_anywhere_is_damage(tmp_path: Path) -> None:
    folder, draw = save_adapter(trained(), tmp_path / "adapter"), random.Random(0)
    for file in (folder / TENSORS, folder / SETTINGS):
        sound = file.read_bytes()
        for place in draw.sample(range(len(sound)), 60):
            content = bytearray(sound)
            content[place] ^= 1 << draw.randrange(8)
            if file.name == SETTINGS and _says_the_same(bytes(content), sound):
                continue  # the space between two words
            file.write_bytes(content)
            with pytest.raises(UserError, match="is damaged|has format|is not JSON"):
                read_adapter(folder)
        file.write_bytes(sound)
    read_adapter(folder)


def _says_the_same(content: bytes, sound: bytes) -> bool:
    try:
        return bool(json.loads(content) == json.loads(sound))
    except ValueError:
        return False


def _alpha(described: dict[str, Any]) -> None:
    described["adapters"][0]["settings"]["alpha"] *= 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_alpha, "was changed after it was written"),
        (lambda described: described.update(base=None), "was changed after it was written"),
        (lambda described: described["adapters"][0]["sites"].pop(), "was changed after it was written"),
        (lambda described: described.pop("seal"), "was changed after it was written"),
        (lambda described: described.update(format=FORMAT + 1), "has format 3, which a newer version wrote"),
        (lambda described: described.update(format="2"), "is damaged: .* has the format '2'"),
        (lambda described: described.update(format=0), "is damaged: .* has the format 0"),
        (lambda described: described.pop("adapters"), "is damaged: .* describes no adapters"),
    ],
)
def test_a_changed_description_is_refused(
    change: Callable[[dict[str, Any]], object], said: str, tmp_path: Path
) -> None:
    folder = save_adapter(trained(), tmp_path / "adapter")
    described = adapter_files.read(folder)
    change(described)
    adapter_files.write(folder, described)
    with pytest.raises(UserError, match=said):
        load_adapter(tiny_llama(), folder)


def test_another_run_s_tensors_are_refused(tmp_path: Path) -> None:
    folder, other = save_adapter(trained(), tmp_path / "adapter"), tiny_llama()
    inject(other, "lora", seed=2)
    save_adapter(other, tmp_path / "other")
    (folder / TENSORS).write_bytes((tmp_path / "other" / TENSORS).read_bytes())
    with pytest.raises(UserError, match=r"adapter\.safetensors is not what adapter\.json was written with"):
        load_adapter(tiny_llama(), folder)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tensor: tensor.to(torch.int32), "is I32, but every tensor of an adapter is F32"),
        (lambda tensor: tensor.to(torch.float16), "is F16, but every tensor of an adapter is F32"),
        (lambda tensor: torch.full_like(tensor, float("nan")), "is not finite"),
        (lambda tensor: torch.full_like(tensor, float("-inf")), "is not finite"),
    ],
)
def test_tensors_that_no_training_leaves_are_refused(
    spoil: Callable[[torch.Tensor], torch.Tensor], said: str, sealed: bool, tmp_path: Path
) -> None:
    folder = save_adapter(trained(), tmp_path / "adapter")
    tensors = load_file(folder / TENSORS)
    name = sorted(tensors)[1]
    save_file({**tensors, name: spoil(tensors[name])}, folder / TENSORS)
    reseal(folder) if sealed else unseal(folder)
    with pytest.raises(UserError, match=f"is damaged: {name} {said}"):
        load_adapter(tiny_llama(), folder)


def test_an_adapter_of_an_earlier_version_loads_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    unseal(folder)
    fresh = tiny_llama()
    with caplog.at_level(logging.WARNING, logger="subspace"):
        load_adapter(fresh, folder)
        load_adapter(tiny_llama(), folder)
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    assert caplog.text.count("was saved by an earlier version, without checksums: damage may go unnoticed") == 1


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"it would replace thesis\.tex\. Give a new folder"):
        save_adapter(trained(), tmp_path)
    (tmp_path / "thesis.tex").unlink()
    save_adapter(trained(), tmp_path)


NUMBERS = [
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.ENAMETOOLONG,
    errno.EMFILE,
    errno.EIO,
]


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_the_system_refuses_is_one_message_and_leaves_nothing(
    number: int, wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        if wrapped:  # as safetensors does, which is no OSError
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("subspace.adapters.serialization.save_file", refused)
    folder = tmp_path / "deep" / "adapter"
    with pytest.raises(UserError, match=rf"could not be saved in {folder}: '{folder}': .*\. [A-Z]"):
        save_adapter(trained(), folder)
    assert list((tmp_path / "deep").iterdir()) == []
