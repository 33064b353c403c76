"""Write a model of a declared shape with random weights, in shards, as an ordinary Hugging Face folder.

    python -m tests.bench.random_model llama-7b FOLDER
    python -m tests.bench.random_model llama-7b FOLDER --layers 2 --hidden 2048

One layer is drawn, and the others hold its numbers turned round, so that disk and time go into writing alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from subspace.models import declared as declared_module
from subspace.models.config import ModelConfig
from subspace.models.loading import open_shape
from tests.helpers.tiny_models import bpe_tokenizer

SHARD = 10**9  # bytes, about


def write_random(folder: Path, shape: str, **changes: Any) -> int:
    """Write the model, bfloat16, and return the bytes of its tensors. ``changes`` replace values of its config.json."""
    config = AutoConfig.for_model(**{**declared_module.model_shapes()[shape].config, **changes})
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    bpe_tokenizer(pad_token="<|reserved_special_token_0|>").save_pretrained(folder)

    drawn: dict[tuple[str, torch.Size], Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    written = 0

    def flush() -> None:
        nonlocal written
        file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
        written += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()

    for number, (name, empty) in enumerate(open_shape(ModelConfig(path=str(folder))).named_parameters()):
        kind = (name.rpartition("layers.")[2].partition(".")[2], empty.shape)
        if kind not in drawn:
            values = torch.randn(empty.shape, generator=generator) * 0.02
            drawn[kind] = (values + 1 if empty.ndim == 1 else values).bfloat16()
        shard[name] = drawn[kind].roll(number, -1).contiguous()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": written}, "weight_map": where})
    )
    return written


def main() -> None:
    """Write it and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden", type=int)
    options = parser.parse_args()
    changes = {"num_hidden_layers": options.layers, "hidden_size": options.hidden}
    size = write_random(options.folder, options.shape, **{k: v for k, v in changes.items() if v})
    print(f"{size / 1e9:.2f} GB in {options.folder}")


if __name__ == "__main__":
    main()
