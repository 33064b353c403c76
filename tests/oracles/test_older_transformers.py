"""Merged folders in transformers 4.57, which servers have: the same logits and token ids as here.

It has a folder of its own, which is filled at the first use and kept in the user's cache. Bases are such as version 4
wrote, and such as version 5 did.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from subspace.adapters.export import export_merged
from subspace.adapters.inject import inject, trained_parameters
from subspace.adapters.serialization import save_adapter
from subspace.common.paths import REPOSITORY
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model, open_tokenizer
from tests.helpers.tiny_models import ARCHITECTURES, MIXTURES, SIZES, bpe_tokenizer, sentencepiece_model, tiny

pytestmark = [pytest.mark.long, pytest.mark.processes]

PACKAGES = ["transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2"]
IDS = [[5, 9, 33, 7, 120, 64, 3, 17] * 8, [8, 8, 250, 31, 2, 90, 4, 11] * 8]
TEXTS = ["The correct answer is option2.", " two  spaces\n\n1,234 été 東京", "a<|reserved_special_token_0|>b</s>c"]
WRITTEN_BY_4 = [*ARCHITECTURES, "mixtral", "qwen3_moe", "gpt_oss"]
WRITTEN_BY_5 = [*ARCHITECTURES, "mixtral", "qwen3_moe"]
CASES = [*(f"{name}-4" for name in (*WRITTEN_BY_4, "sentencepiece")), *(f"{name}-5" for name in WRITTEN_BY_5)]


@pytest.fixture(scope="module")
def packages() -> Path:
    """Return the folder of the older transformers and what it needs."""
    folder = platformdirs.user_cache_path("subspace") / "oracles" / PACKAGES[0].replace("==", "-")
    if not (folder / "complete").exists():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *PACKAGES]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"needs {' '.join(PACKAGES)} in {folder}, and no registry gave them: {done.stderr[-300:]}")
        (folder / "complete").touch()
    return folder


def do(packages: Path, folder: Path, jobs: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Have jobs done by the older version; return the ids of texts and the logits by the jobs' names."""
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(REPOSITORY / "tests/workers/older_transformers.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "found.json").read_text()), load_file(folder / "found.safetensors")


def merged(base: Path, out: Path) -> Tensor:
    """Merge an adapter into a base; return the unmerged model's logits."""
    config = ModelConfig(path=str(base), dtype="float32", attention="eager")  # which all of them have
    model: Any = open_model(config)
    inject(model, "lora", targets="all-linear")
    generator = torch.Generator().manual_seed(3)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    adapter = save_adapter(model, out.with_name(f"{out.name}-adapter"))
    with torch.no_grad():
        logits: Tensor = model(torch.tensor(IDS), use_cache=False).logits
    export_merged(config, adapter, out)
    return logits


Found = dict[str, tuple[Tensor, Tensor | str, Any, Any]]


@pytest.fixture(scope="module")
def found(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Return for each case: logits here and there, and ids here and there (or what went wrong there)."""
    folder = tmp_path_factory.mktemp("older")
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    writing: dict[str, dict[str, Any]] = {
        f"{name}-4": {
            "do": "write", "architecture": name, "folder": str(folder / f"{name}-4"), "special": special,
            "sizes": {**SIZES, **{**ARCHITECTURES, **MIXTURES}[name]},
            "tokenizer": str(folder / "tokenizer/tokenizer.json"),
        }
        for name in WRITTEN_BY_4
    }  # fmt: skip
    writing["sentencepiece-4"] = {
        **writing["llama-4"],
        "folder": str(folder / "sentencepiece-4"), "sentencepiece": str(folder / "tokenizer.model"),
    }  # fmt: skip
    # A base frequency that is not the default, so that one that is passed by shows.
    for name in ("llama-4", "mistral-4", "qwen2-4"):
        writing[name]["sizes"]["rope_theta"] = 500000.0
    do(packages, folder / "writing", writing)
    for name in WRITTEN_BY_5:
        rope: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
        tiny(name, folder / f"{name}-5", **(rope if name in ("llama", "mistral", "qwen2") else {}))
    here = {case: merged(folder / case, folder / f"{case}-merged") for case in CASES}
    reading = {
        case: {"do": "read", "folder": str(folder / f"{case}-merged"), "ids": IDS, "texts": TEXTS} for case in CASES
    }
    texts, logits = do(packages, folder / "reading", reading)
    own = {case: open_tokenizer(ModelConfig(path=str(folder / case))) for case in CASES}
    return {
        case: (here[case], logits.get(case, texts[case]), [own[case](text).input_ids for text in TEXTS], texts[case])
        for case in CASES
    }


@pytest.mark.parametrize("case", CASES)
def test_a_merged_folder_is_read_there_as_here(found: Found, case: str) -> None:
    logits, theirs, ids, their_ids = found[case]
    assert isinstance(theirs, Tensor), theirs
    assert float((logits - theirs).abs().max() / logits.abs().max()) < 1e-4
    assert their_ids == ids
    assert len({tuple(each) for each in ids}) == len(TEXTS)
