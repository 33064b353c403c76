"""Merging: the same function in plain layers, undone to the bit, and written as a folder that was proved first."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from subspace.adapters import export
from subspace.adapters.base import LinearAdapter, MethodConfig
from subspace.adapters.export import export_merged
from subspace.adapters.inject import adapters, inject, trained_parameters
from subspace.adapters.merging import merge, unmerge
from subspace.adapters.registry import list_methods
from subspace.adapters.serialization import load_adapter, save_adapter
from subspace.errors import UserError
from subspace.methods.lora import LoRA
from subspace.models.config import ModelConfig
from subspace.models.float32_blocks import float32_blocks
from subspace.models.loading import open_model
from tests.helpers.adapter_files import reseal
from tests.helpers.tiny_models import tiny, tiny_llama

IDS = torch.tensor([[0, 9, 33, 7, 120, 64, 3, 17], [0, 8, 250, 31, 2, 90, 4, 11]])
MERGEABLE = [name for name, cls in list_methods().items() if cls.mergeable]
UNMERGEABLE = [name for name, cls in list_methods().items() if not cls.mergeable]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device), use_cache=False).logits.float().cpu()  # type: ignore[no-any-return]


def perturb(model: nn.Module, scale: float = 0.05) -> None:
    torch.manual_seed(11)
    for parameter in trained_parameters(model).values():
        parameter.data += scale * torch.randn_like(parameter)


def adapted(model: PreTrainedModel, method: str = "lora", targets: list[str] | None = None) -> PreTrainedModel:
    inject(model, method, targets=targets)
    perturb(model)
    return model


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Shift(LinearAdapter):
    """A method that is more than a weight: it adds a bias, also where there was none. Not in the register."""

    name = "shift"
    roles = {"shift": "bias"}  # noqa: RUF012

    def __init__(self, base: nn.Module, config: MethodConfig) -> None:
        super().__init__(base, config)
        self.shift = nn.Parameter(torch.linspace(-1, 1, self.out_features))

    def weight(self, W: Tensor) -> Tensor:
        return W

    def bias(self, b: Tensor | None) -> Tensor:
        return self.shift if b is None else b + self.shift


def shift(model: PreTrainedModel, *sites: str) -> PreTrainedModel:
    for site in sites:
        model.set_submodule(site, Shift(model.get_submodule(site), MethodConfig()))
    return model


# In memory


@pytest.mark.parametrize("method", MERGEABLE)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "phi3"])
def test_a_merged_model_computes_the_same_in_plain_layers(architecture: str, method: str) -> None:
    model = tiny(architecture)
    names = list(model.state_dict())
    before = logits(model)
    unmerged = logits(adapted(model, method))
    assert distance(unmerged, before) > 1e-3
    merge(model)
    assert distance(logits(model), unmerged) < 1e-5
    assert adapters(model) == {}
    created = [name for name in model.state_dict() if name not in names]
    assert [name for name in model.state_dict() if name not in created] == names
    assert all(name.endswith("proj.bias") for name in created)
    assert bool(created) == (method == "bitfit")


@pytest.mark.parametrize("method", MERGEABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_every_bit(method: str, dtype: torch.dtype) -> None:
    model = adapted(tiny("qwen2", dtype=dtype), method)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    found, unmerged = adapters(model), logits(model)
    merge(model)
    unmerge(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(adapters(model)[site] is adapter for site, adapter in found.items())
    assert torch.equal(logits(model), unmerged)
    merge(model)  # and it can be merged again


def test_low_precision_is_merged_in_float32() -> None:
    model = adapted(tiny_llama(dtype=torch.bfloat16), targets=["q_proj"])
    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data.to(torch.bfloat16)
    adapter = adapters(model)["model.layers.0.self_attn.q_proj"]
    assert isinstance(adapter, LoRA)
    W, A, B = (tensor.detach().float() for tensor in (adapter.base.weight, adapter.A, adapter.B))
    assert adapter.base.weight.dtype == torch.bfloat16
    merge(model)
    merged = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(merged, (W + adapter.scale * B @ A).to(torch.bfloat16))
    assert adapter.A.dtype == torch.bfloat16


def test_a_tied_head_is_merged_without_its_embedding() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight.clone()
    unmerged = logits(adapted(model, targets=["lm_head"]))
    merge(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert distance(logits(model), unmerged) < 1e-5
    assert not model.config.tie_word_embeddings
    unmerge(model)
    assert model.get_submodule("lm_head.base").weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # without biases, and with
def test_a_bias_is_merged_and_taken_away_again(architecture: str) -> None:
    site = "model.layers.0.self_attn.v_proj"
    model = shift(tiny(architecture), site)
    unmerged, bias = logits(model), model.get_submodule(site).base.bias  # type: ignore[union-attr]
    merge(model)
    assert model.get_submodule(site).bias is not None
    assert distance(logits(model), unmerged) < 1e-6
    unmerge(model)
    assert model.get_submodule(site).base.bias is bias  # type: ignore[union-attr]


@pytest.mark.parametrize("method", UNMERGEABLE)
def test_what_is_no_linear_layer_is_refused_before_anything_changes(method: str) -> None:
    model = adapted(adapted(tiny_llama(), targets=["gate_proj"]), method)
    unmerged = logits(model)
    with pytest.raises(UserError, match=f"cannot merge {method}.*subspace evaluate RUN"):
        merge(model)
    assert torch.equal(logits(model), unmerged)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_base_is_refused(tmp_path: Path, quantize: str) -> None:
    tiny_llama(tmp_path)
    model = adapted(open_model(ModelConfig(path=str(tmp_path), dtype="float32", quantize=quantize)))
    with pytest.raises(UserError, match="cannot merge lora into the (4bit|int8) layer.*quantize: none"):
        merge(model)


def test_a_sharded_base_is_refused() -> None:
    model = adapted(tiny_llama(), targets=["q_proj"])
    model.get_submodule("model.layers.0.self_attn.q_proj.base").weight.ds_id = 0  # type: ignore[union-attr]
    with pytest.raises(UserError, match="ZeRO-3 holds the weights in parts.*subspace merge RUN"):
        merge(model)


@pytest.mark.parametrize("change", [merge, unmerge])
def test_nothing_to_merge_or_to_unmerge_is_said(change: Callable[[nn.Module], None]) -> None:
    with pytest.raises(UserError, match="cannot"):
        change(tiny_llama())


def test_unmerging_under_new_adapters_is_refused() -> None:
    model = adapted(tiny_llama(), targets=["q_proj"])
    merge(model)
    with pytest.raises(UserError, match="injected after the merge"):
        unmerge(adapted(model, targets=["q_proj"]))


def test_merging_twice_is_refused() -> None:
    model = adapted(tiny_llama())
    merge(model)
    with pytest.raises(UserError, match="may be merged already"):
        merge(model)


# As a folder


@pytest.fixture
def base(tmp_path: Path) -> ModelConfig:
    """Return a saved tiny LLaMA."""
    tiny_llama(tmp_path / "base")
    return ModelConfig(path=str(tmp_path / "base"), dtype="float32")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged"


def saved_adapter(config: ModelConfig, folder: Path, method: str = "lora", targets: list[str] | None = None) -> Path:
    save_adapter(adapted(open_model(config), method, targets), folder)
    return folder


def nothing_left(out: Path) -> bool:
    return not out.exists() and not out.with_name(f"{out.name}.partial").exists()


@pytest.mark.parametrize("method", MERGEABLE)
def test_a_merged_folder_is_an_ordinary_one(base: ModelConfig, out: Path, tmp_path: Path, method: str) -> None:
    adapter = saved_adapter(base, tmp_path / "adapter", method)
    report = export_merged(base, adapter, out)
    model = open_model(base)
    load_adapter(model, adapter)
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert distance(logits(plain), logits(model)) < 1e-5
    text = "The correct answer is option2."
    assert (
        AutoTokenizer.from_pretrained(out)(text).input_ids == AutoTokenizer.from_pretrained(base.path)(text).input_ids
    )
    assert (report.layers, report.dtype, report.rounding) == (len(adapters(model)), "float32", 0)
    assert report.merged_difference < 1e-5
    assert report.written_difference == report.merged_difference
    assert report.same_tokens == 1
    assert json.loads((out / "merge.json").read_text())["update"] == report.update > 0
    assert {file.suffix for file in out.iterdir()} == {".json", ".safetensors", ".md"}
    assert not out.with_name("merged.partial").exists()


@pytest.fixture
def half(tmp_path: Path) -> ModelConfig:
    """Return a tiny LLaMA of six layers whose files are bfloat16."""
    tiny_llama(tmp_path / "half", dtype=torch.bfloat16, num_hidden_layers=6, vocab_size=400)
    return ModelConfig(path=str(tmp_path / "half"), dtype="bfloat16")


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("lora", "float16"),
        ("lora", "float32"),
        *((m, "bfloat16") for m in ("lora", "dora", "bitfit", "full", "svdiff")),
    ],
)
def test_a_folder_holds_what_a_merge_in_float32_gives_to_the_bit(
    half: ModelConfig, out: Path, tmp_path: Path, method: str, dtype: str
) -> None:
    adapter = saved_adapter(half, tmp_path / "adapter", method)
    report = export_merged(half, adapter, out, dtype=dtype)
    whole = open_model(replace(half, dtype="float32"))
    load_adapter(whole, adapter)
    unmerged = logits(whole)
    merge(whole)
    expected = {name: p.to(getattr(torch, dtype)) for name, p in whole.named_parameters(remove_duplicate=False)}
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found.pop(name), tensor) for name, tensor in expected.items() if name in found)
    assert all(not tensor.any() for tensor in found.values())  # biases that only the configuration asks for
    assert report.merged_difference < 1e-5
    if method in ("full", "svdiff"):  # they take up W's dtype
        return
    held = open_model(replace(half, dtype="float32"), held=torch.bfloat16)
    load_adapter(held, adapter)
    assert held.model.layers[0].self_attn.o_proj.weight.dtype == torch.bfloat16
    with float32_blocks(held):
        assert torch.equal(logits(held), unmerged)


def test_a_merge_holds_one_layer_in_float32(
    half: ModelConfig, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved_adapter(half, tmp_path / "adapter")
    held: list[int] = []
    for name in ("_merge", "_leave"):
        original = getattr(export._LayerwiseMerge, name)

        def watched(self: Any, value: Any, original: Any = original) -> None:
            original(self, value)
            held.append(sum(p.nbytes for p in self.model.parameters() if p.requires_grad is False))

        monkeypatch.setattr(export._LayerwiseMerge, name, watched)
    export_merged(half, adapter, out)
    model = open_model(half)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    whole = sum(p.nbytes for p in model.parameters())
    own = sum(tensor.nbytes for tensor in load_file(adapter / "adapter.safetensors").values())
    assert whole > 6 * layer
    assert max(held) <= whole + layer + own  # two bytes more for each number of one layer
    assert len(held) > 6


@pytest.mark.parametrize(
    ("free", "dtype", "place"), [(24, "bfloat16", "cuda"), (24, "float32", "cpu"), (80, "float32", "cuda")]
)
def test_a_7b_model_is_merged_on_the_card_where_it_fits(
    monkeypatch: pytest.MonkeyPatch, free: int, dtype: str, place: str
) -> None:
    """In float32 it takes 27 GB, and what was trained on a card of 24 GB could not be merged there."""
    monkeypatch.setattr(export, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0.97 * free * 10**9, free * 10**9))
    assert export._place(ModelConfig(path="llama-7b", dtype="float32"), getattr(torch, dtype)).type == place


def test_the_report_measures_what_rounding_costs(base: ModelConfig, out: Path, tmp_path: Path) -> None:
    adapter = saved_adapter(base, tmp_path / "adapter", targets=["q_proj"])
    report = export_merged(base, adapter, out, dtype="bfloat16")
    model = open_model(base)
    load_adapter(model, adapter)
    found: list[Any] = list(adapters(model).values())
    W = torch.cat([adapter.base.weight.flatten() for adapter in found])
    merged = torch.cat([adapter.weight(adapter.base.weight).flatten() for adapter in found])
    rounded = merged.to(torch.bfloat16).float()
    assert report.update == pytest.approx(float((merged - W).norm() / W.norm()), rel=1e-4)
    assert report.rounding == pytest.approx(float((rounded - merged).norm() / (merged - W).norm()), rel=1e-4)
    assert report.written_difference > 100 * report.merged_difference
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("as_trained", [False, True])
def test_an_adapter_of_a_quantised_base_can_have_either_base(
    base: ModelConfig, out: Path, tmp_path: Path, quantize: str, as_trained: bool
) -> None:
    config = ModelConfig(path=base.path, dtype="float32", quantize=quantize)
    adapter = saved_adapter(config, tmp_path / "adapter")
    export_merged(config, adapter, out, as_trained=as_trained)
    expected = open_model(config if as_trained else base)
    load_adapter(expected, adapter)
    # int8 layers round their inputs too, merged ones do not
    limit = 5e-2 if as_trained and quantize == "int8" else 1e-5
    assert distance(logits(AutoModelForCausalLM.from_pretrained(out)), logits(expected)) < limit


@pytest.mark.parametrize("as_trained", [False, True])
def test_dora_takes_the_row_norms_of_the_weights_at_hand(
    base: ModelConfig, out: Path, tmp_path: Path, as_trained: bool
) -> None:
    config = ModelConfig(path=base.path, dtype="float32", quantize="nf4")
    adapter = saved_adapter(config, tmp_path / "adapter", "dora")
    assert export_merged(config, adapter, out, as_trained=as_trained).merged_difference < 1e-4


def test_a_merge_that_differs_is_told_what_else_there_is(base: ModelConfig, out: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=base.path, dtype="float32", quantize="nf4")
    adapter = saved_adapter(config, tmp_path / "adapter", "dora")
    with pytest.raises(UserError, match="Merge into the nf4 weights as trained"):
        export_merged(config, adapter, out, tolerance=0.0)
    assert nothing_left(out)


def test_a_tied_head_is_written_on_its_own(tmp_path: Path, out: Path) -> None:
    tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    base = ModelConfig(path=str(tmp_path / "base"), dtype="float32")
    adapter = saved_adapter(base, tmp_path / "adapter", targets=["lm_head", "q_proj"])
    assert export_merged(base, adapter, out).written_difference < 1e-5
    assert not json.loads((out / "config.json").read_text())["tie_word_embeddings"]


def shifted_folder(
    architecture: str, sites: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[PreTrainedModel, ModelConfig]:
    """Make ``merged_folder`` put biases at the sites, instead of an adapter from a file."""
    tiny(architecture, tmp_path / "base")
    base = ModelConfig(path=str(tmp_path / "base"), dtype="float32")
    export = sys.modules["subspace.adapters.export"]
    monkeypatch.setattr(export, "load_adapter", lambda model, _, **options: shift(model, *sites))
    # There is no file of an adapter.
    monkeypatch.setattr(export, "check_adapter_base", lambda folder, base: None)
    monkeypatch.setattr(export, "adapter_facts", lambda folder: {"adapter": "", "adapter_sha256": "", "methods": []})
    return shift(open_model(base), *sites), base


@pytest.mark.parametrize(
    ("sites", "announced"),
    [
        (["model.layers.0.self_attn.v_proj"], (True, False)),
        (["model.layers.1.mlp.up_proj"], (False, True)),
        (["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"], (True, True)),
    ],
)
def test_a_created_bias_is_announced_in_the_folder(
    sites: list[str], announced: tuple[bool, bool], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, base = shifted_folder("llama", sites, tmp_path, monkeypatch)
    export_merged(base, tmp_path, out)
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert distance(logits(plain), logits(expected)) < 1e-5
    assert (plain.config.attention_bias, plain.config.mlp_bias) == announced


def test_a_bias_without_a_place_in_the_format_is_refused(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base = shifted_folder("mistral", ["model.layers.0.self_attn.v_proj"], tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"shift gives model.layers.0.self_attn.v_proj a bias.*mistral have no place"):
        export_merged(base, tmp_path, out)
    assert nothing_left(out)


def test_a_merge_that_changes_the_function_is_refused(
    base: ModelConfig, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(LoRA, "weight", lambda self, W: W + 1.01 * self.scale * self.B @ self.A)
    with pytest.raises(UserError, match="was not written: its logits differ"):
        export_merged(base, adapter, out)
    assert nothing_left(out)


def test_a_full_disk_leaves_nothing(
    base: ModelConfig, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved_adapter(base, tmp_path / "adapter")

    def full(model: PreTrainedModel, folder: Path, **how: Any) -> None:
        (folder / "config.json").touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(UserError, match=r"cannot write the merged model to .*no space is left on the disk"):
        export_merged(base, adapter, out)
    assert nothing_left(out)


def test_a_folder_that_reads_back_differently_is_refused(
    base: ModelConfig, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved_adapter(base, tmp_path / "adapter")
    save_pretrained = PreTrainedModel.save_pretrained

    def lossy(model: Any, folder: Path, **how: Any) -> None:
        weight = model.model.layers[1].mlp.gate_proj.weight
        kept = weight.data.clone()
        weight.data[0, 0] += 1
        save_pretrained(model, folder, **how)
        weight.data = kept

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lossy)
    with pytest.raises(UserError, match="its files read back as another model"):
        export_merged(base, adapter, out)
    assert nothing_left(out)


def test_weights_beyond_the_range_of_float16_are_refused(base: ModelConfig, out: Path, tmp_path: Path) -> None:
    adapter = saved_adapter(base, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.B"))
    save_file({**tensors, name: tensors[name] * 1e7}, adapter / "adapter.safetensors")
    reseal(adapter)
    with pytest.raises(UserError, match=r"q_proj.weight is beyond float16. Write bfloat16"):
        export_merged(base, adapter, out, dtype="float16")
    assert nothing_left(out)


@pytest.mark.parametrize("make", [lambda out: (out / "sub").mkdir(parents=True), lambda out: out.touch()])
def test_an_existing_folder_is_not_overwritten(
    base: ModelConfig, out: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(out)
    with pytest.raises(UserError, match="it exists"):
        export_merged(base, tmp_path, out)


def test_an_empty_folder_is_taken(base: ModelConfig, out: Path, tmp_path: Path) -> None:
    out.mkdir()
    export_merged(base, saved_adapter(base, tmp_path / "adapter"), out)
    assert (out / "model.safetensors").is_file()
