"""Adapters of HF PEFT, in and out: what PEFT loads of ours and what is loaded of PEFT's computes the same."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from subspace.adapters.inject import adapters, inject, trained_parameters
from subspace.errors import UserError
from subspace.integrations.peft.reading import CONFIG, PICKLED, TENSORS, load_peft
from subspace.integrations.peft.writing import export_peft
from tests.helpers.tiny_models import tiny, tiny_llama

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", reason="the oracle is a test requirement: pip install -r tests/requirements.txt")

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.tensor([[5, 9, 33, 7, 120, 64, 3, 17], [8, 8, 250, 31, 2, 90, 4, 11]])
MASK = torch.ones_like(IDS)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    return found[:, -IDS.shape[1] :]  # a prompt's own places come before


def perturb(model: nn.Module, size: float = 0.1) -> None:
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn_like(parameter)


def expect_same(ours: nn.Module, theirs: Any, base: nn.Module) -> None:
    own, their = logits(ours), logits(theirs)
    scale = float(their.abs().max())
    assert torch.allclose(own, their, atol=3e-5 * scale)
    assert (own - logits(base)).abs().max() > 0.01 * scale


WRITTEN: list[tuple[str, dict[str, Any], str]] = [
    ("lora", {"r": 4, "alpha": 8}, "LORA"),
    ("lora", {"r": 4, "alpha": 8, "rslora": True, "constraint": "orthogonal"}, "LORA"),
    ("dora", {"r": 4, "alpha": 8, "rslora": True}, "LORA"),
    ("dora", {"direction": False}, "LORA"),
    ("pissa", {"r": 4}, "LORA"),
    ("milora", {"r": 4}, "LORA"),
    ("moslora", {"r": 4}, "LORA"),
    ("trilora", {"r": 4}, "LORA"),
    ("adalora", {"r": 4}, "LORA"),
    ("flexlora", {"r": 4}, "LORA"),
    ("flora", {"r": 4}, "LORA"),
    ("lora-dash", {"r": 4, "d": 3}, "LORA"),
    ("spectral", {"r": 4}, "LORA"),
    ("ia3", {}, "IA3"),
    ("ia3", {"variant": "original"}, "IA3"),
    ("ssl", {}, "IA3"),
    ("prompt", {"n": 5}, "PROMPT_TUNING"),
    ("p-tuning", {"n": 5, "hidden": 16}, "PROMPT_TUNING"),
]


@pytest.mark.parametrize(("method", "settings", "kind"), WRITTEN, ids=lambda value: str(value)[:30])
def test_peft_loads_what_is_exported(method: str, settings: dict[str, Any], kind: str, tmp_path: Path) -> None:
    mine = tiny_llama()
    inject(mine, method, settings, targets=None if kind == "PROMPT_TUNING" or settings.get("variant") else TARGETS)
    perturb(mine)
    for adapter in adapters(mine).values():
        for name in ("U", "Vt"):  # of lora-dash, which are zero until its launch
            if method == "lora-dash":
                nn.init.normal_(getattr(adapter, name), std=0.1)
    config = export_peft(mine, tmp_path / "peft", base="someone/tiny")
    assert (config["peft_type"], config["base_model_name_or_path"]) == (kind, "someone/tiny")
    expect_same(mine, peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "peft"), tiny_llama())
    read = tiny_llama()
    load_peft(read, tmp_path / "peft")
    expect_same(read, mine, tiny_llama())
    assert not trained_parameters(read)


def test_loras_own_tensors_and_scale_return(tmp_path: Path) -> None:
    """Several ranks and scales too, by patterns; nothing is rounded on the way."""
    mine = tiny_llama()
    patterns: dict[str, dict[str, Any]] = {r"layers\.1\..*": {"r": 2}, "down_proj": {"alpha": 5.0}}
    inject(mine, "lora", {"r": 4, "alpha": 8}, targets=TARGETS, patterns=patterns)
    perturb(mine)
    config = export_peft(mine, tmp_path / "peft")
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 8, sorted(TARGETS))
    assert set(config["rank_pattern"].values()) == {2}
    expect_same(mine, peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "peft"), tiny_llama())
    read = tiny_llama()
    found = load_peft(read, tmp_path / "peft", trained=True)
    assert trained_parameters(read).keys() == trained_parameters(mine).keys()
    before: dict[str, Any] = {**adapters(mine)}
    for site, adapter in before.items():
        own: Any = found[site]
        assert torch.equal(own.A, adapter.A)
        assert torch.equal(own.B, adapter.B)
        assert own.scale == pytest.approx(adapter.scale, rel=1e-7)


def test_names_that_mean_other_layers_too_are_not_used(tmp_path: Path) -> None:
    mine = tiny_llama()
    inject(mine, "lora", {"r": 2}, targets=[r"layers\.0\.self_attn\.q_proj"])
    perturb(mine)
    assert export_peft(mine, tmp_path / "peft")["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    expect_same(mine, peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "peft"), tiny_llama())


READ: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True),
    "patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
        alpha_pattern={"q_proj": 16, "layers.0.mlp.down_proj": 1},
    ),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=TARGETS, total_step=9),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_peft_saved_is_loaded(name: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny_llama(), READ[name]())
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    mine = tiny_llama()
    load_peft(mine, tmp_path)
    expect_same(mine, theirs, tiny_llama())


def test_adalora_of_ranks_that_differ(tmp_path: Path) -> None:
    """A layer that lost all of its ranks, one that lost some: PEFT's scale stays that of the first rank."""
    theirs = peft.get_peft_model(tiny_llama(), READ["adalora"]())
    perturb(theirs)
    pattern = {}
    for number, (name, E) in enumerate((n, p) for n, p in theirs.named_parameters() if "lora_E" in n):
        kept = torch.tensor([i < number for i in range(4)])
        E.data *= kept[:, None]
        pattern[name.removeprefix("base_model.model.")] = kept.tolist()
    theirs.peft_config["default"].rank_pattern = pattern
    theirs.save_pretrained(tmp_path)
    mine = tiny_llama()
    assert sorted({len(adapter.A) for adapter in load_peft(mine, tmp_path).values()}) == [1, 2, 3, 4]  # type: ignore[arg-type]
    expect_same(mine, theirs, tiny_llama())


def build(architecture: str) -> nn.Module:
    if architecture != "gpt2":
        return tiny(architecture)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=2, initializer_range=0.15)
    return GPT2LMHeadModel(config).eval()  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("architecture", ["qwen2", "gemma", "gpt2"])
def test_other_models(architecture: str, tmp_path: Path) -> None:
    """Biases; an embedding that multiplies; weights that lie the other way."""
    kinds: dict[str, Any] = {
        "qwen2": ("lora", {"r": 3}, ["q_proj", "v_proj"]), "gemma": ("prompt", {"n": 4}, None),
        "gpt2": ("lora", {"r": 3}, ["c_attn", "c_proj"]),
    }  # fmt: skip
    method, settings, targets = kinds[architecture]
    mine = build(architecture)
    inject(mine, method, settings, targets=targets)
    perturb(mine)
    export_peft(mine, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(build(architecture), tmp_path / "peft")
    expect_same(mine, theirs, build(architecture))
    read = build(architecture)
    load_peft(read, tmp_path / "peft")
    expect_same(read, theirs, build(architecture))


def test_the_dora_authors_own_files(tmp_path: Path) -> None:
    """Their fork's names and shapes, pickled: scored here by the weights that their equation gives."""
    mine = tiny_llama()
    inject(mine, "dora", {"r": 4, "alpha": 8}, targets=["q_proj"])
    inject(mine, "dora", {"direction": False}, targets=["up_proj"])
    perturb(mine)
    theirs = {}
    for site, adapter in adapters(mine).items():
        names = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "weight_m_wdecomp.weight"}
        for name, tensor in adapter.trained().items():
            theirs[f"base_model.model.{site}.{names[name]}"] = tensor.detach()[:, None] if name == "m" else tensor.data
    torch.save(theirs, tmp_path / PICKLED)
    settings = {
        "peft_type": "DORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "dora_simple": True, "bias": "none",
        "Wdecompose_target_modules": ["up_proj"], "target_modules": ["q_proj"], "merge_weights": False,
        "enable_lora": None, "fan_in_fan_out": False, "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    read = tiny_llama()
    found = load_peft(read, tmp_path)
    assert {adapter.config.dropout_form for adapter in found.values()} == {"official"}
    expect_same(read, mine, tiny_llama())


# What is refused.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    theirs = peft.get_peft_model(tiny_llama(), READ["lora"]())
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"peft_type": "LOHA"}, "type LOHA"),
        ({"peft_type": None}, "none"),
        ({"peft_type": 3}, "peft_type"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias=all"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"a_setting_of_tomorrow": {"x": 1}}, "a_setting_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"alpha_pattern": {"(": 3}}, "no regular expression"),
        ({"lora_alpha": "much"}, "lora_alpha"),
    ],
    ids=str,
)
def test_settings_without_an_equal_are_refused(saved: Path, changed: dict[str, Any], said: str) -> None:
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**config, **changed}))
    with pytest.raises(UserError, match=said):
        load_peft(tiny_llama(), saved)


def test_settings_that_change_nothing_are_passed_by(saved: Path) -> None:
    """As of a start that was converted, and of versions that wrote more or less."""
    config = json.loads((saved / CONFIG).read_text())
    idle = {"init_lora_weights": None, "corda_config": {"x": 1}, "runtime_config": {"ephemeral_gpu_offload": True}}
    (saved / CONFIG).write_text(json.dumps({**config, **idle, "peft_version": "0.3.0", "lora_dropout": None}))
    assert load_peft(tiny_llama(), saved)


def test_tensors_without_a_place_are_refused(saved: Path) -> None:
    tensors = load_file(saved / TENSORS)
    broken: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"base_model.model.lm_head.weight": torch.ones(2)}, r"1 tensors without a place here, first .*lm_head"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2)}, "lora_embedding_A"),
        ({"base_model.model.model.layers.0.x.lora_A.weight": torch.ones(2, 64)}, "x lacks one of its tensors"),
        ({next(iter(tensors)): torch.full((4, 64), torch.nan)}, "is not finite"),
    ]
    for more, said in broken:
        save_file({**tensors, **more}, saved / TENSORS)
        with pytest.raises(UserError, match=said):
            load_peft(tiny_llama(), saved)
    config = json.loads((saved / CONFIG).read_text())
    first = next(iter(tensors)).rpartition(".lora_")[0]
    others: list[tuple[dict[str, Any], dict[str, torch.Tensor], str]] = [
        ({"use_dora": True}, {}, "takes lora_A, lora_B, lora_magnitude_vector"),
        ({}, {f"{first}.lora_magnitude_vector": torch.ones(64)}, "takes lora_A, lora_B$"),
        ({}, {f"{first}.lora_E": torch.ones(4, 1)}, "takes lora_A, lora_B$"),
        ({"peft_type": "IA3"}, {}, "takes ia3_l"),
        ({"peft_type": "PROMPT_TUNING"}, {}, "takes prompt_embeddings"),
        ({"peft_type": "ADALORA"}, {}, "takes lora_A, lora_B, lora_E"),
        ({}, {f"{first}.lora_A.weight": torch.tensor(1.0)}, "no matrix's"),
    ]
    for changed, more, said in others:
        alone = changed.get("peft_type") in ("IA3", "PROMPT_TUNING")  # which take none of LoRA's settings
        (saved / CONFIG).write_text(json.dumps(changed if alone else {**config, **changed}))
        save_file({**tensors, **more}, saved / TENSORS)
        with pytest.raises(UserError, match=said):
            load_peft(tiny_llama(), saved)
    (saved / CONFIG).write_text(json.dumps(config))
    save_file({name: t[..., :3].contiguous() for name, t in tensors.items()}, saved / TENSORS)
    with pytest.raises(UserError, match="does not fit this model in 12 tensors"):
        load_peft(tiny_llama(), saved)


def test_an_adapter_of_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="does not fit this model"):
        load_peft(build("gpt2"), saved)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"version https://git-lfs.github.com/spec/v1\n"])
def test_damaged_files_are_refused(saved: Path, content: bytes) -> None:
    (saved / TENSORS).write_bytes(content)
    with pytest.raises(UserError, match=TENSORS):
        load_peft(tiny_llama(), saved)
    (saved / TENSORS).unlink()
    with pytest.raises(UserError, match=PICKLED):
        load_peft(tiny_llama(), saved)
    (saved / PICKLED).write_bytes(content)
    with pytest.raises(UserError, match=PICKLED):
        load_peft(tiny_llama(), saved)


class _Runs:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_runs_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    (saved / TENSORS).unlink()
    torch.save({"base_model.model.x.lora_A.weight": _Runs()}, saved / PICKLED)
    with pytest.raises(UserError, match="cannot be read"):
        load_peft(tiny_llama(), saved)
    assert not (saved / "ran").exists()


@pytest.mark.parametrize("method", ["svdiff", "liera", "prefix", "houlsby", "bitfit", "parallel", "lora+mpc-n"])
def test_methods_without_an_equal_are_not_exported(method: str, tmp_path: Path) -> None:
    mine = tiny_llama()
    inject(mine, method)
    with pytest.raises(UserError, match=r"method \S+ at \S+ has no equal in PEFT.*subspace merge"):
        export_peft(mine, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_two_types_and_no_adapters_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapters"):
        export_peft(tiny_llama(), tmp_path / "peft")
    mine = tiny_llama()
    inject(mine, "lora", targets=["q_proj"])
    inject(mine, "ssl", targets=["up_proj"])
    with pytest.raises(UserError, match="IA3 and LoRA"):
        export_peft(mine, tmp_path / "peft")


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    model = tiny_llama()
    inject(model, "lora")
    with pytest.raises(UserError, match="it exists"):
        export_peft(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_tensors_that_zero3_holds_in_parts_are_not_exported(tmp_path: Path) -> None:
    model = tiny_llama()
    inject(model, "lora")
    next(iter(trained_parameters(model).values())).ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="ZeRO-3 holds them in parts.*subspace.save_adapter"):
        export_peft(model, tmp_path / "peft")


def test_experts_are_not_exported(tmp_path: Path) -> None:
    model = tiny("mixtral")
    inject(model, "lora", {"r": 2}, targets=[r"experts\.down_proj"])
    with pytest.raises(UserError, match="experts"):
        export_peft(model, tmp_path / "peft")
