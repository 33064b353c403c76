"""What files say of themselves is looked at before they are loaded; every verb refuses the same in the same words."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from subspace import config as config_module
from subspace.doctor.base import Asked
from subspace.doctor.checks.storage import Prepared
from subspace.errors import UserError
from subspace.models import loading
from subspace.models.config import ModelConfig
from subspace.models.frozen_weights import gather_weight_fp32
from subspace.models.inspection import inspect_model, settle
from subspace.models.loading import open_model, open_shape, open_tokenizer, summarize_model
from subspace.planning.plan import build_plan
from subspace.run import train_run
from tests.helpers.material import make_material
from tests.helpers.tiny_models import ARCHITECTURES, SIZES, bpe_tokenizer, save, tiny, tiny_llama

WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


@pytest.fixture
def material(tmp_path: Path) -> Path:
    return make_material(tmp_path)


@pytest.fixture
def model(material: Path) -> Path:
    return material.parent / "model"


def with_tensors(**added: Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors: dict[str, Any] = {**load_file(folder / WEIGHTS), **{k.replace("__", "."): v for k, v in added.items()}}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def with_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **values}))

    return change


def with_text(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def cut_in_the_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])


def another_layer(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    more = {name.replace("layers.1", "layers.2"): t.clone() for name, t in tensors.items() if "layers.1" in name}
    save_file({**tensors, **more}, folder / WEIGHTS, metadata={"format": "pt"})


def quantized(method: str, **about: Any) -> Callable[[Path], None]:
    return with_config(quantization_config={"quant_method": method, **about})


REFUSED = {
    "a layer more": (another_layer, ["no place for model.layers.2", "(9 in all)", "Is num_hidden_layers 2 right"]),
    "biases": (
        with_tensors(model__layers__0__self_attn__q_proj__bias=torch.ones(64)),
        ["no place for model.layers.0.self_attn.q_proj.bias", "attention_bias"],
    ),
    "a tensor of another kind": (with_tensors(model__gate__weight=torch.ones(4)), ["no place for model.gate.weight"]),
    "a bias that is called as a mask": (
        with_tensors(model__layers__0__attn__bias=torch.ones(8)),
        ["layers.0.attn.bias"],
    ),
    "a layer less": (
        with_tensors(model__layers__1__mlp__up_proj__weight=None),
        ["lack model.layers.1.mlp.up_proj.weight of LlamaForCausalLM (1 missing in all)"],
    ),
    "no head": (with_tensors(lm_head__weight=None), ["lack lm_head.weight of LlamaForCausalLM"]),
    "another shape": (with_config(intermediate_size=64), ["do not fit its config.json", "(64, 128), not (64, 64)"]),
    "weights by pointer": (with_text(WEIGHTS, POINTER), [f"{WEIGHTS} in ", "is a pointer of Git LFS", "git lfs pull"]),
    "tokenizer by pointer": (with_text("tokenizer.json", POINTER), ["tokenizer.json in ", "is a pointer of Git LFS"]),
    "configuration by pointer": (with_text("config.json", POINTER), ["config.json in ", "is a pointer of Git LFS"]),
    "a cut file": (cut, [f"{WEIGHTS} in ", "is cut or damaged: it has ", "where its tensors take"]),
    "a file cut in its header": (cut_in_the_header, ["it has 100 bytes, fewer than the description of its tensors"]),
    "a page": (with_text(WEIGHTS, "<!DOCTYPE html><html>sign in</html>"), ["it begins with b'<!DOCTYP'"]),
    "gptq": (quantized("gptq", bits=4), ["quantised in 4 bits by gptq", "not read here", "nf4"]),
    "awq": (quantized("awq", bits=4, group_size=128), ["by awq", "not read here"]),
    "an unknown method": (quantized("dreamt"), ["by dreamt", "not read here"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_train_plan_doctor_and_loading_refuse_in_the_same_words(
    material: Path, model: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, words = REFUSED[kind]
    spoil(model)
    config = config_module.read_config(material, [f"runs={tmp_path}/runs", "name=run"])
    said = {}
    if kind != "tokenizer by pointer":
        said["loading"] = refusal(lambda: open_model(config.model))
        said["the shape"] = refusal(lambda: open_shape(config.model))
    monkeypatch.setattr(loading, "_load_weights", None)  # the others refuse before that
    said["train"] = refusal(lambda: train_run(config))
    said["plan"] = refusal(lambda: build_plan(config))
    (found,) = (v for k, v in Prepared().collect(Asked(0, 1, "x", config=config)).items() if k.startswith("model"))
    said["doctor"] = found["missing"]
    assert len(set(said.values())) == 1, said
    assert all(word in said["train"] for word in [repr(str(model)), *words]), said["train"]
    assert not (tmp_path / "runs").exists()


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_pickled_weights_are_looked_at_as_well(material: Path, model: Path) -> None:
    another_layer(model)
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"no place for model\.layers\.2.*9 in all"):
        inspect_model(ModelConfig(path=str(model)))
    (model / "pytorch_model.bin").write_bytes((model / "pytorch_model.bin").read_bytes()[:-5000])
    with pytest.raises(UserError, match="cannot open"):
        train_run(config_module.read_config(material))


# What does no harm.


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8)),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", torch.ones(1, 1, 16, 8)),
        ("model.layers.1.attn.masked_bias", torch.tensor(-1e4)),
        ("model.layers.1.attn.bias", torch.ones(1, 1, 16, 16)),
        ("model.embeddings.position_ids", torch.ones(1, 16)),
    ],
)
def test_what_is_computed_today_is_passed_over(model: Path, name: str, tensor: Tensor, caplog: Any) -> None:
    with_tensors(**{name: tensor})(model)
    assert isinstance(inspect_model(ModelConfig(path=str(model))), ModelConfig)
    open_model(ModelConfig(path=str(model)))
    assert not caplog.records


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["mtp.layers.0.mlp.up_proj.weight", "mtp.norm.weight"], "several tokens"),
        (["vision_tower.patch.weight"], "images or sound"),
        (["model.visual.blocks.0.weight"], "images or sound"),
    ],
)
def test_parts_that_the_language_model_works_without_are_told(
    model: Path, names: list[str], part: str, caplog: pytest.LogCaptureFixture
) -> None:
    with_tensors(**{name: torch.ones(4) for name in names})(model)
    with caplog.at_level(logging.WARNING):
        inspect_model(ModelConfig(path=str(model)))
        open_model(ModelConfig(path=str(model)))
    (note,) = (record.getMessage() for record in caplog.records)  # once
    assert f"{len(names)} tensors are not used" in note
    assert part in note


def test_a_layer_for_predicting_further_tokens_is_told(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    another_layer(model)
    with_config(num_nextn_predict_layers=1)(model)
    with caplog.at_level(logging.WARNING):
        inspect_model(ModelConfig(path=str(model)))
    assert "several tokens at once (model.layers.2." in caplog.text


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_as_it_is_saved_is_whole(architecture: str, tmp_path: Path) -> None:
    tiny(architecture, tmp_path / "model")
    config = ModelConfig(path=str(tmp_path / "model"))
    assert inspect_model(config) == settle(config) == config


EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_next": {
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


def with_experts(architecture: str, folder: Path) -> ModelConfig:
    """Save a tiny mixture of experts, each expert with tensors of its own in the file."""
    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        AutoConfig.for_model(architecture, **{**SIZES, **EXPERTS[architecture]})
    )
    save(model, bpe_tokenizer(), folder)
    assert any(".experts.3." in name for name in load_file(folder / WEIGHTS))
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize("architecture", EXPERTS)
def test_tensors_that_are_joined_as_they_load_have_their_place(architecture: str, tmp_path: Path) -> None:
    config = with_experts(architecture, tmp_path / "model")
    assert inspect_model(config) == config
    name = next(
        name for name in load_file(tmp_path / "model" / WEIGHTS) if "layers.1" in name and ".experts.3." in name
    )
    with_tensors(**{name.replace("layers.1", "layers.7"): torch.ones(4)})(tmp_path / "model")
    with pytest.raises(UserError, match="no place for model.layers.7"):
        inspect_model(config)


def test_layers_that_transformers_passes_over_in_silence_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_experts("qwen3_next", tmp_path / "model")
    with_tensors(**{"mtp.fc.weight": torch.ones(4)})(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        inspect_model(config)
    assert "1 tensors are not used, layers for predicting several tokens at once (mtp.fc.weight)" in caplog.text


# Empty special tokens.


@pytest.mark.parametrize("token", ["", {"content": "", "lstrip": False}])
def test_an_empty_special_token_is_refused(model: Path, token: Any) -> None:
    content = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**content, "eos_token": token}))
    with pytest.raises(UserError, match=r"has an empty eos_token.*tokenizer_config\.json.*or to null"):
        open_tokenizer(ModelConfig(path=str(model)))


def test_an_end_token_beyond_the_embedding_is_refused(model: Path) -> None:
    bpe_tokenizer(eos_token="<|another|>").save_pretrained(model)
    with pytest.raises(UserError, match=r"'<\|another\|>', its token 384, but the model's embedding has 384 rows"):
        open_tokenizer(ModelConfig(path=str(model)))


# Files that are quantised already.

KINDS = [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)]


def quantized_folder(folder: Path, quantize: str, *, double_quant: bool) -> Path:
    tiny_llama(folder / "plain")
    config = ModelConfig(path=str(folder / "plain"), dtype="float32", quantize=quantize, double_quant=double_quant)
    save(open_model(config), bpe_tokenizer(), folder / "packed")
    return folder / "packed"


@pytest.mark.parametrize(("quantize", "double_quant"), KINDS)
def test_quantised_files_are_read_and_recorded_as_what_they_are(
    tmp_path: Path, quantize: str, double_quant: bool
) -> None:
    packed = quantized_folder(tmp_path, quantize, double_quant=double_quant)
    plain = ModelConfig(path=str(tmp_path / "plain"), dtype="float32", quantize=quantize, double_quant=double_quant)
    whole = open_model(plain)
    for asked in ("none", quantize):
        config = ModelConfig(path=str(packed), dtype="float32", quantize=asked)
        settled = inspect_model(config)
        assert (settled.quantize, settled.double_quant) == (quantize, double_quant)
        opened = open_model(config)
        summary = summarize_model(opened, config)
        assert summary.quantize == quantize
        assert summary.parameters == sum(p.numel() for p in tiny_llama().parameters())
        for name, layer in opened.named_modules():
            if isinstance(layer, nn.Linear):
                assert torch.equal(gather_weight_fp32(layer), gather_weight_fp32(whole.get_submodule(name))), name
        x = torch.arange(9)[None]
        assert torch.equal(opened(x).logits, whole(x).logits)
    for asked in {"nf4", "fp4", "int8"} - {quantize}:
        with pytest.raises(
            UserError, match=f"asked for with `quantize: {asked}`, but its files are quantised already, in {quantize}"
        ):
            open_model(ModelConfig(path=str(packed), quantize=asked))
    if quantize != "int8" and not double_quant:
        with pytest.raises(UserError, match="double_quant: true`, but its files are quantised already"):
            open_model(ModelConfig(path=str(packed), quantize=quantize, double_quant=True))


def test_a_quantised_folder_computes_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    packed = quantized_folder(tmp_path, "nf4", double_quant=False)
    for dtype in (torch.float32, torch.bfloat16):
        opened = open_model(ModelConfig(path=str(packed), dtype=str(dtype).removeprefix("torch.")))
        layer: Any = opened.model.layers[0].mlp.up_proj
        assert layer.compute_dtype == dtype
        assert opened(torch.arange(4)[None]).logits.dtype == dtype


def test_a_plan_of_quantised_files_counts_them_as_they_are(tmp_path: Path) -> None:
    packed = quantized_folder(tmp_path, "nf4", double_quant=False)
    shape = open_shape(ModelConfig(path=str(packed), dtype="float32"))
    asked = open_shape(ModelConfig(path=str(tmp_path / "plain"), dtype="float32", quantize="nf4"))
    assert [type(m) for m in shape.modules()] == [type(m) for m in asked.modules()]


def test_a_run_on_quantised_files_records_them(tmp_path: Path) -> None:
    material = make_material(tmp_path)
    packed = quantized_folder(tmp_path / "q", "nf4", double_quant=False)
    folder = train_run(config_module.read_config(material, [f"model.path={packed}", f"runs={tmp_path}/runs", "name=q"]))
    assert config_module.read_config(folder / "config.yaml").model.quantize == "nf4"
    about = json.loads((folder / "environment.json").read_text())["model"]
    assert about["quantize"] == "nf4"
    assert about["parameters"] == sum(p.numel() for p in tiny_llama().parameters())  # of the base alone


def fp8_folder(folder: Path) -> dict[str, Tensor]:
    """Write a model whose linear layers are in fp8 with a scale for each block; return what they dequantise to."""
    model = tiny_llama(folder, hidden_size=256, intermediate_size=256)
    tensors, expected = {}, {}
    for name, tensor in model.state_dict().items():
        expected[name] = tensor
        if name.endswith("_proj.weight"):
            blocks = tensor.reshape(tensor.shape[0] // 32, 32, tensor.shape[1] // 32, 32)
            scale = blocks.abs().amax((1, 3)) / 448
            packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            tensors[name], tensors[f"{name}_scale_inv"] = packed.reshape(tensor.shape), scale
            expected[name] = (packed.float() * scale[:, None, :, None]).reshape(tensor.shape)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with_config(
        quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    )(folder)
    return expected


def test_fp8_files_are_opened_dequantised(tmp_path: Path) -> None:
    expected = fp8_folder(tmp_path / "fp8")
    config = ModelConfig(path=str(tmp_path / "fp8"), dtype="float32")
    opened = open_model(inspect_model(config))
    assert {p.dtype for p in opened.parameters()} == {torch.float32}
    for name, tensor in opened.state_dict().items():
        assert torch.allclose(tensor, expected[name], rtol=1e-2, atol=1e-4), name
    assert summarize_model(opened, config).quantize == "none"
    with pytest.raises(UserError, match="are quantised by fp8, and are opened dequantised"):
        open_model(ModelConfig(path=str(tmp_path / "fp8"), quantize="nf4"))


#: The sixteen numbers of four bits, of the OCP's microscaling formats (MX 1.0).
FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_mxfp4_files_are_opened_dequantised(tmp_path: Path) -> None:
    """As gpt-oss is published: two numbers in a byte, and an exponent for every 32 of them."""
    folder = tmp_path / "mxfp4"
    described = AutoConfig.for_model("gpt_oss", **{**SIZES, "intermediate_size": 64, "num_local_experts": 4})
    model = AutoModelForCausalLM.from_config(described)  # type: ignore[no-untyped-call]
    save(model, bpe_tokenizer(), folder)
    tensors, expected = load_file(folder / WEIGHTS), {}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = parameter.shape
            blocks = torch.randint(256, (experts, outer, inner // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 122, (experts, outer, inner // 32), generator=generator, dtype=torch.uint8)
            pairs = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], -1).flatten(-2)
            W = (pairs * 2.0 ** (scales.float() - 127)[..., None]).reshape(experts, outer, inner)
            expected[name] = W.transpose(1, 2)
            del tensors[name]
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    quantized("mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])(folder)
    config = ModelConfig(path=str(folder), dtype="float32", attention="eager")
    opened = open_model(inspect_model(config))
    for name, W in expected.items():
        assert torch.allclose(opened.get_parameter(name), W, rtol=1e-2), name
    assert summarize_model(opened, config).quantize == "none"
    assert torch.isfinite(opened(torch.arange(9)[None]).logits).all()


def test_a_copy_of_a_folder_is_inspected_anew(model: Path, tmp_path: Path) -> None:
    inspect_model(ModelConfig(path=str(model)))
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    another_layer(copy)
    with pytest.raises(UserError, match="no place"):
        inspect_model(ModelConfig(path=str(copy)))


def test_a_shape_needs_no_weights(model: Path, tmp_path: Path) -> None:
    """A folder with a configuration alone can be planned and filled, but not opened."""
    (tmp_path / "bare").mkdir()
    shutil.copy(model / "config.json", tmp_path / "bare")
    bare = ModelConfig(path=str(tmp_path / "bare"))
    shape = open_shape(bare)
    assert sum(p.numel() for p in shape.parameters()) == sum(
        p.numel() for p in open_model(ModelConfig(path=str(model))).parameters()
    )
    with pytest.raises(UserError, match="has no weights"):
        open_model(bare)
