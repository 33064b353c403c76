"""Opening models and tokenizers: what comes out, in every architecture and precision, and what is refused."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from subspace.base import full_weight, storage
from subspace.errors import UserError
from subspace.inject import adapters, inject, trained_parameters
from subspace.method import methods, with_penalties
from subspace.model import ModelConfig, describe, open_model, open_tokenizer
from tests.tiny import (
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
    return ModelConfig(path=str(folder), **{"dtype": "float32", **settings})


def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS, use_cache=False).logits.float()  # type: ignore[no-any-return]


def loss(model: PreTrainedModel) -> Tensor:
    return with_penalties(F.cross_entropy(logits(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))


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
    assert torch.equal(logits(model), logits(tiny(architecture, **overrides)))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_trains_in_every_architecture(saved: Callable[[str], Path], variant: str, method: str) -> None:
    model = open_model(config(saved(variant)))
    before = logits(model)
    inject(model, method)
    perturb(model)
    assert distance(logits(model), before) > 1e-3
    model.train()
    loss(model).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = {f"{site}.{name}" for site, adapter in adapters(model).items() for name in adapter.trained()}
    assert set(gradients) == expected
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dtype_and_attention_are_what_was_asked_for(llama: Path, dtype: str, attention: str) -> None:
    model = open_model(config(llama, dtype=dtype, attention=attention))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.config._attn_implementation == attention
    assert distance(logits(model), logits(tiny_llama())) < {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}[dtype]


def test_gradient_checkpointing_changes_memory_only(llama: Path) -> None:
    results = []
    for checkpointing in (False, True):
        model = open_model(config(llama, gradient_checkpointing=checkpointing)).train()
        inject(model, "lora")
        perturb(model)
        layers = []
        hook = model.model.layers[0].register_forward_hook(lambda *_, seen=layers: seen.append(1))
        loss(model).backward()
        hook.remove()
        results.append([parameter.grad for parameter in trained_parameters(model).values()])
        assert len(layers) == (2 if checkpointing else 1)  # it runs again in the backward pass
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
        ({}, ["LlamaForCausalLM, 0.1 M parameters, 0.5 MB on cpu, float32, sdpa attention"]),
        ({"quantize": "nf4", "dtype": "bfloat16"}, ["0.1 M parameters, 0.1 MB", "bfloat16, linears in nf4"]),
    ],
)
def test_what_was_opened_is_described(llama: Path, settings: dict[str, Any], parts: list[str]) -> None:
    chosen = config(llama, **settings)
    opened = describe(open_model(chosen), chosen)
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
            plain.get_submodule(name).weight.data = full_weight(module)
    return plain


@quantized
def test_a_quantised_model_computes_with_its_dequantised_weights(
    llama: Path, quantize: str, double_quant: bool
) -> None:
    model = open_model(config(llama, quantize=quantize, double_quant=double_quant))
    kinds = {name.rpartition(".")[2]: storage(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds.pop("lm_head") == "plain"
    assert set(kinds.values()) == {"int8" if quantize == "int8" else "4bit"}
    # int8 rounds its inputs too
    assert distance(logits(model), logits(dequantized(model))) < (5e-2 if quantize == "int8" else 1e-5)
    assert 1e-3 < distance(logits(model), logits(tiny_llama())) < 0.6


@quantized
def test_gradients_on_a_quantised_base_are_those_of_its_weights(llama: Path, quantize: str, double_quant: bool) -> None:
    frozen = open_model(config(llama, quantize=quantize, double_quant=double_quant))
    models = [dequantized(frozen), frozen]
    for model in models:
        inject(model, "lora")
        perturb(model)
        loss(model.train()).backward()
    plain, packed = (torch.cat([p.grad.flatten() for p in trained_parameters(m).values()]) for m in models)
    assert distance(packed, plain) < (1e-1 if quantize == "int8" else 1e-5)


@quantized
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation_leaves_quantised_weights_alone(llama: Path, quantize: str, double_quant: bool, dtype: str) -> None:
    """A pass in eval mode must not repack 4-bit weights, as bitsandbytes does on CPUs with AVX512-BF16."""
    model = open_model(config(llama, quantize=quantize, double_quant=double_quant, dtype=dtype))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    before = {name: full_weight(module) for name, module in layers.items()}
    with torch.no_grad():
        first, second = logits(model), logits(model)
    assert torch.equal(first, second)
    assert all(torch.equal(full_weight(module), before[name]) for name, module in layers.items())


# ZeRO-3

SHARDED = """
import sys, torch, deepspeed
from subspace.model import ModelConfig, describe, open_model
from subspace.zero import is_sharded
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo", rank=0, world_size=1, init_method=f"file://{sys.argv[2]}", verbose=False)
zero3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
config = ModelConfig(path=sys.argv[1], dtype="float32")
ids = torch.arange(8)[None]

model = open_model(config, zero3=zero3)
parameters = list(model.parameters())
assert all(is_sharded(p) and p.numel() == 0 and not p.requires_grad for p in parameters)
opened = describe(model, config)
assert opened.sharded and opened.parameters == sum(p.ds_numel for p in parameters), opened
engine = deepspeed.initialize(model=model, config=zero3)[0]
sharded = engine(ids).logits

plain = open_model(config)  # the first one's setting must not leak
assert not any(is_sharded(p) for p in plain.parameters())
assert torch.allclose(plain(ids).logits, sharded, atol=1e-5)

quantized = open_model(ModelConfig(path=sys.argv[1], quantize="nf4"), zero3=zero3)  # whole until the engine starts
assert not any(is_sharded(p) for p in quantized.parameters())
"""


@pytest.mark.processes
def test_zero3_spreads_the_weights_while_they_load(llama: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SHARDED, llama, tmp_path / "store"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
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


@pytest.mark.parametrize("text", [*TEXT.splitlines(), "caf\N{LATIN SMALL LETTER E WITH ACUTE}  12\n\n  x", " a", "a "])
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


def rename_special_tokens(folder: Path) -> None:
    """Take the reserved tokens away from a tokenizer, so that nothing in it is unused."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<|reserved_special_token_", "word").replace("|>", "|>"))
