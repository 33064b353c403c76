"""Step 1: the machine, a tiny run at each stage, what waits for the device, and every method against the CPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests.gpu.cases import Check, Figures, LeftOut, Missed, read_cases

REPOSITORY = Path(__file__).resolve().parents[2]
#: What the project can do without.
OPTIONAL = ("peft", "liger-kernel", "triton", "flash-attn")
MODULES = {"huggingface-hub": "huggingface_hub", "pyyaml": "yaml", "protobuf": "google.protobuf"}


# The machine.


def machine(check: Check) -> None:
    """Say what is here, and whether everything can be imported."""
    check.case("python", _python)
    check.case("device", _device, check)
    if read_cases(check.file)["device"]["status"] == "failed":
        return  # check.py ends here
    ranges = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    for requirement in [*ranges, *OPTIONAL]:
        name = re.split(r"[<>=]", requirement)[0]
        check.case(name, _library, name, requirement)
    check.case("modules of the project", _modules)
    check.case("speed", _speed, check)


def _python() -> Figures:
    tools = {tool: shutil.which(tool) or "-" for tool in ("g++", "nvcc", "ninja", "nvidia-smi")}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    disk = shutil.disk_usage(Path.cwd()).free / 1e9
    return {
        "python": f"{platform.python_version()} at {sys.executable}",
        "machine": f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GB",
        "GB of disk free": disk,
        **tools,
    }


def _device(check: Check) -> Figures:
    import torch

    if not check.on_gpu:
        return {"name": platform.processor() or platform.machine(), "torch": torch.__version__}
    if not torch.cuda.is_available():
        raise Missed(f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees no CUDA device")
    torch.zeros(1, device="cuda")
    about = torch.cuda.get_device_properties(0)
    # Builds without it, and drivers that refuse to tell, are no reason to end here.
    try:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    except Exception as error:
        nccl = str(error)
    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    ) if shutil.which("nvidia-smi") else None  # fmt: skip
    return {
        "name": about.name,
        "GB": about.total_memory / 1e9,
        "devices": torch.cuda.device_count(),
        "capability": f"{about.major}.{about.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "driver, clock, power": smi.stdout.strip() if smi else "-",
    }


def _library(name: str, requirement: str) -> Figures:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name in OPTIONAL:
            raise LeftOut(f"{name} is not installed; the project can do without") from None
        raise
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        importlib.import_module(MODULES.get(name, name.replace("-", "_")))
    figures: Figures = {"version": version, "seconds": round(time.perf_counter() - began, 2)}
    figures["in the project's range"] = _in_range(version, requirement)
    figures["warnings"] = len(said)
    return figures


def _in_range(version: str, requirement: str) -> bool:
    from packaging.requirements import Requirement

    return Requirement(requirement).specifier.contains(version, prereleases=True)


def _modules() -> Figures:
    """Import every module of the package; all of them are tried."""
    import subspace

    wrong: dict[str, str] = {}
    found = list(pkgutil.walk_packages(subspace.__path__, "subspace.", onerror=lambda name: None))
    for module in found:
        if module.name in ("subspace.__main__", "subspace.integrations.lm_eval"):  # starts; needs lm-eval
            continue
        try:
            importlib.import_module(module.name)
        except Exception as error:
            wrong[module.name] = f"{type(error).__name__}: {error}"
    if wrong:
        raise Missed(f"{len(wrong)} modules cannot be imported", modules=len(found), **wrong)
    return {"modules": len(found)}


def _speed(check: Check) -> Figures:
    """Measure a large product, copies, and what a launch costs the host: what the other figures are to be read by."""
    import torch

    size = 256 if check.tiny else 8192
    a, b = (torch.randn(size, size, device=check.device, dtype=torch.bfloat16) for _ in "ab")
    each = timed(check, lambda: a @ b, 10)
    small = torch.zeros(1, device=check.device)
    launch = timed(check, lambda: small.add_(1), 2000)
    host = torch.empty((1 if check.tiny else 256) << 20, dtype=torch.uint8, pin_memory=check.on_gpu)
    up = timed(check, lambda: host.to(check.device, non_blocking=True, copy=True), 5)
    there = host.to(check.device)
    copy = timed(check, lambda: there.clone(), 20)
    free, whole = torch.cuda.mem_get_info() if check.on_gpu else (0, 0)
    return {
        "GB of context, and of others on the device": (whole - free - torch.cuda.memory_reserved()) / 1e9
        if whole
        else "-",
        "bf16 TFLOP/s": 2 * size**3 / each / 1e12,
        "microseconds of a small launch": 1e6 * launch,
        "GB/s from pinned memory": len(host) / up / 1e9,
        "GB/s of a copy there, read and written": 2 * len(host) / copy / 1e9,
    }


def synchronize(check: Check) -> None:
    """Wait for the device."""
    if check.on_gpu:
        import torch

        torch.cuda.synchronize()


def timed(check: Check, do: Callable[[], Any], times: int) -> float:
    """Return the seconds of one call, the mean over several after one that does not count."""
    do()
    synchronize(check)
    began = time.perf_counter()
    for _ in range(times):
        do()
    synchronize(check)
    return (time.perf_counter() - began) / times


# A tiny run.


def train(check: Check) -> None:
    """Train a tiny model at stage 0, 1 and 3; a loss that falls, tensors that are finite, warnings told."""
    for stage in (0, 1, 3):
        check.case(f"ZeRO {stage}", _train, check, stage)


def _train(check: Check, stage: int) -> Figures:
    import torch

    from tests.helpers.material import logged, saved_adapter

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        folder = train_tiny(check, f"zero{stage}", "train.steps=12", "model.dtype=bfloat16", stage=stage)
    losses = logged(folder)
    figures: Figures = {
        "first loss": losses[0],
        "last loss": losses[-1],
        "peak MB": logged(folder, "peak_memory")[-1] / 1e6,
    }
    figures["warnings"] = list(dict.fromkeys(f"{Path(one.filename).name}: {str(one.message)[:200]}" for one in said))
    if not losses[-1] < losses[0] - 0.3:
        raise Missed("the loss did not fall by 0.3", **figures)
    if not all(tensor.isfinite().all() for tensor in saved_adapter(folder).values()):
        raise Missed("an adapter is not finite", **figures)
    figures["on a GPU"] = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    return figures


def train_tiny(check: Check, name: str, *settings: str, stage: int = 0, resume: bool = False) -> Path:
    """Train the tiny model of ``tests/helpers/material.py`` in this process; return the run's folder."""
    from subspace.config import read_config
    from subspace.run import train_run

    own = [f"runs={check.root}", f"name={name}", f"engine={check.root}/zero{stage}.json"]
    return train_run(read_config(tiny_material(check), [*own, *settings]), resume=resume)


def tiny_material(check: Check) -> Path:
    """Return the configuration of a tiny run; make it, its model and its rows if they are not there."""
    from tests.helpers.material import make_material

    return check.root / "run.yaml" if (check.root / "run.yaml").exists() else make_material(check.root)


# What waits for the device.


def syncs(check: Check) -> None:
    """List what makes the host wait for the device in the steps after the first ones, by file and line."""
    for micro_batches in (1, 2):
        check.case(f"{micro_batches} micro-batches a step", _syncs, check, 8 // micro_batches)


def _syncs(check: Check, micro_batch: int) -> Figures:
    import torch

    from subspace.distributed.watchdog import Watchdog

    first, last = 4, 14  # of the steps that are looked at; a validation or a checkpoint is not among them
    seen: list[int] = []
    beat = Watchdog.beat

    def listening(watchdog: Watchdog, doing: int | str, patience: float = 1.0) -> None:
        if isinstance(doing, int):
            seen.append(doing)
            if check.on_gpu:
                torch.cuda.set_sync_debug_mode("warn" if first <= doing < last else "default")
        beat(watchdog, doing, patience)

    settings = ["model.dtype=bfloat16", "train.log_every=10", "train.save_every=0", f"train.steps={last + 2}"]
    with mock.patch.object(Watchdog, "beat", listening), _told() as places:
        train_tiny(check, f"micro{micro_batch}", *settings, f"train.micro_batch_size={micro_batch}", stage=1)
    steps = last - first
    if not {*range(first, last)} <= set(seen):
        raise Missed(f"the steps {first} to {last - 1} were not seen", seen=len(seen))
    return {
        "a step": sum(places.values()) / steps,
        "where": [f"{count / steps:g} x {place}" for place, count in places.most_common()],
    }


@contextmanager
def _told() -> Iterator[Counter[str]]:
    """Collect torch's warnings of synchronising operations by the line of the project that made them."""
    from tests.helpers.op_counts import calling_line

    places: Counter[str] = Counter()

    def tell(message: Any, *more: Any, **named: Any) -> None:
        if "called a synchronizing" in str(message):
            places[calling_line()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = tell
        yield places
