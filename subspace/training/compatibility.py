"""Detection of incompatible model, method and engine settings before anything is loaded.

Some combinations never work (:func:`find_incompatibility`), others not on this machine
(:func:`find_missing_requirement`). ``tests/long/MATRIX.md`` lists the combinations trained and rejected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from subspace.adapters.base import Adapter, MethodConfig
from subspace.distributed.deepspeed_compat import NVME_LIBRARIES, async_io_supported, build_lock, fp16_supported
from subspace.errors import UserError
from subspace.models.config import ModelConfig

Json = Mapping[str, Any]
STORAGE = {"nf4": "4bit", "fp4": "4bit", "int8": "int8"}


def check_compatibility(
    model: ModelConfig, methods: Sequence[tuple[type[Adapter], MethodConfig]], engine: Json, *, here: bool = True
) -> None:
    """Raise UserError for settings that are incompatible, in general or, if the run is to be here, on this machine."""
    reason = find_incompatibility(model, methods, engine)
    if reason is None and here:
        reason = find_missing_requirement(model, engine)
    if reason:
        raise UserError(reason)


def check_packing(methods: Sequence[type[Adapter]]) -> None:
    """Raise UserError if packing is on and a method would affect only the first row of a sequence."""
    for method in methods:
        if method.site == "embedding":
            raise UserError(
                f"data.packing puts several rows into a sequence, but method {method.name} puts its vectors before the "
                "first one only. Set data.packing=false, or use prefix, whose vectors every row attends to"
            )


def find_incompatibility(
    model: ModelConfig, methods: Sequence[tuple[type[Adapter], MethodConfig]], engine: Json
) -> str | None:
    """Return a message on incompatible settings, with an alternative that works; None if all are compatible.

    Args:
        model: the base model's settings.
        methods: the classes of adapters and their settings.
        engine: DeepSpeed's resolved configuration.
    """
    stage = engine["zero_optimization"]["stage"]
    optimizer, weights = _offloaded(engine, "offload_optimizer"), _offloaded(engine, "offload_param")
    if optimizer and stage == 0:
        return "the engine offloads the optimizer at ZeRO stage 0, where DeepSpeed leaves it in place. Set stage 1 or 2"
    if optimizer == "nvme" and stage != 3:
        return (
            f"the engine offloads the optimizer to NVMe at ZeRO stage {stage}, which stage 3 alone can. Set it to cpu"
        )
    if weights and stage != 3:
        return f"the engine offloads the weights at ZeRO stage {stage}, which stage 3 alone can. Set stage 3"
    if weights == "nvme":
        # DeepSpeed reads them back in the engine's dtype, whatever their own.
        dtype = next(
            (f for f, name in (("float16", "fp16"), ("bfloat16", "bf16")) if engine[name]["enabled"]), "float32"
        )
        if model.quantize != "none":
            return (
                f"the engine offloads weights to NVMe as {dtype}, but `quantize: {model.quantize}` packs them into "
                "bytes. Offload them to cpu, where they stay as they are, or set quantize to none"
            )
        if model.dtype != dtype:
            return (
                f"the engine offloads weights to NVMe as {dtype}, but model.dtype is {model.dtype}. Offload them to "
                f"cpu, or enable bf16 in the engine's file, which makes the adapters {model.dtype} too"
            )
    kind = STORAGE.get(model.quantize)
    for cls, config in methods:
        if kind and (reason := cls.check_quantization(config, kind)):
            return f"method {cls.name} was asked for with `quantize: {model.quantize}`: {reason}"
    return None


def find_missing_requirement(model: ModelConfig, engine: Json) -> str | None:
    """Return a message on a missing requirement of this machine, with an alternative; None if nothing is missing."""
    if model.dtype == "float16" and not fp16_supported():
        return "model.dtype is float16, which this device cannot compute in. Use model.dtype=bfloat16 or float32"
    if "nvme" not in (_offloaded(engine, "offload_param"), _offloaded(engine, "offload_optimizer")):
        return None
    if not async_io_supported():
        return (
            "the engine offloads to NVMe, for which DeepSpeed compiles a library that needs libaio. "
            "Install it (apt-get install libaio-dev), or offload to cpu"
        )
    for library in NVME_LIBRARIES:
        # A killed build leaves its lock file behind, and the next one waits for it for ever.
        if (lock := build_lock(library)).exists():
            return (
                f"the engine offloads to NVMe, for which DeepSpeed compiles a library, and {lock} says that another "
                "process is doing so. If none is (a build that was killed leaves it behind), remove that file"
            )
    return None


def _offloaded(engine: Json, what: str) -> str | None:
    device = (engine["zero_optimization"].get(what) or {}).get("device", "none")
    return None if device == "none" else str(device)
