"""The files of a merged folder besides its weights: the base's, byte for byte, and nothing of this machine."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from subspace.adapters import export
from subspace.adapters.exchange import base_files
from subspace.adapters.exchange.older_readers import readable_config, readable_tokenizer_config
from subspace.adapters.export import export_merged
from subspace.adapters.inject import inject, trained_parameters
from subspace.adapters.serialization import save_adapter
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model
from tests.helpers.tiny_models import save_sentencepiece, tiny, tiny_llama

CARD = """---
license: llama3
license_link: LICENSE
language:
- en
base_model: somebody/else
---
# A base
"""
#: What a base may have beside its weights, and what of it a merged folder has.
KEPT = {
    "LICENSE": "You may.\n", "USE_POLICY.md": "Be good.\r\n", "tokenizer.model": "\x00\x01 of another reader",
    "special_tokens_map.json": '{"bos_token":   "<|begin_of_text|>"}', "chat_template.jinja": "{{ messages }}\n",
    "generation_config.json": '{ "temperature": 0.6, "do_sample": true, "eos_token_id": [1, 2] }',
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}  # fmt: skip
LEFT = {
    ".gitattributes": "x", ".env": "TOKEN=secret", "prepared.json": "{}", "quantize_config.json": "{}",
    "optimizer.pt": "x", "consolidated.00.pth": "x", "original/params.json": "{}", "logs/run.log": "/home/me",
    "model.safetensors.index.json.bak.partial": "x",
}  # fmt: skip


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())


def as_written_by_version_4(folder: Path, **settings: Any) -> None:
    """Write a configuration and a tokenizer as transformers 4 does, with keys that nobody reads."""
    found = json.loads((folder / "config.json").read_text())
    rope = found.pop("rope_parameters")
    written = {
        "_name_or_path": "/home/somebody/base", "architectures": ["LlamaForCausalLM"], "of_nobody": 1, **found,
        "rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": found["dtype"],
        "transformers_version": "4.40.1", **settings,
    }  # fmt: skip
    del written["dtype"]
    (folder / "config.json").write_text(json.dumps(written, indent=4))
    tokens = {str(i): {"content": text, "special": True} for i, text in enumerate(("<|begin_of_text|>",))}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "added_tokens_decoder": tokens, "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
                "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192,
            }
        )
    )  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> ModelConfig:
    """Return a tiny LLaMA in a folder as version 4 and its users leave one."""
    tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    as_written_by_version_4(tmp_path / "base")
    put(tmp_path / "base", {**KEPT, **LEFT, "README.md": CARD})
    return ModelConfig(path=str(tmp_path / "base"), dtype="float32")


def adapter_of(base: ModelConfig, folder: Path, method: str = "lora", targets: Any = None) -> Path:
    model = open_model(base)
    inject(model, method, targets=targets)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.05
    return save_adapter(model, folder)


@pytest.fixture
def adapter(base: ModelConfig, tmp_path: Path) -> Path:
    return adapter_of(base, tmp_path / "run" / "adapter")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged"


def files_of(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_files_of_the_base_are_kept_byte_for_byte(base: ModelConfig, adapter: Path, out: Path) -> None:
    export_merged(base, adapter, out)
    there = Path(base.path)
    for name in (*KEPT, "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (there / name).read_bytes(), name
    assert (out / "BASE_README.md").read_bytes() == CARD.encode()
    own = {"config.json", "model.safetensors", "merge.json", "README.md", "BASE_README.md"}
    assert files_of(out) == {*KEPT, *own, "tokenizer.json", "tokenizer_config.json"}


def test_the_configuration_is_the_bases_but_for_what_merging_changes(
    base: ModelConfig, adapter: Path, out: Path, tmp_path: Path
) -> None:
    export_merged(base, adapter, out)
    theirs = json.loads((Path(base.path) / "config.json").read_text())
    del theirs["_name_or_path"]
    expected = {**theirs, "torch_dtype": "float32"}
    found = json.loads((out / "config.json").read_text())
    assert found == expected
    assert list(found) == list(expected)
    export_merged(base, adapter, tmp_path / "half", dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == theirs


def test_a_configuration_that_merging_does_not_change_is_copied(out: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base")
    as_written_by_version_4(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k[0] != "_"}, indent=7))
    base = ModelConfig(path=str(tmp_path / "base"), dtype="float32")
    export_merged(base, adapter_of(base, tmp_path / "adapter"), out)
    assert (out / "config.json").read_bytes() == file.read_bytes()
    assert not (out / "generation_config.json").exists() or (tmp_path / "base" / "generation_config.json").exists()


@pytest.mark.parametrize(
    ("settings", "method", "targets", "key", "value"),
    [
        ({"tie_word_embeddings": True}, "lora", ["lm_head"], "tie_word_embeddings", False),
        ({}, "bitfit", ["q_proj"], "attention_bias", True),
        ({}, "bitfit", ["up_proj"], "mlp_bias", True),
    ],
)
def test_what_merging_changes_is_changed(
    out: Path, tmp_path: Path, settings: dict[str, Any], method: str, targets: list[str], key: str, value: bool
) -> None:
    tiny_llama(tmp_path / "base", **settings)
    as_written_by_version_4(tmp_path / "base", of_nobody=2)
    base = ModelConfig(path=str(tmp_path / "base"), dtype="float32")
    export_merged(base, adapter_of(base, tmp_path / "adapter", method, targets), out)
    theirs = json.loads((tmp_path / "base" / "config.json").read_text())
    del theirs["_name_or_path"]
    assert json.loads((out / "config.json").read_text()) == {**theirs, key: value}
    assert theirs[key] is not value


def test_nothing_of_this_machine_is_in_a_merged_folder(
    base: ModelConfig, adapter: Path, out: Path, tmp_path: Path
) -> None:
    export_merged(base, adapter, out)
    for file in files_of(out):
        content = (out / file).read_bytes()
        for trace in (str(tmp_path).encode(), b"/home", os.uname().nodename.encode(), b"secret"):
            assert trace not in content, f"{trace!r} in {file}"


def test_a_card_says_how_the_folder_was_made(base: ModelConfig, adapter: Path, out: Path) -> None:
    report = export_merged(base, adapter, out)
    card, about = (out / "README.md").read_text(), json.loads((out / "merge.json").read_text())
    header = card.split("---\n")[1].splitlines()
    assert header[:3] == ["license: llama3", "license_link: LICENSE", "library_name: transformers"]
    assert not any(line.startswith("base_model") for line in header)  # a folder here is not a name on the hub
    assert (about["base"], about["adapter"]) == ("base", "run/adapter")
    assert about["methods"][0]["method"] == "lora"
    for words in (
        "`base`",
        "lora",
        f"r {about['methods'][0]['settings']['r']}",
        about["adapter_sha256"],
        about["base_record"]["weights"],
        "BASE_README.md",
    ):
        assert words in card
    assert f"{report.update:.2e}" in card


def test_a_base_of_the_hub_is_named_as_there(tmp_path: Path, out: Path) -> None:
    """The hub's cache: a folder of links to blobs beside it."""
    cached = tmp_path / "models--some-lab--tiny.base"
    snapshot = cached / "snapshots" / ("a" * 40)
    tiny_llama(cached / "blobs")
    put(cached / "blobs", {"LICENSE": "You may."})
    snapshot.mkdir(parents=True)
    for file in (cached / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    base = ModelConfig(path=str(snapshot), dtype="float32")
    export_merged(base, adapter_of(base, tmp_path / "adapter"), out)
    assert "base_model: some-lab/tiny.base\n" in (out / "README.md").read_text()
    assert json.loads((out / "merge.json").read_text())["base_record"]["commit"] == "a" * 40
    assert (out / "LICENSE").read_text() == "You may."
    assert not any(file.is_symlink() for file in out.rglob("*"))


def test_a_link_to_elsewhere_is_not_followed(
    base: ModelConfig, adapter: Path, out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "key").write_text("secret of this machine")
    (Path(base.path) / "NOTES.txt").symlink_to(tmp_path / "key")
    export_merged(base, adapter, out)
    assert not (out / "NOTES.txt").exists()
    assert "NOTES.txt is a link to" in caplog.text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tokenizer.json", "tokenizer.json is a link to"),
        ("chat_template.jinja", r"its tokenizer's chat_template is \{'tools'.*the base's is \{'default'"),
    ],
)
def test_a_tokenizer_that_is_not_the_bases_is_refused(
    base: ModelConfig, adapter: Path, out: Path, tmp_path: Path, name: str, words: str
) -> None:
    file = Path(base.path) / name
    (tmp_path / "elsewhere").mkdir()
    file.rename(tmp_path / "elsewhere" / name)
    file.symlink_to(tmp_path / "elsewhere" / name)
    with pytest.raises(UserError, match=words):
        export_merged(base, adapter, out)
    assert not out.exists()


def test_the_proof_looks_at_the_tokenizers_ids(
    base: ModelConfig, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = base_files.copy_base_files

    def lossy(files: Any, folder: Path) -> None:
        copy(files, folder)
        written = json.loads((folder / "tokenizer.json").read_text())
        del written["post_processor"]  # which puts BOS first
        (folder / "tokenizer.json").write_text(json.dumps(written))

    monkeypatch.setattr(export, "copy_base_files", lossy)
    with pytest.raises(UserError, match=r"its tokenizer reads 'The capital of France.* as \[\d"):
        export_merged(base, adapter, out)
    assert not out.exists()


@pytest.mark.parametrize("method", ["nf4", "fp8"])
def test_what_described_quantised_weights_is_gone(out: Path, tmp_path: Path, method: str) -> None:
    tiny_llama(tmp_path / "base")
    as_written_by_version_4(tmp_path / "base")
    put(tmp_path / "base", {"hf_quant_config.json": "{}"})
    config = ModelConfig(path=str(tmp_path / "base"), dtype="float32", quantize="nf4")
    export_merged(config, adapter_of(config, tmp_path / "adapter"), out)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    described = {"quantization_config": {"quant_method": method}, "torch_dtype": "float16", "rope_theta": 5.0}
    nested = base_files._plain({**described, "text_config": described, "ids": [1]}, "float32")
    plain = {"torch_dtype": "float32", "rope_theta": 5.0}
    assert nested == {**plain, "text_config": plain, "ids": [1]}
    assert not (out / "hf_quant_config.json").exists()


def test_a_sentencepiece_tokenizer_leaves_as_it_is(out: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base")
    save_sentencepiece(tmp_path / "base")
    base = ModelConfig(path=str(tmp_path / "base"), dtype="float32")
    export_merged(base, adapter_of(base, tmp_path / "adapter"), out)
    names = {"tokenizer.model", "tokenizer_config.json"}
    assert all((out / name).read_bytes() == (tmp_path / "base" / name).read_bytes() for name in names)
    assert "tokenizer.json" not in files_of(out)


def test_modes_are_the_umasks(base: ModelConfig, adapter: Path, out: Path) -> None:
    before = os.umask(0o027)
    try:
        export_merged(base, adapter, out)
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    modes = {stat.S_IMODE(file.stat().st_mode) for file in out.rglob("*") if file.is_file()}
    assert modes == {0o640}


# What version 5 wrote, for version 4


def test_a_folder_that_version_5_wrote_is_made_readable_for_version_4(out: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base")
    file = tmp_path / "base" / "tokenizer_config.json"
    settings = {**json.loads(file.read_text()), "extra_special_tokens": ["<|reserved_special_token_0|>"]}
    file.write_text(json.dumps(settings))
    assert settings["tokenizer_class"] == "TokenizersBackend"
    base = ModelConfig(path=str(tmp_path / "base"), dtype="float32")
    export_merged(base, adapter_of(base, tmp_path / "adapter"), out)
    written, config = (json.loads((out / name).read_text()) for name in ("tokenizer_config.json", "config.json"))
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|reserved_special_token_0|>"]
    assert not {"backend", "is_local", "extra_special_tokens"} & written.keys()
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    text = "a<|reserved_special_token_0|>b"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(base.path)(text)


def test_ropes_are_said_in_both_versions_words() -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    assert readable_config({"rope_parameters": {"rope_theta": 5e5, **llama3}}) == {
        "rope_theta": 5e5,
        "rope_scaling": llama3,
        "rope_parameters": {"rope_theta": 5e5, **llama3},
    }
    plain = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
    assert (
        readable_config({"rope_parameters": plain}).items() >= {"rope_theta": 1e4, "partial_rotary_factor": 0.5}.items()
    )
    kinds = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    found = readable_config({"text_config": {"rope_parameters": kinds}})["text_config"]
    assert (found["rope_theta"], found["rope_local_base_freq"]) == (1e6, 1e4)
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    older = {"rope_theta": 7.0, "rope_scaling": {"type": "dynamic"}, "vocab_size": 3}
    assert readable_config(older) == older
    qwen = {"num_local_experts": 4, "transformers_version": "5.23.0"}
    assert readable_config(qwen) == {"num_experts": 4, **qwen}
    whole = {"text_config": {"num_local_experts": 4}, "transformers_version": "5.0.0"}
    assert readable_config(whole)["text_config"]["num_experts"] == 4
    assert readable_config(older | {"num_local_experts": 4}) == older | {"num_local_experts": 4}
    both = {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 8.0}}
    assert readable_config(both) == both  # the file's own words stay


def test_a_tokenizer_of_version_4_is_left_alone() -> None:
    for settings in ({"tokenizer_class": "LlamaTokenizer"}, {"extra_special_tokens": {"image": "<image>"}}, {}):
        assert readable_tokenizer_config(settings, whole=True) is settings
    kept = readable_tokenizer_config({"backend": "tokenizers", "tokenizer_class": "LlamaTokenizer"}, whole=False)
    assert kept == {"tokenizer_class": "LlamaTokenizer"}


@pytest.mark.parametrize("architecture", ["gemma3_text", "phi3", "mixtral"])
def test_tensors_keep_the_names_that_they_have_in_the_bases_files(out: Path, tmp_path: Path, architecture: str) -> None:
    from safetensors.torch import load_file

    if architecture == "mixtral":
        tiny(architecture, tmp_path / "base", vocab_size=384)
    else:
        tiny(architecture, tmp_path / "base")
    base = replace(ModelConfig(path=str(tmp_path / "base")), dtype="float32")
    export_merged(
        base, adapter_of(base, tmp_path / "adapter", targets=["q_proj" if architecture != "phi3" else "qkv_proj"]), out
    )
    found, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "base"))
    assert found.keys() == theirs.keys()
    changed = {name.rsplit(".", 2)[-2] for name, tensor in theirs.items() if not torch.equal(tensor, found[name])}
    assert changed == {"q_proj" if architecture != "phi3" else "qkv_proj"}
