"""Bottleneck adapters beside their authors' package, AdapterHub's ``adapters``: the same logits and gradients.

It needs an older transformers, and so a folder of its own, which is filled at the first use and kept in the user's
cache.
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
from safetensors.torch import load_file, save_file

from subspace.adapters.inject import inject, trained_parameters
from subspace.common.paths import REPOSITORY
from tests.helpers.tiny_models import ARCHITECTURES, SIZES, tiny

PACKAGES = ["adapters==1.3.0", "transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2"]
IDS = torch.tensor([[5, 9, 33, 7, 120, 64, 3, 17], [8, 8, 250, 31, 2, 90, 4, 11]])
#: What our tensors are called there.
NAMES = {"D": "adapter_down.0.weight", "c": "adapter_down.0.bias", "U": "adapter_up.weight", "e": "adapter_up.bias"}
#: By our method: its settings, their configuration and its settings, and where each of our sites lies there.
METHODS: dict[str, tuple[dict[str, Any], str, dict[str, Any], dict[str, str]]] = {
    "pfeiffer": ({"bottleneck": 8}, "SeqBnConfig", {"reduction_factor": 8}, {"mlp.down_proj": "output_adapters"}),
    "houlsby": (
        {"bottleneck": 16, "activation": "silu"},
        "DoubleSeqBnConfig",
        {"reduction_factor": 4},
        {"self_attn.o_proj": "attention_adapters", "mlp.down_proj": "output_adapters"},
    ),
}


@pytest.fixture(scope="module")
def packages() -> Path:
    """Return the folder of AdapterHub's package and of the transformers that it needs."""
    folder = platformdirs.user_cache_path("subspace") / "oracles" / PACKAGES[0].replace("==", "-")
    if not (folder / "complete").exists():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *PACKAGES]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"needs {' '.join(PACKAGES)} in {folder}, and no registry gave them: {done.stderr[-300:]}")
        (folder / "complete").touch()
    return folder


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("method", METHODS)
def test_logits_and_gradients_are_adapterhubs(packages: Path, tmp_path: Path, method: str, architecture: str) -> None:
    settings, config, their_settings, places = METHODS[method]
    model: Any = tiny(architecture)
    given = {f"model:{name}": value.clone() for name, value in model.state_dict().items()}
    inject(model, method, settings)
    generator = torch.Generator().manual_seed(1)
    theirs = {}
    for name, parameter in trained_parameters(model).items():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        site, _, own = name.rpartition(".")
        layer = ".".join(site.split(".")[:3])
        theirs[name] = f"{layer}.{places[site.removeprefix(f'{layer}.')]}.adapters.one.{NAMES[own]}"
        given[f"adapter:{theirs[name]}"] = parameter.detach().clone()
    save_file({**given, "ids": IDS}, tmp_path / "given.safetensors")
    sizes = {**SIZES, **ARCHITECTURES[architecture]}
    job = {"architecture": architecture, "sizes": sizes, "config": config, "settings": their_settings}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, str(REPOSITORY / "tests/workers/adapterhub.py"), str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(packages)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "found.safetensors")

    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    assert float((logits - found["logits"]).abs().max() / logits.abs().max()) < 1e-5
    for name, parameter in trained_parameters(model).items():
        torch.testing.assert_close(parameter.grad, found[theirs[name]], rtol=1e-4, atol=1e-5)
