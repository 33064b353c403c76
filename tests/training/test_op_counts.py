"""How often a training step waits for the GPU and how much it launches, at most: today's counts."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from subspace.adapters.registry import list_methods
from tests.helpers.op_counts import LayerCounts, layer_launches, reads_per_step

#: Reads a step by ZeRO stage, at two micro-batches and ``log_every`` 10, in bfloat16: in ten steps one for the losses
#: and gradients, and one for the norm that is logged.
READS = {0: 0.2, 1: 0.2, 2: 0.2, 3: 0.2}
#: Kernel launches of a decoder layer above the frozen one's: of each micro-batch, forward and backward; once a step.
LAUNCHES = {
    "adalora": (207, 155),
    "bitfit": (17, 0),
    "dora": (72, 75),
    "flexlora": (242, 0),
    "flora": (57, 0),
    "full": (38, 0),
    "houlsby": (38, 0),
    "ia3": (27, 0),
    "liera": (145, 0),
    "lora": (37, 0),
    "lora-dash": (87, 0),
    "milora": (97, 0),
    "moslora": (57, 0),
    "p-tuning": (0, 0),
    "parallel": (21, 0),
    "pfeiffer": (21, 0),
    "pissa": (97, 0),
    "prefix": (21, 0),
    "prompt": (0, 0),
    "sam-parser": (45, 0),
    "series": (15, 0),
    "spectral": (102, 0),
    "ssb": (52, 0),
    "ssl": (27, 0),
    "svdiff": (60, 0),
    "trilora": (62, 0),
}


# Stages 1 and 3 are counted in tests/fake_cuda too, where copies between host and device show.
@pytest.mark.parametrize(
    "stage", [stage if stage == 0 else pytest.param(stage, marks=pytest.mark.long) for stage in READS]
)
def test_a_step_reads_few_values_on_the_host(tmp_path: Path, stage: int) -> None:
    reads = reads_per_step(tmp_path, stage)
    assert sum(reads.values()) <= READS[stage], reads


@functools.cache
def frozen() -> LayerCounts:
    return layer_launches(None)


@pytest.mark.parametrize("method", list_methods())
def test_a_layer_with_adapters_launches_few_kernels(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    # DeepSpeed puts its own in place at ZeRO-3 and leaves it there, for all tests that follow in this process.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    above, (micro_batch, step) = layer_launches(method) - frozen(), LAUNCHES[method]
    assert above.micro_batch <= micro_batch, above
    assert above.step <= step, above
