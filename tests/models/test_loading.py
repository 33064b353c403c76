"""Opening models and tokenizers: what comes out, in every architecture and precision, and what is refused."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from subspace.adapters.inject import inject, trained_parameters
from subspace.adapters.penalties import with_penalties
from subspace.adapters.registry import list_methods, resolve_method
from subspace.errors import UserError
from subspace.kernels.attention import ATTENTION_NAME
from subspace.models import loading
from subspace.models.bitsandbytes_compat import storage_format
from subspace.models.config import ModelConfig
from subspace.models.frozen_weights import gather_weight_fp32
from subspace.models.loading import open_model, open_tokenizer, summarize_model
from tests.helpers.tiny_models import (
    ARCHITECTURES,
    TEXT,
    bpe_tokenizer,
    save,
    save_sentencepiece,
    sentencepiece_model,
    tiny,
    tiny_llama,
)

IDS = torch.tensor([[0, 9, 33, 7, 120, 64, 3, 17], [0, 8, 250, 31, 2, 90, 4, 11]])
# Every architecture, and LLaMA with tied embeddings and without grouped queries.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ARCHITECTURES},
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-ungrouped": ("llama", {"num_key_value_heads": 4}),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a variant. Shared: not to be changed."""

    @functools.cache
    def folder(variant: str) -> Path:
        architecture, overrides = VARIANTS[variant]
        path = tmp_path_factory.mktemp(variant)
        tiny(architecture, path, **overrides)
        return path

    return folder


@pytest.fixture
def llama(saved: Callable[[str], Path]) -> Path:
    return saved("llama")


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny LLaMA's folder that a test may spoil."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def config(folder: Path, **settings: Any) -> ModelConfig:
    attention = "eager" if "gemma2" in folder.name else "sdpa"  # transformers has no other for it
    return ModelConfig(path=str(folder), **{"dtype": "float32", "attention": attention, **settings})


def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS.to(model.device), use_cache=False).logits.float().cpu()  # type: ignore[no-any-return]


def loss(model: PreTrainedModel) -> Tensor:
    return with_penalties(F.cross_entropy(logits(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()), model)


def perturb(model: nn.Module, scale: float = 0.1) -> None:
    torch.manual_seed(11)
    for parameter in trained_parameters(model).values():
        parameter.data += scale * torch.randn_like(parameter)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


# Models


@pytest.mark.parametrize("variant", VARIANTS)
def test_opens_every_architecture_as_it_was_saved(saved: Callable[[str], Path], variant: str) -> None:
    architecture, overrides = VARIANTS[variant]
    model = open_model(config(saved(variant)))
    assert distance(logits(model), logits(tiny(architecture, **overrides))) < 1e-6
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", list_methods())
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_trains_in_every_architecture(saved: Callable[[str], Path], variant: str, method: str) -> None:
    model = open_model(config(saved(variant)))
    before = logits(model)
    inject(model, method)
    perturb(model)
    assert distance(logits(model), before) > 1e-3
    model.train()
    loss(model).backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert set(gradients) == trained_parameters(model).keys()
    late = resolve_method(method)[0].delayed_grad_params
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert all(gradient.any() for name, gradient in gradients.items() if name.rpartition(".")[2] not in late)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dtype_and_attention_are_what_was_asked_for(llama: Path, dtype: str, attention: str) -> None:
    model = open_model(config(llama, dtype=dtype, attention=attention))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    own = attention == "sdpa" and dtype == "bfloat16"  # it has one that is faster in training on a CPU
    assert model.config._attn_implementation == (ATTENTION_NAME if own else attention)
    assert distance(logits(model), logits(tiny_llama())) < {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}[dtype]


def test_gradient_checkpointing_changes_memory_only(llama: Path) -> None:
    results = []
    for checkpointing in (False, True):
        model = open_model(config(llama, gradient_checkpointing=checkpointing)).train()
        inject(model, "lora")
        perturb(model)
        runs: list[int] = []
        hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        loss(model).backward()  # type: ignore[no-untyped-call]
        hook.remove()
        results.append([parameter.grad for parameter in trained_parameters(model).values()])
        assert len(runs) == (2 if checkpointing else 1)  # it runs again in the backward pass
        assert model.config.use_cache is not checkpointing
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opening_says_nothing(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    open_model(config(llama))
    open_model(config(llama, quantize="nf4"))
    open_tokenizer(config(llama))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, ["LlamaForCausalLM, 0.1 M parameters, 0.5 MB on ", "float32, sdpa attention"]),
        ({"quantize": "nf4", "dtype": "bfloat16"}, ["0.1 M parameters, 0.1 MB", "bfloat16, linears in nf4"]),
    ],
)
def test_what_was_opened_is_described(llama: Path, settings: dict[str, Any], parts: list[str]) -> None:
    chosen = config(llama, **settings)
    opened = summarize_model(open_model(chosen), chosen)
    assert opened.parameters == sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert all(part in str(opened) for part in parts), opened


# Quantised models

QUANTIZED = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)]
quantized = pytest.mark.parametrize(("quantize", "double_quant"), QUANTIZED)


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """Return the plain LLaMA that has a quantised one's weights."""
    plain = tiny_llama()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            plain.get_submodule(name).weight.data = gather_weight_fp32(module).cpu()
    return plain


@quantized
def test_a_quantised_model_computes_with_its_dequantised_weights(
    llama: Path, quantize: str, double_quant: bool
) -> None:
    model = open_model(config(llama, quantize=quantize, double_quant=double_quant))
    kinds = {
        name.rpartition(".")[2]: storage_format(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)
    }
    assert kinds.pop("lm_head") == "plain"
    assert set(kinds.values()) == {"int8" if quantize == "int8" else "4bit"}
    # int8 rounds its inputs too
    assert distance(logits(model), logits(dequantized(model))) < (5e-2 if quantize == "int8" else 1e-5)
    assert 1e-3 < distance(logits(model), logits(tiny_llama())) < 0.6


@quantized
def test_gradients_on_a_quantised_base_are_those_of_its_weights(llama: Path, quantize: str, double_quant: bool) -> None:
    frozen = open_model(config(llama, quantize=quantize, double_quant=double_quant))
    gradients = []
    for model in (dequantized(frozen), frozen):
        inject(model, "lora")
        perturb(model)
        loss(model.train()).backward()  # type: ignore[no-untyped-call]
        found = [parameter.grad for parameter in trained_parameters(model).values()]
        gradients.append(torch.cat([gradient.flatten().cpu() for gradient in found if gradient is not None]))
    assert distance(gradients[1], gradients[0]) < (1e-1 if quantize == "int8" else 1e-5)


@quantized
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation_leaves_quantised_weights_alone(llama: Path, quantize: str, double_quant: bool, dtype: str) -> None:
    """A pass in eval mode must not repack 4-bit weights, as bitsandbytes does on CPUs with AVX512-BF16."""
    model = open_model(config(llama, quantize=quantize, double_quant=double_quant, dtype=dtype))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    before = {name: gather_weight_fp32(module) for name, module in layers.items()}
    with torch.no_grad():
        first, second = logits(model), logits(model)
    assert torch.equal(first, second)
    assert all(torch.equal(gather_weight_fp32(module), before[name]) for name, module in layers.items())
    # Also where the CPU here does not do it.
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())


# ZeRO-3

SHARDED = """
import os, sys, torch, deepspeed
from subspace.models.frozen_weights import weight_memory_bytes
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model, summarize_model
from subspace.distributed.zero import is_sharded
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
os.environ["LOCAL_RANK"] = "0"
torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{sys.argv[2]}")
deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
zero3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
config = ModelConfig(path=sys.argv[1], dtype="float32")
ids = torch.arange(8)[None]

model = open_model(config, zero3=zero3)
parameters = list(model.parameters())
assert all(is_sharded(p) and p.numel() == 0 and not p.requires_grad for p in parameters)
opened = summarize_model(model, config)
assert opened.sharded and opened.parameters == sum(p.ds_numel for p in parameters), opened
engine = deepspeed.initialize(model=model, config=zero3)[0]
sharded = engine(ids).logits

plain = open_model(config)  # the first one's setting must not leak
assert not any(is_sharded(p) for p in plain.parameters())
assert torch.allclose(plain(ids).logits, sharded, atol=1e-5)

quantized = open_model(ModelConfig(path=sys.argv[1], quantize="nf4"), zero3=zero3)  # whole until the engine starts
assert not any(is_sharded(p) for p in quantized.parameters())

config = ModelConfig(path=sys.argv[1], dtype="float32", quantize="int8")
whole = open_model(config)(ids).logits
packed = open_model(config, zero3=zero3)
held = weight_memory_bytes(packed)
layer = packed.model.layers[0].mlp.down_proj
zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
engine = deepspeed.initialize(model=packed, config=zero3)[0]
assert torch.allclose(engine(ids).logits, whole, atol=1e-5)
assert layer.weight.numel() == 0 and layer.state.CB is None and layer.weight.CB is None
assert weight_memory_bytes(packed) <= held  # of one process, so all of it, but once
"""


@pytest.mark.processes
def test_zero3_spreads_the_weights_while_they_load(llama: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SHARDED, llama, tmp_path / "store"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert result.returncode == 0, result.stderr[-2000:]


# Tokenizers


def test_a_llama3_tokenizer_pads_with_a_reserved_token(llama: Path) -> None:
    tokenizer = open_tokenizer(config(llama))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|reserved_special_token_0|>", 2)
    assert len(tokenizer) == tiny_llama().config.vocab_size
    ids = tokenizer(TEXT).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT


@pytest.mark.parametrize("text", [*TEXT.splitlines(), "caf\N{LATIN SMALL LETTER E WITH ACUTE}  12\n\n  x", "a "])
def test_a_sentencepiece_tokenizer_is_sentencepieces(copied: Path, text: str) -> None:
    save_sentencepiece(copied)
    tokenizer = open_tokenizer(config(copied))
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    assert tokenizer(text).input_ids == [reference.bos_id(), *reference.encode(text)]
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token_id) == ("<unk>", 0, 2)


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"pad_token": "<|end_of_text|>"}, "<|reserved_special_token_0|>"),  # pad = EOS would hide real ends
        ({"pad_token": "<|reserved_special_token_1|>"}, "<|reserved_special_token_1|>"),
        ({"pad_token": "<|beyond|>"}, "<|reserved_special_token_0|>"),  # without a row in the embedding
        ({"unk_token": "<|reserved_special_token_0|>"}, "<|reserved_special_token_0|>"),
    ],
)
def test_padding_is_a_token_of_its_own(copied: Path, special: dict[str, str], pad: str) -> None:
    bpe_tokenizer(**special).save_pretrained(copied)
    tokenizer = open_tokenizer(config(copied))
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token_id < tiny_llama().config.vocab_size


def use_up_reserved_tokens(folder: Path) -> None:
    """Make the reserved tokens of a tokenizer ordinary words, so that nothing in it is unused."""
    for file in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("<|reserved_special_token_", "<word"))
    text = (folder / "tokenizer.json").read_text()
    described = json.loads(text)
    described["added_tokens"] = [token for token in described["added_tokens"] if "word" not in token["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(described))


def drop_end_token(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_tokenizer_without_end_takes_the_models(copied: Path) -> None:
    drop_end_token(copied)
    tokenizer = open_tokenizer(config(copied))
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|end_of_text|>", 1)


# What cannot be opened


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lose_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1-of-2.safetensors").touch()


def make_encoder(folder: Path) -> None:
    described = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
    save(BertForMaskedLM(described), bpe_tokenizer(), folder)


def make_encoder_decoder(folder: Path) -> None:
    described = T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, vocab_size=8)
    save(T5ForConditionalGeneration(described), bpe_tokenizer(), folder)


def make_adapter(folder: Path) -> None:
    empty(folder)
    (folder / "adapter.json").touch()


def make_foreign_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").touch()


def make_run(folder: Path) -> None:
    empty(folder)
    (folder / "config.yaml").touch()


def make_two_ggufs(folder: Path) -> None:
    empty(folder)
    (folder / "a.gguf").touch()
    (folder / "b.gguf").touch()


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(text)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (empty, ["has no config.json", "safetensors", "subspace prepare"]),
        (remove("config.json"), ["has no config.json"]),
        (write("config.json", "{"), ["not a valid JSON file"]),
        (write("config.json", '{"model_type": "llamma"}'), ["`llamma`", "LLaMA, Mistral"]),
        (remove("model.safetensors"), ["has no weights", "model.safetensors"]),
        (cut_weights, ["cut or damaged", "download the folder again"]),
        (write("model.safetensors", "no tensors" * 9), ["cut or damaged"]),
        (lose_shard, ["lacks 1 of the 2 weight files", "model-2-of-2.safetensors"]),
        (drop_tensor, ["lack model.layers.1.mlp.up_proj.weight of LlamaForCausalLM (1 missing in all)"]),
        (partial(change_config, intermediate_size=64), ["do not fit its config.json", "(64, 128), not (64, 64)"]),
        (make_encoder, ["is an encoder (bert)", "LLaMA, Mistral"]),
        (make_encoder_decoder, ["is an encoder-decoder (t5)", "LLaMA, Mistral"]),
        (make_adapter, ["it holds an adapter", "the model that it was trained on"]),
        (make_foreign_adapter, ["an adapter of HF PEFT", "subspace import"]),
        (make_run, ["the folder of a run"]),
        (make_two_ggufs, ["several GGUF files", "a.gguf, b.gguf"]),
    ],
)
def test_a_bad_model_folder_is_refused(copied: Path, spoil: Callable[[Path], None], words: list[str]) -> None:
    spoil(copied)
    with pytest.raises(UserError) as caught:
        open_model(config(copied))
    assert all(word in str(caught.value) for word in [repr(str(copied)), *words]), caught.value


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (remove("tokenizer.json"), ["has no tokenizer", "tokenizer.model"]),
        (write("tokenizer.json", "{"), ["cannot open the tokenizer"]),
        (write("tokenizer.json", '{"version": "1.0"}'), ["cannot open the tokenizer"]),
        (use_up_reserved_tokens, ["has no pad token besides its end token '<|end_of_text|>'", '"pad_token"']),
    ],
)
def test_a_bad_tokenizer_is_refused(copied: Path, spoil: Callable[[Path], None], words: list[str]) -> None:
    spoil(copied)
    with pytest.raises(UserError) as caught:
        open_tokenizer(config(copied))
    assert all(word in str(caught.value) for word in [repr(str(copied)), *words]), caught.value


def test_a_tokenizer_without_any_end_is_refused(copied: Path) -> None:
    drop_end_token(copied)
    change_config(copied, eos_token_id=None)
    with pytest.raises(UserError, match=r"has no end token.*\"eos_token\""):
        open_tokenizer(config(copied))


@pytest.mark.parametrize(
    ("path", "words"),
    [("smollm2-135n", ["smollm2-135n", "smollm2-135m"]), ("nobody/nothing", ["nobody/nothing", "subspace prepare"])],
)
def test_an_unknown_model_is_refused(path: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        open_model(ModelConfig(path=path))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash attention is installed")
def test_a_missing_kernel_names_one_that_works(llama: Path) -> None:
    with pytest.raises(UserError, match="attention: flash_attention_2.*`attention: sdpa`"):
        open_model(config(llama, attention="flash_attention_2"))


def test_an_attention_that_an_architecture_lacks_names_one_that_works(saved: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="`attention: eager` works"):
        open_model(config(saved("gemma2"), attention="sdpa"))


def test_on_another_device_the_file_is_mapped(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading each tensor into memory first, which keeps a CPU's memory low, takes seven times as long."""
    monkeypatch.setattr(loading, "streaming_safetensors", Mock(side_effect=AssertionError("read tensor by tensor")))
    with pytest.raises(AssertionError, match="tensor by tensor"):
        open_model(ModelConfig(path=str(llama)))
    model = open_model(ModelConfig(path=str(llama)), where=torch.device("meta"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
