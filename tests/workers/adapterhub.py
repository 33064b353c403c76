"""Compute logits and gradients with AdapterHub's package, in an environment of its own, for oracles/test_adapterhub.py.

It imports nothing of this project, whose version of transformers is another one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import adapters  # type: ignore[import-not-found]
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM


def main(folder: Path) -> None:
    """Read ``job.json`` and ``given.safetensors`` in a folder, and write ``found.safetensors`` there."""
    job, given = json.loads((folder / "job.json").read_text()), load_file(folder / "given.safetensors")
    config = AutoConfig.for_model(job["architecture"], **job["sizes"])
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.load_state_dict({name.removeprefix("model:"): t for name, t in given.items() if name.startswith("model:")})
    adapters.init(model)
    model.add_adapter("one", config=getattr(adapters, job["config"])(**job["settings"]))
    model.set_active_adapters("one")
    model.train_adapter("one")
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = {name.removeprefix("adapter:"): t for name, t in given.items() if name.startswith("adapter:")}
    for name, parameter in own.items():
        parameter.data.copy_(values.pop(name))
    assert not values, f"AdapterHub has no {sorted(values)}"
    ids = given["ids"]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.eval()
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    gradients = {name: parameter.grad for name, parameter in own.items()}
    save_file(
        {"logits": logits.contiguous(), **{n: g.contiguous() for n, g in gradients.items()}},
        folder / "found.safetensors",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
