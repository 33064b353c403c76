"""Inspection of runs: each site's update beside its frozen weight, over runs and over the steps of a run.

A weight is decomposed once, for all adapters that are inspected. What is no update of one linear layer's weight, as a
prompt, a bottleneck or a bias, is left out and counted.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subspace.adapters.base import Adapter, LinearAdapter
from subspace.adapters.inject import adapters, remove_adapters
from subspace.adapters.serialization import TENSORS, check_adapter_base, load_adapter, read_description
from subspace.common.files import file_sha256, write_json
from subspace.common.locks import in_use
from subspace.common.progress import Progress, no_progress
from subspace.config import read_run_subject
from subspace.diagnostics.subspaces import (
    Site,
    Update,
    between,
    decompose,
    dense_update,
    factored_update,
    measure,
    same_task_directions,
)
from subspace.errors import UserError
from subspace.models.base_record import identify
from subspace.models.frozen_weights import gather_weight_fp32
from subspace.models.loading import open_model
from subspace.training.checkpoint import ADAPTER, checkpoints, find_corruption, step_of

logger = logging.getLogger(__name__)

SCHEMA = 1
FOLDER = "inspect"


class Subject(NamedTuple):
    """An adapter to inspect: a run's, or that of one of its checkpoints."""

    run: Path
    name: str  # of the run, among those that are inspected
    adapter: Path
    step: int | None
    final: bool


@dataclass
class Inspected:
    """What was found of one adapter.

    Attributes:
        sites: by name.
        left_out: by the name of a method, its sites that update no linear layer's weight.
        settled: by site, of an earlier step: the overlap of its directions with the last ones, and the share of its
            task directions that are the last ones too.
    """

    subject: Subject
    sha256: str
    sites: dict[str, Site] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    settled: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The run's name, with the step if the adapter is that of a checkpoint."""
        return self.subject.name if self.subject.final else f"{self.subject.name} at step {self.subject.step}"


class Inspection(NamedTuple):
    """What was found of all adapters, and of each two runs: the overlap of their updates, by site."""

    base: str
    found: list[Inspected]
    pairs: dict[tuple[str, str], dict[str, float | None]]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "schema": SCHEMA,
            "base": self.base,
            "adapters": [_as_dict(self.base, each) for each in self.found],
            "between": [{"runs": list(runs), "overlap": overlap} for runs, overlap in self.pairs.items()],
        }


def _as_dict(base: str, found: Inspected) -> dict[str, Any]:
    sites = [{"site": name, "kind": kind_of(name), **asdict(site)} for name, site in found.sites.items()]
    for each in sites if found.settled else ():
        each["same_subspace"], each["same_task_directions"] = found.settled[each["site"]]
    return {
        "schema": SCHEMA, "base": base, "run": str(found.subject.run), "adapter": found.sha256,
        "step": found.subject.step, "left_out": found.left_out, "sites": sites,
    }  # fmt: skip


def kind_of(site: str) -> str:
    """Return the kind of layer that a site is: the last part of its name."""
    return site.rpartition(".")[2]


def inspect_runs(
    runs: Sequence[Path], overrides: Sequence[str] = (), *, over_steps: bool = False, progress: Progress = no_progress
) -> Inspection:
    """Inspect the adapters of finished runs of one base; write what is found into ``RUN/inspect``.

    Args:
        runs: their folders.
        overrides: settings instead of the runs', as ``model.path=...``.
        over_steps: inspect the adapters of all checkpoints too.
        progress: shows how many sites are done.

    Raises:
        UserError: runs of several bases, or without an update of a weight.
    """
    runs = list(dict.fromkeys(runs))
    subjects = [read_run_subject(run, overrides) for run in runs]
    bases = [identify(subject.model) for subject in subjects]
    for run, base in zip(runs, bases, strict=True):
        if base.weights != bases[0].weights:
            raise UserError(f"{run} and {runs[0]} are of different bases, whose directions cannot be compared")
    if len({subject.model.quantize for subject in subjects}) > 1:
        logger.warning("note: the runs quantise their base differently; all are compared with that of %s", runs[0])
    names = [run.name for run in runs]
    chosen: list[Subject] = []
    for run, subject in zip(runs, subjects, strict=True):
        name = run.name if names.count(run.name) == 1 else str(run)
        assert subject.adapter
        chosen += _subjects(run, name, subject.adapter, over_steps=over_steps)
    for each in chosen:
        check_adapter_base(each.adapter, base=bases[0])
    with ExitStack() as held, torch.no_grad():
        for run in runs:
            held.enter_context(in_use(run))
        model: Any = open_model(subjects[0].model)
        loaded = []
        for each in chosen:
            load_adapter(model, each.adapter)
            loaded.append(adapters(model))
            remove_adapters(model)
        inspection = _inspect(bases[0].weights, chosen, loaded, progress)
        for found in inspection.found:
            folder = found.subject.run / FOLDER
            folder.mkdir(exist_ok=True)
            name = "adapter" if found.subject.final else f"step-{found.subject.step:06d}"
            write_json(folder / f"{name}.json", _as_dict(inspection.base, found))
    return inspection


def _subjects(run: Path, name: str, adapter: Path, *, over_steps: bool) -> list[Subject]:
    """Return a run's adapters, that of its end the last."""
    about = read_description(adapter).get("about") or {}
    step = about.get("step") if isinstance(about, dict) else None
    found = [Subject(run, name, adapter, step if isinstance(step, int) else None, final=True)]
    if not over_steps:
        return found
    earlier = [each for each in checkpoints(run) if step_of(each) != step]
    for each in list(earlier):
        if damage := find_corruption(each):
            logger.warning("note: %s is left out: %s", each, damage)
            earlier.remove(each)
    if not earlier:
        raise UserError(
            f"{run} has no checkpoint before its end, so nothing shows how it got there. Train with "
            "train.save_every=STEPS train.keep_checkpoints=COUNT"
        )
    return [*(Subject(run, name, each / ADAPTER, step_of(each), final=False) for each in earlier), *found]


def _inspect(
    base: str, subjects: Sequence[Subject], loaded: Sequence[dict[str, Adapter]], progress: Progress
) -> Inspection:
    found = [Inspected(subject, file_sha256(subject.adapter / TENSORS)) for subject in subjects]
    finals = [number for number, subject in enumerate(subjects) if subject.final]
    pairs: dict[tuple[str, str], dict[str, float | None]] = {}
    sites = list(dict.fromkeys(site for each in loaded for site in each))
    with progress("inspecting", len(sites), "sites") as at:
        for number, site in enumerate(sites, 1):
            updates = _measure_site(site, found, loaded)
            for n, update in updates.items():
                last = next(final for final in finals if final >= n)
                if last != n and last in updates:
                    own, end = found[n].sites[site], found[last].sites[site]
                    found[n].settled[site] = between(update, updates[last]), same_task_directions(own, end)
            for n, first in enumerate(finals):
                for second in finals[n + 1 :]:
                    if first in updates and second in updates:
                        names = found[first].label, found[second].label
                        pairs.setdefault(names, {})[site] = between(updates[first], updates[second])
            at(number)
    if not any(each.sites for each in found):
        left = {name: count for each in found for name, count in each.left_out.items()}
        raise UserError(
            f"nothing to inspect: what is looked at are updates of linear layers' weights, and {', '.join(left)} has "
            "none"
        )
    return Inspection(base, found, pairs)


def _measure_site(site: str, found: Sequence[Inspected], loaded: Sequence[dict[str, Adapter]]) -> dict[int, Update]:
    """Measure the updates of one site, and return them by the numbers of their adapters."""
    updates: dict[int, Update] = {}
    frozen = None
    for number, by_site in enumerate(loaded):
        adapter: Any = by_site.get(site)
        if adapter is None:
            continue
        of_weight = isinstance(adapter, LinearAdapter) and adapter.mergeable and set(adapter.roles.values()) != {"bias"}
        if not of_weight:
            found[number].left_out[adapter.name] = found[number].left_out.get(adapter.name, 0) + 1
            continue
        W = gather_weight_fp32(adapter.base)
        frozen = frozen or decompose(W)
        updates[number] = _update(adapter, W)
        found[number].sites[site] = measure(frozen, updates[number], seed=zlib.crc32(site.encode()))
    return updates


def _update(adapter: Any, W: Tensor) -> Update:
    factors = adapter.to_lora()
    if factors is not None:
        return factored_update(*factors)
    tensors = {tensor: tensor.data for tensor in adapter.own_tensors().values()}
    try:  # in float64: the difference of two weights leaves the rounding of both
        for tensor in tensors:
            tensor.data = tensor.data.double()
        return dense_update(adapter.weight(W.double()) - W.double())
    finally:
        for tensor, before in tensors.items():
            tensor.data = before


def to_json(inspection: Inspection) -> str:
    """Return what was found, in JSON."""
    return json.dumps(inspection.as_dict(), indent=2)
