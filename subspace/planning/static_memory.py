"""Static memory per process: weights, adapters, optimizer state, ZeRO buffers.

Counted on a meta-device model; ZeRO stages shard and copy tensors as in DeepSpeed 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from subspace.adapters.inject import adapters, trained_parameters
from subspace.distributed.deepspeed_config import OFFLOAD
from subspace.models.bitsandbytes_compat import scale_tensors, storage_format
from subspace.models.experts.weights import dtype_of_experts

#: Bytes that bitsandbytes needs on a CPU for each element of a matrix that it quantises: the matrix, a float32 copy,
#: and code book indices as int64. On a GPU it is one kernel.
QUANTISING = 14


@dataclass(frozen=True)
class MemoryItem:
    """Memory of one item, on each device or in CPU memory for each process."""

    name: str
    bytes: int
    host: bool = False


class StaticMemory:
    """Static memory of each process for a model with adapters under an engine configuration."""

    def __init__(self, model: nn.Module, engine: Mapping[str, Any], ranks: int, state: float, *, gpu: bool) -> None:
        self.zero, self.ranks, self.gpu = engine["zero_optimization"], ranks, gpu
        self.stage: int = self.zero["stage"]
        self.trained = sum(tensor.numel() for tensor in trained_parameters(model).values())
        self.state = round(state * self.trained)  # the full optimizer state
        self.whole = self.spread = self.scales = self.own = self.largest = self.quantized = 0
        mine = {id(t) for adapter in adapters(model).values() for t in adapter.own_tensors().values()}
        self.experts = dtype_of_experts(model)
        threshold = self.zero.get("stage3_param_persistence_threshold", 0) if self.stage == 3 else None
        seen: set[int] = set()
        for module in model.modules():
            if type(module).__name__.startswith("Linear") and storage_format(module) != "plain":
                self.scales += sum(tensor.nbytes for tensor in scale_tensors(module.weight))
                numbers: int = module.in_features * module.out_features  # type: ignore[assignment, operator]
                self.largest, self.quantized = max(self.largest, numbers), self.quantized + numbers
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                if id(tensor) in mine:
                    self.own += tensor.nbytes
                elif threshold is None or tensor.numel() <= threshold or not isinstance(tensor, nn.Parameter):
                    self.whole += tensor.nbytes
                else:
                    self.spread += tensor.nbytes
        self.tensors = [t.nbytes for t in model.parameters() if id(t) not in mine]

    def parts(self) -> Iterator[MemoryItem]:
        """Yield the items in use between two steps."""
        frozen_away = bool(self.zero.get("offload_param"))
        states_away = bool(self.zero.get(OFFLOAD))
        share = " (this process's share)" if self.spread else ""
        # bitsandbytes quantises linear layers; stacks of experts' matrices stay as they are.
        whole = f", experts in {self.experts}" if self.experts and self.quantized else ""
        yield MemoryItem(f"frozen weights{whole}{share}", self.share, frozen_away)
        if self.scales:
            yield MemoryItem("scales of the quantisation", self.scales)
        if self.stage == 3:
            yield MemoryItem("weights gathered at a time", self._gathered())
        yield MemoryItem("adapters", self.own)
        yield MemoryItem("gradients", self._gradients())
        yield MemoryItem("state of the optimizer", -(-self.state // self.ranks), states_away)
        if self.stage:
            # The optimizer's float32 copy, and its flat gradients in a step.
            yield MemoryItem("ZeRO's copies of the adapters", 2 * 4 * -(-self.trained // self.ranks), states_away)
            yield MemoryItem("ZeRO's buckets", self._buckets())

    @property
    def share(self) -> int:
        """Bytes of frozen weights on each process."""
        return self.whole + -(-self.spread // self.ranks)

    def loading(self) -> int:
        """Return the peak memory while the model loads."""
        if self.largest:
            # The model is quantised tensor by tensor.
            return self.whole + self.spread + self.scales + self.largest * (2 if self.gpu else QUANTISING)
        if self.stage == 3:
            return self.share + 2 * max(self.tensors)
        return self.share

    def moved_by_a_pass(self, itemsize: int) -> int:
        """Return the bytes of weights that a pass over the model moves, in products of ``itemsize`` bytes a number.

        Quantised weights are read, written as plain ones, and read again.
        """
        return self.whole + self.spread + self.scales + 2 * itemsize * self.quantized

    def _gathered(self) -> int:
        """Return the bytes of other ranks' shards that ZeRO-3 keeps gathered for reuse."""
        soon = self.zero.get("stage3_max_reuse_distance", 10**9) / 2 + self.zero.get("stage3_prefetch_bucket_size", 5e7)
        numbers = min(float(self.zero.get("stage3_max_live_parameters", 10**9)), soon)
        each = max(2, self.spread // max(1, sum(self.tensors)) * 2)
        return min(self.spread, int(numbers * each))

    def _gradients(self) -> int:
        return 4 * (self.trained if self.stage < 2 else -(-self.trained // self.ranks))

    def _buckets(self) -> int:
        bucket = self.zero.get("reduce_bucket_size", 500_000_000)
        if not self.gpu:
            bucket = min(bucket, self.trained)  # the system allocates only pages that are written to
        return 4 * int(bucket) * (2 if self.zero.get("overlap_comm") else 1)
