"""A model with adapters, saved by other libraries' calls: it loads as it was, or is refused in a sentence."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from subspace.adapters.exchange.pretrained import own_tensors
from subspace.adapters.inject import adapters, inject, remove_adapters, trained_parameters
from subspace.adapters.merging import merge, unmerge
from subspace.adapters.registry import list_methods
from subspace.adapters.serialization import load_adapter
from subspace.errors import UserError
from tests.helpers.tiny_models import KINDS, tiny, tiny_llama

IDS = torch.tensor([[0, 9, 33, 7, 120, 64, 3, 17]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits  # type: ignore[no-any-return]


def perturb(model: nn.Module) -> None:
    torch.manual_seed(11)
    for tensor in own_tensors(model).values():
        if tensor.is_floating_point():
            tensor.data += 0.05 * torch.rand_like(tensor)


def adapted(method: str = "lora", **settings: Any) -> Any:
    model = tiny_llama()
    inject(model, method, settings)
    perturb(model)
    return model


def fresh(method: str) -> Any:
    model = tiny_llama()
    inject(model, method)
    return model


# state_dict


@pytest.mark.parametrize("method", list_methods())
def test_a_state_dict_holds_tensors_only(method: str) -> None:
    model = tiny_llama()
    inject(model, method, start=False)
    assert [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)] == []
    assert own_tensors(model).keys() <= model.state_dict().keys()


@pytest.mark.parametrize("method", sorted(KINDS))
def test_safetensors_saves_a_whole_adapted_model_and_loads_it(tmp_path: Path, method: str) -> None:
    model, other = adapted(method), fresh(method)
    assert not torch.equal(logits(other), logits(model))
    save_model(model, str(tmp_path / "model.safetensors"))
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(RuntimeError, match="Missing key"):
        load_model(tiny_llama(), tmp_path / "model.safetensors")


def test_what_a_schedule_remembers_is_in_the_state_dict() -> None:
    model, other = adapted("adalora"), fresh("adalora")
    other.load_state_dict(model.state_dict())
    for site, adapter in adapters(model).items():
        assert adapter.history.keys() == {"A", "E", "B"}
        for key, value in adapter.history.items():
            assert value.any()
            assert torch.equal(value, adapters(other)[site].history[key])
            assert value is not adapters(other)[site].history[key]


def test_a_state_dict_of_before_still_loads() -> None:
    model, other = adapted("adalora"), fresh("adalora")
    state = {name: value for name, value in model.state_dict().items() if ".history." not in name}
    assert len(state) < len(model.state_dict())
    older: Any = {f"{site}._extra_state": adapter.history for site, adapter in adapters(model).items()}
    other.load_state_dict({**state, **older})
    assert all(torch.equal(own_tensors(other)[name], value) for name, value in own_tensors(model).items())


def test_a_history_that_is_missing_or_of_another_size_is_said() -> None:
    state = fresh("adalora").state_dict()
    name = next(name for name in state if name.endswith("history.E"))
    for wrong in ({name: torch.zeros(2, 5)}, {name: None}):
        given = {key: value for key, value in {**state, **wrong}.items() if value is not None}
        with pytest.raises(RuntimeError, match=name):
            fresh("adalora").load_state_dict(given)


def test_the_adapters_tensors_alone_are_a_complete_load() -> None:
    model, other = adapted(), fresh("lora")
    own = own_tensors(model)
    other.load_state_dict(own)
    assert torch.equal(logits(other), logits(model))
    for cut in ({name: own[name] for name in list(own)[1:]}, {}, {**own, "lm_head.weight": model.lm_head.weight}):
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict(cut)


# save_pretrained


@pytest.mark.parametrize("method", sorted(KINDS))
def test_save_pretrained_of_an_unmerged_model_writes_its_adapters(tmp_path: Path, method: str) -> None:
    model = adapted(method)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter.json", "adapter.safetensors", "model.safetensors"}
    other = tiny_llama()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    third = fresh(method)
    third.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(third), logits(model))
    with pytest.raises((OSError, ValueError), match="config"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_values_are_taken_from_a_state_dict_that_is_given(tmp_path: Path) -> None:
    model = adapted()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    perturb(model)
    model.save_pretrained(tmp_path, state_dict=state)
    other = tiny_llama()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), expected)
    state.popitem()
    first = next(iter(own_tensors(model)))
    del state[first]
    with pytest.raises(UserError, match=f"the state_dict lacks {first}"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_a_second_save_replaces_the_first_and_leaves_other_files(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"theirs")
    perturb(model)
    model.save_pretrained(tmp_path)
    other = tiny_llama()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert (tmp_path / "optimizer.pt").read_bytes() == b"theirs"
    assert len(list(tmp_path.iterdir())) == 4


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_what_could_not_be_loaded_as_it_was_is_refused(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(UserError, match="cannot push .* to the hub"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"model.norm.weight is trained and belongs to no adapter"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.model.norm.weight.requires_grad_(False)
    tiny_llama(tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="it holds a model"):
        model.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


def test_tensors_in_parts_are_refused_without_a_state_dict(tmp_path: Path) -> None:
    model = adapted()
    next(iter(trained_parameters(model).values())).ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="ZeRO-3 holds them in parts.*subspace.save_adapter"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("undo", [merge, remove_adapters])
def test_without_adapters_a_model_is_saved_by_its_class(tmp_path: Path, undo: Any) -> None:
    model = adapted()
    undo(model)
    model.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(plain), logits(model))
    if undo is merge:
        unmerge(model)
    else:
        inject(model, "lora")
    model.save_pretrained(tmp_path / "adapted")
    assert (tmp_path / "adapted" / "adapter.json").exists()


def test_a_tied_head_that_was_merged_is_saved_on_its_own(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    inject(model, "lora", targets=["lm_head"])
    perturb(model)
    merge(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_created_biases_that_a_reader_would_drop_are_refused(tmp_path: Path) -> None:
    model = adapted("bitfit")
    merge(model)
    with pytest.raises(UserError, match=r"merging created model.layers.0.*bias.*subspace merge RUN"):
        model.save_pretrained(tmp_path)
    own = tiny("qwen2")  # whose linears have them
    inject(own, "bitfit", targets=["q_proj"])
    perturb(own)
    merge(own)
    own.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(own))


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    model = adapted()
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert other.save_pretrained.model is other
        perturb(other)
        other.save_pretrained(tmp_path)
        third = tiny_llama()
        load_adapter(third, tmp_path)
        assert torch.equal(logits(third), logits(other))
        assert not torch.equal(logits(third), logits(model))
