"""Checks of what is installed: versions, libraries that must import, compilers."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from subspace import __version__
from subspace.distributed.deepspeed_config import read_engine_file
from subspace.distributed.device import device, on_gpu
from subspace.doctor.base import (
    Asked,
    Check,
    Facts,
    Finding,
    Seen,
    describe,
    failed,
    group,
    ok,
    sentences,
    skipped,
    warning,
)
from subspace.errors import UserError
from subspace.resolve import resolve_run
from subspace.training.logging import PACKAGES, git_commit

REINSTALL = "install requirements.txt anew on every host, or share one environment"


class Versions(Check):
    """Compare the versions of everything that computes or communicates."""

    name = "versions"
    asks = "the same Python, libraries, CUDA, NCCL and commit on every process, within the tested ranges"
    #: Named in the table where all is well.
    SHOWN = ("python", "torch", "deepspeed", "transformers", "bitsandbytes", "subspace")

    def collect(self, asked: Asked) -> Any:
        import torch

        nccl = torch.cuda.nccl.version() if on_gpu() else None  # type: ignore[no-untyped-call]
        known: dict[str, str | None] = {
            "python": platform.python_version(),
            "subspace": __version__,
            "commit": git_commit(),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, nccl)) if nccl else None,
        }
        wanted = {name: requirement for name, requirement in _requirements().items() if requirement}
        known |= {name: _version(name) for name in dict.fromkeys([*PACKAGES, *wanted])}
        outside = {
            name: str(wanted[name].specifier)
            for name, found in known.items()
            if found and name in wanted and not wanted[name].specifier.contains(found, prereleases=True)
        }
        return {"versions": known, "outside": outside}

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        versions = {rank: fact["versions"] for rank, fact in facts.items()}
        for name in dict.fromkeys(name for known in versions.values() for name in known):
            if apart := seen.differences(versions, name):
                advice = "check out one commit on every host" if name == "commit" else REINSTALL
                yield failed(f"{name} differs: {apart}", advice)
        first = versions[min(versions)]
        for outside, ranks in group({rank: fact["outside"] for rank, fact in facts.items()}):
            for name, tested in outside.items():
                found = f"{name} {versions[ranks[0]][name]} is outside the tested range {tested} ({seen.where(ranks)})"
                yield warning(found, f"pip install '{name}{tested}', or run the tests with what is there")
        shown = ", ".join(f"{name} {first[name]}" for name in self.SHOWN if first.get(name))
        yield ok(f"{shown}, commit {_short(first['commit'])}")


def _short(commit: str | None) -> str:
    return commit[:8] + commit[40:] if commit else "unknown"


def _requirements() -> dict[str, Requirement]:
    """Return what the installed package requires, without extras; nothing if it runs from a checkout alone."""
    try:
        lines = importlib.metadata.requires("subspace") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines]
    return {one.name: one for one in parsed if not one.marker or one.marker.evaluate({"extra": ""})}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


class Imports(Check):
    """Import what a run imports late, so that a broken library shows before the model is loaded."""

    name = "imports"
    asks = "libraries that a run needs can be imported"
    #: Module, the package that brings it, and what it is for.
    MODULES = (
        ("deepspeed", "deepspeed", "training"),
        ("transformers.modeling_utils", "transformers", "models"),
        ("accelerate", "accelerate", "models"),
        ("safetensors.torch", "safetensors", "models and adapters"),
        ("datasets", "datasets", "prepared data"),
        ("sentencepiece", "sentencepiece", "tokenizers of LLaMA 1 and 2"),
        ("google.protobuf", "protobuf", "tokenizers of LLaMA 1 and 2"),
        ("bitsandbytes", "bitsandbytes", "model.quantize and 8-bit optimizers"),
        ("torch.utils.tensorboard", "tensorboard", "train.trackers"),
    )
    #: Without these nothing can be trained; the others matter where the configuration says so.
    ALWAYS = ("deepspeed", "transformers", "accelerate", "safetensors", "datasets")

    def collect(self, asked: Asked) -> Any:
        broken = {}
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells which of its optional kernels are absent
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module, package, _ in self.MODULES:
                try:
                    importlib.import_module(module)
                except Exception as error:
                    broken[package] = describe(error)
        return broken

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        needed = {*self.ALWAYS, *self._needed(seen)}
        uses = {package: use for _, package, use in self.MODULES}
        for broken, ranks in group(facts):
            for package, reason in broken.items():
                state = failed if package in needed else warning
                found = f"{package} ({uses[package]}) does not import: {reason} ({seen.where(ranks)})"
                yield state(found, f"pip install --force-reinstall {package}")
        yield ok(f"all of {', '.join(uses)}")

    @staticmethod
    def _needed(seen: Seen) -> list[str]:
        if not seen.config:
            return []
        needed = ["tensorboard"] if "tensorboard" in seen.config.train.trackers else []
        eight_bit = seen.config.train.optimizer != "adamw"
        return [*needed, *(["bitsandbytes"] if eight_bit or seen.config.model.quantize != "none" else [])]


class Settings(Check):
    """Resolve the configuration as training would, on every host."""

    name = "settings"
    asks = "the configuration is the same everywhere, and training would accept it there"

    def collect(self, asked: Asked) -> Any:
        if asked.config is None:
            return {"refused": asked.config_error} if asked.config_file else None
        plain, engine = asked.config.as_dict(), None
        try:
            engine = read_engine_file(asked.config.engine)
            resolve_run(asked.config, asked.ranks, device())
            refused = None
        except UserError as error:
            refused = str(error)
        text = json.dumps([plain, engine], sort_keys=True, default=str)
        return {"refused": refused, "digest": hashlib.sha256(text.encode()).hexdigest()[:12]}

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        given = {rank: fact for rank, fact in facts.items() if fact}
        if not given:
            yield skipped("no CONFIG was given")
            return
        for refused, ranks in group({rank: fact["refused"] for rank, fact in given.items()}):
            if refused:
                found, advice = sentences(refused)
                yield failed(f"{found} ({seen.where(ranks)})", advice)
        read = {rank: fact for rank, fact in given.items() if "digest" in fact}
        if apart := seen.differences(read, "digest"):
            yield failed(f"hosts read different configurations: {apart}", "copy it and its engine file to every host")
        yield ok(f"training accepts {seen.config_file} on {seen.ranks} processes")


class Compilers(Check):
    """Look for the compilers that a run's settings need; by default none is needed."""

    name = "compilers"
    asks = "compilers and ninja, where the run's settings need them"

    def collect(self, asked: Asked) -> Any:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # as the launcher does
        found = {
            "a C++ compiler": os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"),
            "a C compiler": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc"),
            "ninja": shutil.which("ninja", path=path),
            "Python's headers": _headers(),
        }
        needs = {what: needs for what, needs in _compiled(asked).items() if needs}
        if "libaio" in {name for names in needs.values() for name in names}:
            from subspace.distributed.deepspeed_compat import async_io_supported

            found["libaio"] = "usable" if async_io_supported() else None
        return {"found": found, "needs": needs}

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        for fact, ranks in group(facts):
            for setting, names in fact["needs"].items():
                if missing := [name for name in names if not fact["found"].get(name)]:
                    packages = "apt-get install g++ ninja-build python3-dev libaio-dev has them all"
                    found = f"{setting} needs {' and '.join(missing)} ({seen.where(ranks)})"
                    yield failed(found, f"install what is missing ({packages}), or do without that setting")
        first = facts[min(facts)]
        here = ", ".join(name for name, path in first["found"].items() if path) or "none"
        needed = ", ".join(first["needs"]) or ("nothing needs one" if seen.config else "the defaults need none")
        yield ok(f"found {here}; {needed}")


def _headers() -> str | None:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return str(header) if header.is_file() else None


def _compiled(asked: Asked) -> dict[str, list[str]]:
    """Return the settings that compile something, with what they need."""
    if asked.config is None:
        return {}
    needs: dict[str, list[str]] = {}
    if asked.config.train.compile:
        needs["train.compile"] = ["a C++ compiler"]
        if device().type == "cuda":
            needs["train.compile"] += ["a C compiler", "Python's headers"]  # Triton builds its launcher with them
    try:
        engine = read_engine_file(asked.config.engine)
    except UserError:  # told by the check `settings`
        return needs
    zero = engine.get("zero_optimization") or {}
    places = [(zero.get(key) or {}).get("device") for key in ("offload_optimizer", "offload_param")]
    if "nvme" in places:
        needs[f"{asked.config.engine} (NVMe)"] = ["a C++ compiler", "ninja", "libaio"]
    if places[0] == "cpu" and engine.get("zero_force_ds_cpu_optimizer"):
        needs[f"{asked.config.engine} (DeepSpeed's CPU Adam)"] = ["a C++ compiler", "ninja"]
    return needs
