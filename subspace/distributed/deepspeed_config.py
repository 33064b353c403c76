"""DeepSpeed's engine: started from its own JSON, in which "auto" is filled from the run and contradictions are refused.

Precision. The frozen base has the model's dtype; adapters are float32 whatever the base is, with no ``bf16`` section,
so that small steps are not rounded away and the saved adapter is what the optimizer holds. float16 needs a loss
scale, hence DeepSpeed's ``fp16`` section, which casts the adapters too and keeps float32 copies in the optimizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace.distributed.collectives import world_size
from subspace.errors import UserError, nearest

Json = dict[str, Any]
OFFLOAD, PREFETCH = "offload_optimizer", "stage3_prefetch_bucket_size"
MIN_SWAP_BYTES = 1 << 20  # bytes from which on DeepSpeed swaps a tensor to NVMe


@dataclass(frozen=True)
class BatchLayout:
    """How the rows of one optimizer step are spread: ``batch = micro_batch * accumulate * ranks``."""

    batch: int
    micro_batch: int
    accumulate: int
    ranks: int


def compute_batch_layout(batch: int, micro_batch: int | None, ranks: int) -> BatchLayout:
    """Spread a step's rows over ranks and micro-batches; without ``micro_batch``, a rank takes its share at once."""
    if batch % ranks:
        fits = ", ".join(str(n) for n in (batch // ranks * ranks, -(-batch // ranks) * ranks) if n)
        raise UserError(f"train.batch is {batch} rows a step, which {ranks} processes cannot share evenly. Try {fits}")
    share = batch // ranks
    micro_batch = micro_batch or share
    if share % micro_batch:
        divisors = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise UserError(
            f"train.micro_batch is {micro_batch}, which does not divide the {share} rows that each of {ranks} "
            f"processes takes of train.batch {batch}. Take one of {divisors}"
        )
    return BatchLayout(batch, micro_batch, share // micro_batch, ranks)


def read_engine_file(path: str | Path) -> Json:
    """Read DeepSpeed's JSON."""
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"engine: no file {path}. Ready ones lie in ds_configs/, as ds_configs/zero2.json") from None
    except json.JSONDecodeError as error:
        raise UserError(f"engine: {path}, line {error.lineno} is not JSON: {error.msg}") from None
    if not isinstance(content, dict):
        raise UserError(f"engine: {path} should hold one JSON object, as ds_configs/zero2.json does")
    return content


def resolve_deepspeed_config(
    engine: Mapping[str, Any],
    layout: BatchLayout,
    *,
    dtype: str,
    clip: float,
    largest_adapter: int = 0,
    trained: int = 0,
    source: str = "the engine's JSON",
) -> tuple[Json, list[str]]:
    """Return the engine's configuration with numbers for every "auto", and notices of what was changed.

    Raises:
        UserError: a number that contradicts the run's, or a section for what the run's configuration decides.
    """
    filled: Json = json.loads(json.dumps(engine))
    notices: list[str] = []
    for section in ("optimizer", "scheduler"):
        if section in filled:
            raise UserError(
                f"{source} has a section '{section}', which the run's `train` settings decide. Take it out there"
            )

    ours = {
        "train_batch_size": (layout.batch, "train.batch"),
        "train_micro_batch_size_per_gpu": (layout.micro_batch, "train.micro_batch"),
        "gradient_accumulation_steps": (layout.accumulate, "train.batch / (train.micro_batch x processes)"),
        "gradient_clipping": (clip, "train.clip"),
    }
    for key, (value, name) in ours.items():
        if filled.get(key, "auto") not in ("auto", value):
            raise UserError(
                f'{source} sets {key} to {filled[key]}, but {name} is {value}. Write "auto" there, or change {name}'
            )
        filled[key] = value

    zero = filled.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{source} sets zero_optimization.stage to {stage!r}. There are 0, 1, 2, 3")
    for name, wanted in (("fp16", "float16"), ("bf16", "bfloat16")):
        section = filled.setdefault(name, {})
        if section.get("enabled", "auto") == "auto":
            section["enabled"] = name == "fp16" and dtype == "float16"
        if section["enabled"] and dtype != wanted:
            raise UserError(
                f'{source} enables {name}, but model.dtype is {dtype}. Set model.dtype={wanted}, or "auto" there'
            )
    if filled["fp16"]["enabled"] is False and dtype == "float16":
        raise UserError(
            f'{source} disables fp16, but model.dtype is float16, which needs its loss scale. Write "auto" there'
        )
    if stage == 0 and (filled["fp16"]["enabled"] or filled["bf16"]["enabled"]):
        # At stage 0 DeepSpeed's 16-bit optimizers take a step with zero gradients before the first: weight decay and
        # Adam's step count are wrong from then on. Stage 1 holds the same numbers and does not.
        zero["stage"] = 1
        notices.append("ZeRO stage 0 with 16-bit adapters runs as stage 1, whose numbers are right")
    if zero["stage"] == 3 and zero.get("stage3_param_persistence_threshold", "auto") == "auto":
        # Adapters are small and used at every layer: gathering them for each use costs more than holding them.
        zero["stage3_param_persistence_threshold"] = max(100_000, largest_adapter)
    if zero["stage"] and trained and zero.get("reduce_bucket_size", "auto") == "auto":
        # DeepSpeed takes room for the whole bucket in every step, by default 2 GB; adapters need a few megabytes.
        zero["reduce_bucket_size"] = min(trained, 500_000_000)
    if (zero.get("offload_param") or {}).get("device") == "nvme" and zero.get(PREFETCH, "auto") == "auto":
        zero[PREFETCH] = 0  # DeepSpeed reads ahead a weight that is used twice in a step twice, and stumbles over it
    if OFFLOAD in zero:
        filled.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's own AdamW works there and needs no compiler
    if (zero.get(OFFLOAD) or {}).get("device") == "nvme":
        _keep_gradients_in_memory(filled, 4 * largest_adapter, source)
        notices.append("the optimizer is on NVMe: checkpoints hold adapters alone, and no run goes on from one")
    filled.setdefault("zero_allow_untested_optimizer", True)
    filled.setdefault("steps_per_print", 10**9)  # the run prints for itself

    left = [key for key, value in flatten_dict(filled) if value == "auto"]
    if left:
        raise UserError(f'{source} leaves {left[0]} "auto", which is not filled here. {nearest(left[0], ours)}')
    values = dict(flatten_dict(filled))
    if autos := [f"{key}={values[key]}" for key, value in flatten_dict(engine) if value == "auto"]:
        notices.append(f'{Path(source).name}: "auto" is {", ".join(autos)}')
    return filled, notices


def _keep_gradients_in_memory(filled: Json, largest: int, source: str) -> None:
    """Let no trained tensor, of ``largest`` bytes at most, have its gradient swapped to NVMe with the optimizer.

    DeepSpeed holds gradients in memory anyway, and reads those that it has swapped straight into their places in one
    flat tensor. Where such a place is not at a multiple of 512 bytes, as after a tensor of odd size, the system reads
    nothing, without an error, and the tensor does not train. What is smaller than a block is not swapped.
    """
    aio = filled.setdefault("aio", {})
    if aio.get("block_size", "auto") == "auto":
        aio["block_size"] = max(MIN_SWAP_BYTES, (largest // 4096 + 1) * 4096)
    elif max(aio["block_size"], MIN_SWAP_BYTES) <= largest:
        raise UserError(
            f"{source} sets aio.block_size to {aio['block_size']}, but with the optimizer on NVMe it must exceed the "
            f'{largest} bytes of the largest trained tensor, or DeepSpeed loses gradients. Write "auto" there'
        )


def resolve_deepspeed_config_for_inference(path: str | Path, dtype: str) -> Json:
    """Return the engine's configuration for a model that is spread over the processes to be scored, not trained."""
    ranks = world_size()
    filled, _ = resolve_deepspeed_config(
        read_engine_file(path), compute_batch_layout(ranks, 1, ranks), dtype=dtype, clip=0.0, source=str(path)
    )
    stage = filled["zero_optimization"]["stage"]
    if stage != 3:
        raise UserError(
            f"evaluate.engine is {path}, of ZeRO stage {stage}, but only stage 3 spreads a model. Take "
            "ds_configs/zero3.json, or none: then each process has the whole model"
        )
    filled["zero_optimization"].pop(OFFLOAD, None)
    return filled


def flatten_dict(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested settings by their names, as ``("zero_optimization.stage", 2)``."""
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            value = {str(number): one for number, one in enumerate(value)}
        pairs += flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs
