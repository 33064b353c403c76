"""A base is what its bytes are: wherever they lie and however they are cut into files, and nothing else is it."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from subspace.errors import UserError
from subspace.models import base_record as module
from subspace.models.base_record import BaseRecord, base_record, check_base, identify, note_base
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model
from tests.helpers.tiny_models import bpe_tokenizer, save_sentencepiece, tiny, tiny_llama

WEIGHTS = "model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def other(base: Path, tmp_path: Path) -> Path:
    """Return a copy of the base that a test may change."""
    return Path(shutil.copytree(base, tmp_path / "other"))


def record(folder: Path) -> BaseRecord:
    return identify(ModelConfig(path=str(folder)))


def compare(one: Path, two: Path) -> str | None:
    return check_base("the adapter", record(one).as_dict(), record(two), "")


# The same base.


def shard(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors, key=lambda name: name[::-1])
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def add_other_files(folder: Path) -> None:
    (folder / "README.md").write_text("a card")
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")


def write_anew(folder: Path) -> None:
    """Write the same JSON as another version of a library would: other spaces, another order, its own version."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        content |= {"transformers_version": "4.0", "name_or_path": "elsewhere"} if "config" in name else {}
        (folder / name).write_text(json.dumps(dict(sorted(content.items(), reverse=True))))


def touch(folder: Path) -> None:
    os.utime(folder / WEIGHTS, (0, 0))


@pytest.mark.parametrize("change", [shard, pickle, add_other_files, write_anew, touch])
def test_equal_contents_are_one_base_wherever_they_lie(base: Path, other: Path, change: Callable[[Path], None]) -> None:
    change(other)
    assert compare(base, other) is None
    assert record(base).short().keys() == {"path", "weights", "layout", "tokenizer"}


# Another one.


def flip_a_bit(folder: Path, name: str = "model.layers.1.mlp.up_proj.weight") -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name].view(torch.int32)[3, 5] ^= 1
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def exchange_two_rows(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    rows = tensors["model.embed_tokens.weight"]
    rows[[4, 5]] = rows[[5, 4]]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def round_to_bfloat16(folder: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_json(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **values}))

    return change


def exchange_two_tokens(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip_a_bit, "its weights differ"),
        (exchange_two_rows, "its weights differ"),
        (round_to_bfloat16, "its tensors' names, dtypes or shapes differ"),
        (lambda folder: tiny_llama(folder, seed=7), "its weights differ"),
        (exchange_two_tokens, "its tokenizer differs"),
        (save_sentencepiece, "its tokenizer differs"),
        (
            lambda folder: bpe_tokenizer(eos_token="<|reserved_special_token_1|>").save_pretrained(folder),
            "its tokenizer",
        ),
        (
            change_json("config.json", rms_norm_eps=1e-3),
            "its configuration differs (rms_norm_eps 0.001, recorded 1e-06)",
        ),
    ],
)
def test_each_difference_is_told(base: Path, other: Path, change: Callable[[Path], Any], words: str) -> None:
    change(other)
    with pytest.raises(UserError) as caught:
        compare(base, other)
    assert words in str(caught.value)
    assert "; its" not in str(caught.value)  # nothing else
    assert f"Open that one (model.path={base})" in str(caught.value)


def test_bytes_exchanged_with_the_times_of_the_old_ones_are_noticed(base: Path, other: Path) -> None:
    """Not even the same size, inode and time of writing hide a change: a program cannot set the inode's own time."""
    before, at = record(base), (base / WEIGHTS).stat()
    flip_a_bit(other)
    with (base / WEIGHTS).open("r+b") as opened:
        opened.write((other / WEIGHTS).read_bytes())
    os.utime(base / WEIGHTS, ns=(at.st_atime_ns, at.st_mtime_ns))
    now = (base / WEIGHTS).stat()
    assert (now.st_size, now.st_ino, now.st_mtime_ns) == (at.st_size, at.st_ino, at.st_mtime_ns)
    assert record(base).weights != before.weights


# What it costs.


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Return the tensors that were read from files, as they are; with a cache of its own, and files taken for old."""
    reads: list[str] = []
    original = module._hash_range

    def counting(file: Path, start: int, end: int) -> str:
        reads.append(file.name)
        return original(file, start, end)

    monkeypatch.setenv("SUBSPACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SETTLED", -60.0)
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.setattr(module, "_hash_range", counting)
    return reads


def test_a_file_is_read_once_for_all_processes(base: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = record(base)
    assert len(read) == len(load_file(base / WEIGHTS))
    monkeypatch.setattr(module, "_known", {})  # another process
    assert record(base) == first
    assert len(read) == len(load_file(base / WEIGHTS))


def test_of_several_that_ask_at_once_one_reads(base: Path, read: list[str]) -> None:
    found: list[BaseRecord] = []
    threads = [threading.Thread(target=lambda: found.append(record(base))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 4
    assert len(read) == len(load_file(base / WEIGHTS))


def test_a_file_that_was_just_written_is_not_kept(base: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change again without its times showing that."""
    monkeypatch.setattr(module, "SETTLED", 60.0)
    record(base)
    monkeypatch.setattr(module, "_known", {})
    record(base)
    assert len(read) == 2 * len(load_file(base / WEIGHTS))


@pytest.mark.parametrize("spoil", ["a file for a folder", "junk"])
def test_a_cache_that_cannot_be_used_is_done_without(
    base: Path, read: list[str], tmp_path: Path, spoil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = record(base)
    monkeypatch.setattr(module, "_known", {})
    entries = tmp_path / "cache" / "checksums"
    if spoil == "junk":
        for entry in entries.iterdir():
            entry.write_text('{"file": ')
    else:
        shutil.rmtree(entries)
        entries.write_text("")
    assert record(base) == first


# Models that are open already.


def test_a_model_s_record_is_of_the_files_that_it_was_opened_from(base: Path) -> None:
    ours = open_model(ModelConfig(path=str(base), dtype="bfloat16"))
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    assert base_record(ours) == base_record(theirs) == record(base)


def test_files_that_change_under_an_open_model_are_noticed(base: Path) -> None:
    model = open_model(ModelConfig(path=str(base)))
    flip_a_bit(base)
    with pytest.raises(UserError, match="were changed after it was opened"):
        base_record(model)


def test_a_model_that_came_from_no_files_is_its_tensors(base: Path) -> None:
    """Saved and opened it is the same base; in another dtype its values cannot be compared, which is told."""
    for model, same in ((tiny_llama(), True), (tiny_llama(seed=3), False)):
        note_base(model)
        before = base_record(model)
        assert before is not None
        assert before.in_memory
        if same:
            assert check_base("it", before.as_dict(), record(base), "") is None
        else:
            with pytest.raises(UserError, match="its weights differ"):
                check_base("it", before.as_dict(), record(base), "")
    halves = tiny_llama(seed=3).bfloat16()
    note_base(halves)
    notice = check_base("it", record(base).as_dict(), base_record(halves), "")
    assert notice == "it: the tensors of its base are named or held otherwise in this model, so they were not compared"


def test_tied_weights_count_once(tmp_path: Path) -> None:
    model = tiny("gemma", tmp_path / "tied")
    note_base(model)
    before = base_record(model)
    assert before is not None
    assert check_base("it", before.as_dict(), record(tmp_path / "tied"), "") is None


def test_what_has_no_record_is_told(base: Path) -> None:
    assert "did not record its base" in (check_base("the adapter", None, record(base), "") or "")
    assert "not known" in (check_base("the adapter", record(base).as_dict(), None, "") or "")
