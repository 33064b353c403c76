"""Opens a model spread by ZeRO-3, under a launcher; a file of its rank tells the bytes of memory that it took."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from subspace.common.host_memory import manage_malloc, resident_memory
from subspace.distributed.deepspeed_config import compute_batch_layout, resolve_deepspeed_config
from subspace.distributed.engine import init_distributed
from subspace.distributed.zero import gather_copies
from subspace.models.config import ModelConfig
from subspace.models.lazy_safetensors import LazyTensor
from subspace.models.loading import open_model, summarize_model


def count_reading() -> list[int]:
    """Return a list to which the bytes of each tensor that is read of a file are added from now on."""
    counts: list[int] = []
    read = LazyTensor.read

    def counting(tensor: LazyTensor) -> torch.Tensor:
        values = read(tensor)
        counts.append(values.nbytes)
        return values

    LazyTensor.read = counting  # type: ignore[assignment, method-assign]
    return counts


def main() -> None:
    """Open a small model to have all code imported, then another; write what the latter took to ``RANK.json``."""
    small, folder, out = sys.argv[1:4]
    manage_malloc()
    init_distributed()
    ranks = int(os.environ["WORLD_SIZE"])
    engine = resolve_deepspeed_config(
        {"zero_optimization": {"stage": 3}}, compute_batch_layout(ranks, None, ranks), dtype="bfloat16", clip=1.0
    ).settings
    open_model(ModelConfig(path=small), zero3=engine)
    before = resident_memory()
    bytes_read = count_reading()
    config = ModelConfig(path=folder)
    model = open_model(config, zero3=engine)
    first = next(iter(gather_copies([next(iter(model.named_parameters()))]).values()))
    line = {
        "rank": int(os.environ["RANK"]),
        "most": resident_memory("VmHWM") - before,
        "held": summarize_model(model, config).bytes,
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "read": sum(bytes_read),
        "first": first.float().sum().item(),
    }
    Path(out, f"{line['rank']}.json").write_text(json.dumps(line))


if __name__ == "__main__":
    main()
