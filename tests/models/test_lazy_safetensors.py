"""Loading: a quantised or spread model never takes the room of the whole one. By resident memory, so on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from subspace.models.config import ModelConfig
from subspace.models.lazy_safetensors import LazyTensor, streaming_safetensors
from subspace.models.loading import open_model
from tests.bench.random_model import write_random
from tests.helpers.tiny_models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
LAYERS, HIDDEN = 10, 2048  # 0.94 G numbers, 1.9 GB


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "DS_ACCELERATOR": "cpu", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def open_by_two(folder: Path) -> list[dict[str, Any]]:
    """Let two processes open the model that the folder holds, spread by ZeRO-3; return what they write, by rank."""
    tiny_llama(folder / "small")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command.append(str(ROOT / "tests" / "workers" / "load_model.py"))
    run(*command, str(folder / "small"), str(folder / "model"), str(folder), PYTHONPATH=str(ROOT))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.long
@pytest.mark.processes
def test_zero_3_reads_each_tensor_once_for_all_processes(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    ranks = open_by_two(tmp_path)
    assert [rank["read"] for rank in ranks] == [sum(tensor.nbytes for tensor in stored.values()), 0]


@pytest.mark.long
@pytest.mark.processes
def test_zero_3_holds_a_share_and_two_layers(tmp_path: Path) -> None:
    whole = write_random(tmp_path / "model", "llama-7b", num_hidden_layers=LAYERS, hidden_size=HIDDEN)
    assert whole > 10**9
    ranks = open_by_two(tmp_path)
    layer = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * 11008)
    assert [rank["read"] for rank in ranks] == [whole, 0]
    for rank in ranks:
        assert rank["dtypes"] == ["torch.bfloat16"]
        assert rank["held"] == pytest.approx(whole / 2, rel=0.01)
        assert rank["most"] < whole / 2 + 2 * layer
    assert ranks[0]["first"] == ranks[1]["first"] != 0


@pytest.mark.long
@pytest.mark.processes
def test_a_7b_model_trains_in_24_gb(tmp_path: Path) -> None:
    """Of LLaMA-7B's true shape, in NF4, with LoRA r=32 and 256 tokens."""
    if shutil.disk_usage(tmp_path).free < 20 * 10**9:
        pytest.skip("needs 20 GB of disk")
    write_random(tmp_path / "model", "llama-7b")
    found = json.loads(run("-m", "tests.bench.bench_7b", str(tmp_path / "model")))
    assert found["most_while_loading"] < 1.3 * found["loaded"]
    assert found["at_the_end"] < 8e9
    assert found["losses"][-1] < found["losses"][0]


def test_a_model_is_the_same_however_it_is_read(tmp_path: Path) -> None:
    expected = tiny_llama(tmp_path / "m")
    as_stored = open_model(ModelConfig(path=str(tmp_path / "m"), dtype="float32"))
    converted = open_model(ModelConfig(path=str(tmp_path / "m"), dtype="bfloat16"))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(as_stored.state_dict()[name], tensor)
        assert torch.equal(converted.state_dict()[name], tensor.bfloat16())


def test_a_tensor_is_read_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import modeling_utils

    file = tmp_path / "shard.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, file)
    reads: list[str] = []
    read = LazyTensor.read
    monkeypatch.setattr(LazyTensor, "read", lambda tensor: reads.append(tensor.key) or read(tensor))  # type: ignore[func-returns-value]
    with streaming_safetensors(tmp_path, mmap_dtype=None, lazy=True):
        unread: dict[str, Any] = modeling_utils.load_state_dict(str(file))
    assert (unread["a"].shape, unread["b"].dtype, reads) == ((2, 3), torch.bfloat16, [])
    here = torch.zeros(2, 3)
    here.copy_(unread["a"])
    assert torch.equal(here, load_file(file)["a"])
    assert reads == ["a"]
