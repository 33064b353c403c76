"""Checksum of a model's weights and adapters, by which stored results are matched to the model, wherever it lies."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from subspace.adapters.inject import adapters
from subspace.adapters.registry import method_origin
from subspace.distributed.collectives import all_reduce_sum
from subspace.distributed.zero import full_shape, local_shard
from subspace.evaluation.results import digest
from subspace.models.base_record import plain_config

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_checksum(model: Any) -> str:
    """Return a checksum (12 hexadecimal digits) of all tensors and of the adapters' settings. Collective under ZeRO-3.

    A tensor enters as the sum of its bits read as integers, which is exact, fast on any device, and independent of how
    the tensor is sharded over ranks.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    parts = []
    for name, tensor in tensors.items():
        shard = local_shard(tensor)
        total = _sum(tensor) if shard is None else all_reduce_sum(_sum(shard))
        parts.append([name, list(full_shape(tensor)), str(tensor.dtype), int(total)])
    settings = [
        [site, adapter.name, asdict(adapter.config), *method_origin(adapter.method_class).items()]
        for site, adapter in adapters(model).items()
    ]
    return digest([parts, settings, plain_config(model.config.to_dict())])


def _sum(tensor: Tensor) -> Tensor:
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    return bits.sum(dtype=torch.int64)
