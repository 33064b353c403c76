"""DeepSpeed's configuration: its JSON file with every "auto" resolved from the run; conflicts raise UserError.

Precision. The frozen base has the model's dtype; adapters are always float32, with no ``bf16`` section, so that
small updates are not rounded away and the saved adapter equals the optimizer's parameters. float16 needs a loss
scale, hence DeepSpeed's ``fp16`` section, which casts the adapters too and keeps float32 copies in the optimizer.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import TypedDict

from subspace.common.foreign.text import checked, read_json, refuse_controls
from subspace.distributed.collectives import world_size
from subspace.errors import UserError, nearest, printable

Json = dict[str, Any]
# Keys of the section zero_optimization.
OFFLOAD, PREFETCH = "offload_optimizer", "stage3_prefetch_bucket_size"
PERSISTENCE, BUCKET = "stage3_param_persistence_threshold", "reduce_bucket_size"
BLOCK_SIZE = "block_size"  # of the section aio
#: Keys whose best value depends on the size of the adapters.
BY_ADAPTERS = (("zero_optimization", PERSISTENCE), ("zero_optimization", BUCKET), ("aio", BLOCK_SIZE))
MIN_PERSISTENCE = 100_000  # elements up to which ZeRO-3 does not shard a tensor: DeepSpeed's default
MAX_BUCKET = 500_000_000  # elements reduced at a time: DeepSpeed's default
MIN_SWAP_BYTES = 1 << 20  # bytes from which on DeepSpeed swaps a tensor to NVMe


@dataclass(frozen=True)
class BatchLayout:
    """The distribution of the rows of one optimizer step: ``batch = micro_batch * accumulate * ranks``."""

    batch: int
    micro_batch: int
    accumulate: int
    ranks: int


def compute_batch_layout(batch: int, micro_batch: int | None, ranks: int) -> BatchLayout:
    """Distribute a step's rows over ranks and micro-batches; without ``micro_batch``, there is one per rank."""
    if batch % ranks:
        fits = ", ".join(str(n) for n in (batch // ranks * ranks, -(-batch // ranks) * ranks) if n)
        raise UserError(
            f"train.batch_size is {batch} rows a step, which {ranks} processes cannot share evenly. Try {fits}"
        )
    share = batch // ranks
    micro_batch = micro_batch or share
    if share % micro_batch:
        divisors = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise UserError(
            f"train.micro_batch_size is {micro_batch}, which does not divide the {share} rows that each of {ranks} "
            f"processes takes of train.batch_size {batch}. Use one of {divisors}"
        )
    return BatchLayout(batch, micro_batch, share // micro_batch, ranks)


class _Enabled(TypedDict, total=False):
    enabled: bool | Literal["auto"]


class _Offload(TypedDict, total=False):
    device: str | None


_Number = float | Literal["auto"]


class _Zero(TypedDict, total=False):
    """The keys of ``zero_optimization`` that are read here; the others are DeepSpeed's to check."""

    stage: int
    offload_optimizer: _Offload | None
    offload_param: _Offload | None
    stage3_param_persistence_threshold: _Number
    reduce_bucket_size: _Number
    stage3_prefetch_bucket_size: _Number


class _Aio(TypedDict, total=False):
    block_size: int | Literal["auto"]


class _Engine(TypedDict, total=False):
    zero_optimization: _Zero
    fp16: _Enabled
    bf16: _Enabled
    aio: _Aio


def read_engine_file(path: str | Path) -> Json:
    """Read DeepSpeed's JSON; raise UserError for a file that is none, and for sections that are not what they are."""
    if not Path(path).exists():
        raise UserError(f"engine: no file {path}. There are some in ds_configs/, such as ds_configs/zero2.json")
    content: Json = read_json(Path(path), dict[str, Any])
    refuse_controls(content, str(path))
    return checked(content, _Engine, str(path))


def check_by_deepspeed(engine: EngineConfig) -> EngineConfig:
    """Return the configuration with a notice of each key that DeepSpeed passes over.

    Raises:
        UserError: DeepSpeed does not accept it, which it would say only after the model was loaded.
    """
    settings = _Asked(copy.deepcopy(engine.settings))
    settings.asked = set()
    # One process checks it, or those that there are.
    here = world_size() if torch.distributed.is_initialized() else 1
    rows = settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"] * here
    settings["train_batch_size"] = rows
    said = logging.getLogger("DeepSpeed")
    quiet = logging.Filter("nothing")
    said.addFilter(quiet)  # on standard output
    try:
        from deepspeed.runtime.config import DeepSpeedConfig

        DeepSpeedConfig(settings)
    except Exception as error:  # of pydantic, asserts, and whatever wrong types lead to
        reason = printable("; ".join(line.strip() for line in str(error).splitlines()[:3]))
        raise UserError(
            f"{engine.source} is nothing that DeepSpeed accepts: {reason or type(error).__name__}"
        ) from None
    finally:
        said.removeFilter(quiet)
    unknown = [key for key in settings if key not in settings.asked | _LATER]
    told = [f"{engine.source}: DeepSpeed reads no key '{key}'. {nearest(key, settings.asked)}" for key in unknown]
    return replace(engine, changes=(*engine.changes, *told))


class _Asked(dict[str, Any]):
    """A mapping that notes which keys it is asked for; a copy of it notes them in the same place."""

    asked: set[str]

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


#: Keys that DeepSpeed reads later than its configuration, or elsewhere.
_LATER = frozenset(
    (
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "compression_training",
        "elasticity",
        "nebula",
        "curriculum_learning",
    )
)


@dataclass(frozen=True)
class EngineConfig:
    """DeepSpeed's configuration with every "auto" resolved; :meth:`for_adapters` returns its final form.

    Attributes:
        settings: the configuration passed to DeepSpeed.
        changes: notices of changed settings.
        autos: the keys that are "auto" in the file.
        free: keys of :data:`BY_ADAPTERS` that are "auto" or missing in the file.
        source: the file.
    """

    settings: Json
    changes: tuple[str, ...]
    autos: tuple[str, ...]
    free: frozenset[str]
    source: str

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.settings["zero_optimization"]["stage"])

    @property
    def optimizer_offloaded(self) -> bool:
        """True if the optimizer is offloaded to CPU memory or NVMe."""
        return OFFLOAD in self.settings["zero_optimization"]

    @property
    def notices(self) -> list[str]:
        """Notices for the user: changed settings, and the value of each "auto" of the file."""
        values = dict(flatten_dict(self.settings))
        autos = ", ".join(f"{key}={values[key]}" for key in self.autos if key in values)
        return [*self.changes, *([f'{Path(self.source).name}: "auto" is {autos}'] if autos else [])]

    def for_adapters(self, *, trained: int, largest: int) -> EngineConfig:
        """Return the configuration for this many trainable parameters, in total and in the largest tensor.

        Raises:
            UserError: a block size that is too small for the largest trainable tensor.
        """
        settings = copy.deepcopy(self.settings)
        zero = settings["zero_optimization"]
        if zero["stage"] == 3 and PERSISTENCE in self.free:
            # Adapters are small and used at every layer: gathering them for each use costs more than their memory.
            zero[PERSISTENCE] = max(MIN_PERSISTENCE, largest)
        if zero["stage"] and BUCKET in self.free:
            # DeepSpeed allocates the full bucket in every step, by default 2 GB; adapters need a few megabytes.
            zero[BUCKET] = min(trained, MAX_BUCKET)
        if _offload_device(zero) == "nvme":
            _keep_gradients_in_memory(settings, 4 * largest, self.source, free=BLOCK_SIZE in self.free)
        return replace(self, settings=settings)


def resolve_deepspeed_config(
    engine: Mapping[str, Any],
    layout: BatchLayout,
    *,
    dtype: str,
    clip: float,
    source: str = "the engine's JSON",
) -> EngineConfig:
    """Return the engine's configuration with every "auto" resolved, and notices of changed settings.

    Args:
        engine: the content of the engine's file.
        layout: the distribution of a step's rows.
        dtype: the name of the model's dtype.
        clip: the maximum gradient norm; 0 disables clipping.
        source: the file's name, for messages.

    Raises:
        UserError: a value or section that conflicts with the run's configuration.
    """
    settings: Json = json.loads(json.dumps(engine))
    autos = tuple(key for key, value in flatten_dict(settings) if value == "auto")
    free = frozenset(key for section, key in BY_ADAPTERS if (settings.get(section) or {}).get(key, "auto") == "auto")

    _refuse_run_sections(settings, source)
    run = (  # key, value, source
        ("train_batch_size", layout.batch, "train.batch_size"),
        ("train_micro_batch_size_per_gpu", layout.micro_batch, "train.micro_batch_size"),
        ("gradient_accumulation_steps", layout.accumulate, "train.batch_size / (train.micro_batch_size x processes)"),
        ("gradient_clipping", clip, "train.max_grad_norm"),
    )
    for key, value, name in run:
        _set_from_run(settings, key, value, name, source)
    zero = settings.setdefault("zero_optimization", {})
    _check_stage(zero.setdefault("stage", 0), source)
    _resolve_precision(settings, dtype, source)
    changes = []
    if zero["stage"] == 0 and (settings["fp16"]["enabled"] or settings["bf16"]["enabled"]):
        # At stage 0 DeepSpeed's 16-bit optimizers take a step with zero gradients before the first: weight decay and
        # Adam's step count are wrong from then on. Stage 1 has the same numbers and does not.
        zero["stage"] = 1
        changes.append("ZeRO stage 0 with 16-bit adapters runs as stage 1, whose numbers are right")
    if _offload_device(zero) == "nvme":
        changes.append(
            "the optimizer is on NVMe: checkpoints hold the adapters only, and a run cannot be resumed from them"
        )
    _set_defaults(settings)

    left = [key for key, value in flatten_dict(settings) if value == "auto"]
    if left:
        known = [key for key, _, _ in run]
        raise UserError(
            f'{source} leaves {left[0]} "auto", which is not supported for this key. {nearest(left[0], known)}'
        )
    return EngineConfig(settings, tuple(changes), autos, free, source)


def _refuse_run_sections(settings: Json, source: str) -> None:
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise UserError(
                f"{source} has a section '{section}', which the run's `train` settings replace. Remove it there"
            )


def _set_from_run(settings: Json, key: str, value: Any, name: str, source: str) -> None:
    """Set the keys that the run's configuration determines; raise UserError for another value."""
    if settings.get(key, "auto") not in ("auto", value):
        raise UserError(
            f'{source} sets {key} to {settings[key]}, but {name} is {value}. Write "auto" there, or change {name}'
        )
    settings[key] = value


def _check_stage(stage: Any, source: str) -> None:
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{source} sets zero_optimization.stage to {stage!r}. There are 0, 1, 2, 3")


def _resolve_precision(settings: Json, dtype: str, source: str) -> None:
    """Enable ``fp16`` for a float16 model; raise UserError for a precision section of another dtype."""
    for name, wanted in (("fp16", "float16"), ("bf16", "bfloat16")):
        section = settings.setdefault(name, {})
        if section.get("enabled", "auto") == "auto":
            section["enabled"] = name == "fp16" and dtype == "float16"
        if section["enabled"] and dtype != wanted:
            raise UserError(
                f'{source} enables {name}, but model.dtype is {dtype}. Set model.dtype={wanted}, or "auto" there'
            )
    if settings["fp16"]["enabled"] is False and dtype == "float16":
        raise UserError(
            f'{source} disables fp16, but model.dtype is float16, which needs its loss scale. Write "auto" there'
        )


def _set_defaults(settings: Json) -> None:
    """Set defaults that are better than DeepSpeed's, where the file has no value."""
    zero = settings["zero_optimization"]
    if zero["stage"] == 3 and zero.get(PERSISTENCE, "auto") == "auto":
        zero[PERSISTENCE] = MIN_PERSISTENCE
    if zero.get(BUCKET) == "auto":
        del zero[BUCKET]  # use DeepSpeed's default until the adapters are counted
    if (zero.get("offload_param") or {}).get("device") == "nvme" and zero.get(PREFETCH, "auto") == "auto":
        zero[PREFETCH] = 0  # DeepSpeed prefetches a weight that a step uses twice a second time, and fails
    if OFFLOAD in zero:
        settings.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's own AdamW works and needs no compiler
    if _offload_device(zero) == "nvme":
        aio = settings.setdefault("aio", {})
        if aio.get(BLOCK_SIZE, "auto") == "auto":
            aio[BLOCK_SIZE] = MIN_SWAP_BYTES
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings.setdefault("steps_per_print", 10**9)  # subspace does its own logging


def _offload_device(zero: Json) -> str | None:
    """Return the device that the optimizer is offloaded to, ``cpu`` or ``nvme``; None without offloading."""
    device: str | None = (zero.get(OFFLOAD) or {}).get("device")
    return device


def _keep_gradients_in_memory(settings: Json, largest: int, source: str, *, free: bool) -> None:
    """Prevent gradients of trainable tensors, of at most ``largest`` bytes each, from being swapped to NVMe.

    DeepSpeed has gradients in memory anyway, and reads swapped ones directly into their slices of one flat tensor. If
    such a slice is not aligned to 512 bytes, as after a tensor of odd size, nothing is read, without an error, and the
    tensor does not train. Tensors smaller than a block are not swapped.
    """
    aio = settings["aio"]
    if free:
        aio[BLOCK_SIZE] = max(MIN_SWAP_BYTES, (largest // 4096 + 1) * 4096)
    elif max(aio[BLOCK_SIZE], MIN_SWAP_BYTES) <= largest:
        raise UserError(
            f"{source} sets aio.block_size to {aio[BLOCK_SIZE]}, but with the optimizer on NVMe it must exceed the "
            f'{largest} bytes of the largest trained tensor, or DeepSpeed loses gradients. Write "auto" there'
        )


def resolve_deepspeed_config_for_inference(path: str | Path, dtype: str) -> Json:
    """Return the engine's configuration for inference with a model that is sharded over the processes."""
    ranks = world_size()
    layout = compute_batch_layout(ranks, 1, ranks)
    config = check_by_deepspeed(
        resolve_deepspeed_config(read_engine_file(path), layout, dtype=dtype, clip=0.0, source=str(path))
    )
    if config.stage != 3:
        raise UserError(
            f"evaluate.engine is {path}, of ZeRO stage {config.stage}, but only stage 3 spreads a model. Take "
            "ds_configs/zero3.json, or none: then each process has the whole model"
        )
    config.settings["zero_optimization"].pop(OFFLOAD, None)
    return config.settings


def flatten_dict(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Yield the leaves of nested settings with dotted names, such as ``("zero_optimization.stage", 2)``."""
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        pairs += flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs
