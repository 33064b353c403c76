"""A run's folder, its rows and steps, and where it begins or goes on: with which adapters, checkpoint and defaults."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from subspace.adapters.inject import adapters, has_schedule
from subspace.adapters.registry import resolve_recorded_method
from subspace.adapters.serialization import TENSORS, check_adapter_base, fill_adapters, read_adapter
from subspace.common.files import file_sha256
from subspace.common.progress import no_progress, show_progress
from subspace.common.settings import declared_settings
from subspace.config import METHOD, MethodEntry, RunConfig, read_config
from subspace.data.dataset import Data, open_data
from subspace.data.sampler import StepPlan
from subspace.distributed.launcher import launched_rank
from subspace.errors import UserError
from subspace.models.base_record import BaseRecord, check_base, identify
from subspace.models.inspection import settle
from subspace.models.loading import model_limits, open_tokenizer
from subspace.resolve import (
    ResolvedRun,
    data_settings,
    shape_with_adapters,
    step_draw,
    step_plan,
    with_absolute_paths,
    with_current_names,
)
from subspace.training.checkpoint import checkpoints, own_adapter, read_environment
from subspace.training.logging import LOG_FILE
from subspace.training.optimizers import lr_factor
from subspace.training.resume import (
    ADAPTER,
    Checkpoint,
    FoundCheckpoint,
    changed_settings,
    check_resumable,
    find_checkpoint,
    read_checkpoint,
    read_facts,
)

logger = logging.getLogger(__name__)

ANOTHER_NAME = ", or give this run another name (name=...)"

#: Defaults up to version 0.1 of settings whose default is another now. A run that began with them goes on with them.
FORMER_DEFAULTS: Mapping[tuple[str, str], Any] = {
    ("data", "prompt"): "alpaca-indented",
    ("data", "max_length"): 256,
    ("data", "validation"): 120,
    ("train", "warmup_steps"): 100,
    ("train", "validate_every"): 0,
}


Material = tuple[Data, StepPlan]


def ensure_new_run_dir(folder: Path) -> None:
    """Raise UserError for a folder that already holds a run, finished or not."""
    if (folder / LOG_FILE).exists() or (folder / ADAPTER).exists() or checkpoints(folder):
        raise UserError(
            f"{folder} already holds a run. Give this one another name (name=...), or remove that folder; if that run "
            "did not finish, --resume continues it"
        )


def new_run_id() -> str:
    """Return a name for a run that no other has, by which its checkpoints and its adapter are known."""
    return secrets.token_hex(8)


def is_finished(config: RunConfig) -> bool:
    """Return True if the run's folder holds the finished training of this exact configuration, with its adapter.

    A damaged adapter is told; the last checkpoint has it too.

    Raises:
        UserError: the training is finished, but of another base.
    """
    about = read_environment(config.folder)
    if "outcome" not in about:
        return False
    try:
        before = read_config(config.folder / "config.yaml", found_in_run=True)
        config = with_absolute_paths(with_former_defaults(config, before.as_dict()))
        model = settle(config.model)
        # The base is compared by its bytes.
        place = {name: getattr(before.model, name) for name in ("path", "revision", "trust_remote_code")}
        free = {name: getattr(before, name) for name in ("name", "runs", "evaluate", "published")}
        same = replace(config, model=replace(model, **place), **free) == with_absolute_paths(before)
    except (OSError, ValueError, UserError):
        return False
    if not same:
        return False
    try:
        description, _ = read_adapter(config.folder / ADAPTER)
    except UserError as error:
        logger.warning("note: the run had ended, but %s", error)
        return False
    if _run_named(description) != about.get("run"):
        logger.warning("note: the run had ended, but %s is another run's", config.folder / ADAPTER)
        return False
    recorded = description.get("base")
    if not recorded:
        return before.model == config.model
    check_base(f"the run {config.folder}", recorded, identify(model), ANOTHER_NAME)
    return True


def _run_named(description: Mapping[str, Any]) -> Any:
    """Return the run that an adapter's description names."""
    about = description.get("about")
    return about.get("run") if isinstance(about, Mapping) else None


def open_run_data(run: ResolvedRun, *, held_out: int | None = None, former: bool = False) -> Material:
    """Open the tokenised rows and assign them to steps.

    Called before the process group is initialised, so that tokenising a large data set cannot time out a collective.

    Args:
        run: the run.
        held_out: the number of rows to hold out where the settings leave it open, in a resumed run.
        former: as for :class:`StepPlan`.
    """
    config = run.config
    progress = show_progress if launched_rank() == 0 else no_progress
    draw = step_draw(config, run.layout)
    settings = data_settings(config)
    if config.data.validation is None and held_out is not None:
        settings = replace(settings, validation=held_out)
    limits = model_limits(config.model)
    data = open_data(settings, open_tokenizer(config.model), config.train.seed, progress, draw, limits)
    plan = step_plan(data, config, run.layout, former=former)
    return replace(data, report=data.report | data.counts(plan.all_rows)), plan


def check_resume_settings(run: ResolvedRun) -> None:
    """Raise UserError, before rows and model are read, for settings that a run's newest checkpoint was not made with.

    :func:`find_resume_point` compares with the checkpoint that is taken, which may be an older one.
    """
    folder = run.config.folder
    for path in reversed(checkpoints(folder)):
        try:
            facts = read_facts(path)
        except UserError:  # it is looked at again, with its checksums
            continue
        saved = _with_younger_settings(with_current_names(facts["config"]), run.config)
        check_resumable(folder, {**facts, "config": saved}, with_former_defaults(run.config, saved).as_dict())
        return


def find_resume_point(
    run: ResolvedRun, material: Material, base: BaseRecord, run_id: str | None = None
) -> tuple[ResolvedRun, Material, Checkpoint | None, list[str]]:
    """Return the run and its rows as they were when it began, the checkpoint to continue from, and notices.

    Without a checkpoint, these are the arguments and None. ``run_id`` is the run's, on the first process, where its
    folder says it. Collective over ranks.

    Raises:
        UserError: the checkpoint is one of another base, a setting has changed that determines its numbers, or only a
            checkpoint is left whose last step would be another one now.
    """
    folder = run.config.folder
    found = find_checkpoint(folder, run=run_id)
    notices = found.notices
    if found.path:
        if notice := check_base(f"the run {folder}", found.facts.get("base"), base, ANOTHER_NAME):
            notices.append(notice)
        saved = _with_younger_settings(with_current_names(found.facts["config"]), run.config)
        run = replace(run, config=with_former_defaults(run.config, saved))
        check_resumable(folder, {**found.facts, "config": saved}, run.config.as_dict())
        material = _rows_as_they_were(run, material, found.facts)
        if _ends_too_small(found.facts, material[1]):
            notices.append(
                f"step {found.facts['step']} was the last one of a shorter run, with fewer rows than it has now: it is "
                "made again, with all of them"
            )
            found = _find_before(folder, found.facts["step"], run_id)
            notices += found.notices
    else:
        notices.append(f"{folder} holds no checkpoint to resume from: the run starts at its beginning")
    checkpoint = read_checkpoint(found.path, found.facts) if found.path else None
    return run, material, checkpoint, notices


def _with_younger_settings(saved: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return a checkpoint's settings with those of its methods that are younger than it."""
    methods = saved[METHOD] if isinstance(saved[METHOD], list) else [saved[METHOD]]
    if len(methods) != len(config.method):
        return saved
    own = [_with_method_defaults(values, entry) for values, entry in zip(methods, config.method, strict=True)]
    return {**saved, METHOD: own if isinstance(saved[METHOD], list) else own[0]}


def _with_method_defaults(values: Mapping[str, Any], entry: MethodEntry) -> dict[str, Any]:
    if values["name"] != entry.name:
        return dict(values)  # another method, which is refused
    defaults = {name: info.default for name, info in declared_settings(type(entry.settings)).items()}
    return defaults | dict(entry.adapter_class.settings_of_file(values))


def with_former_defaults(config: RunConfig, saved: Mapping[str, Any]) -> RunConfig:
    """Return a run's settings with the defaults of its beginning, where they were others.

    ``saved`` are the settings that it began with, as :meth:`RunConfig.as_dict` returns them.
    """
    changes: dict[str, dict[str, Any]] = {}
    for (section, name), former in FORMER_DEFAULTS.items():
        part = getattr(config, section)
        is_default = getattr(part, name) == declared_settings(type(part))[name].default
        if is_default and saved.get(section, {}).get(name) == former:
            changes.setdefault(section, {})[name] = former
    return replace(config, **{part: replace(getattr(config, part), **values) for part, values in changes.items()})


def _rows_as_they_were(run: ResolvedRun, material: Material, facts: Mapping[str, Any]) -> Material:
    """Return the rows and steps of a resumed run, whose held-out rows are those of its beginning."""
    held_out, former = facts.get("held_out"), "rows" not in facts
    if former or held_out not in (None, len(material[0].validation)):
        material = open_run_data(run, held_out=held_out, former=former)
    if run.config.train.validates and not len(material[0].validation):
        raise UserError(
            f"a validation is due, but {run.config.folder} held out no rows when it began, and has trained on all. "
            "Resume with train.validate_every=0, or give this run another name"
        )
    return material


def _ends_too_small(facts: Mapping[str, Any], plan: StepPlan) -> bool:
    """Return True if the checkpoint's last step had fewer rows than it has now, because the run ended there."""
    return "rows" in facts and plan.rows_until(facts["step"]) > int(facts["rows"])


def _find_before(folder: Path, step: int, run_id: str | None) -> FoundCheckpoint:
    """Return the checkpoint before the last step of a run that is to be longer; none if that was the first step."""
    found = find_checkpoint(folder, before=step, run=run_id)
    if not found.path and step > 1:
        raise UserError(
            f"{folder} cannot be made longer: its last step, {step}, had fewer rows than it has in a longer run, and "
            "no checkpoint from before it is left. Give this run another name, with train.keep_checkpoints=2 or more"
        )
    return found


def describe_resume(checkpoint: Checkpoint, run: ResolvedRun, plan: StepPlan) -> list[str]:
    """Return notices of the step a run resumes at, the changed settings, and what another length means."""
    facts = {**checkpoint.facts, "config": with_current_names(checkpoint.facts["config"])}
    changes = changed_settings(facts, run.config.as_dict(), run.engine.settings, run.layout.ranks)
    notices = [f"resumes after step {facts['step']}", *(f"changed: {change}" for change in changes)]
    return notices + _describe_length(run.config, facts, len(plan))


def _describe_length(config: RunConfig, facts: Mapping[str, Any], steps: int) -> list[str]:
    """Return a notice of what the steps so far would have been in a run of the present length, if it is another."""
    train, before, done = config.train, facts.get("planned"), facts["step"]
    if before in (None, steps):
        return []
    length = f"the run has {steps:,} steps now, and was to have {before:,}"
    rates = [[lr_factor(train, step, of) for of in (before, steps)] for step in range(done)]
    scheduled = [entry.name for entry in config.method if has_schedule(entry.adapter_class)]
    if all(then == now for then, now in rates) and not scheduled:
        return [f"{length}: its first {done:,} were those of a run of {steps:,}"]
    what = f"train.schedule={train.schedule}" + (", train.warmup_steps=null" if train.warmup_steps is None else "")
    what += "".join(f", the schedule of {name}" for name in scheduled)
    now = lr_factor(train, done, steps) * train.learning_rate
    return [
        f"{length}: the learning rates and schedules of its first {done:,} were those of a run of {before:,} ({what}); "
        f"from step {done + 1:,} on they are those of a run of {steps:,}, beginning with a learning rate of {now:.3g}"
    ]


# Training that begins with the values of adapters that were trained before.


def check_start(run: ResolvedRun, base: BaseRecord) -> None:
    """Raise UserError for adapters to begin with that do not fit, before the model's weights are opened."""
    config = run.config
    if config.train.start_from and not config.model.trust_remote_code:
        start_adapters(shape_with_adapters(run)[0], config.train.start_from, base)


def start_adapters(model: nn.Module, path: str | os.PathLike[str], base: BaseRecord | None) -> list[str]:
    """Give a model's new adapters the values of saved ones, to be trained further; return notices for the user.

    Args:
        model: with adapters of the same methods and sizes, at the same sites.
        path: a run's folder, or an adapter's.
        base: the record of the model.

    Raises:
        UserError: no such adapters, ones of another base, or ones that differ in more than what training may change.
    """
    folder = Path(path).expanduser()
    folder = own_adapter(folder) if (folder / "config.yaml").is_file() else folder
    asked = f"train.start_from={path}"
    description, tensors = read_adapter(folder)
    check_adapter_base(folder, description, base)
    saved = {site: part for part in description["adapters"] for site in part["sites"]}
    own = adapters(model)
    if saved.keys() != own.keys():
        alone = sorted(saved.keys() ^ own.keys())
        raise UserError(
            f"{asked}: its adapters are at {len(saved)} sites and this run's at {len(own)}; {alone[0]} is in one "
            "alone. Give both the same targets"
        )
    changed: dict[str, str] = {}
    for site, adapter in own.items():
        part = saved[site]
        if adapter.name != part["method"]:
            raise UserError(f"{asked}: at {site} its method is {part['method']}, and this run's {adapter.name}")
        if adapter.delayed_grad_params:
            raise UserError(
                f"{asked}: {adapter.name} chooses its directions at a step of its run, and would replace those of that "
                "one. Merge that run, and train on the merged model"
            )
        method = resolve_recorded_method(part["method"], part.get("origin", {}))
        now, before = asdict(adapter.config), {**asdict(method.Config()), **method.settings_of_file(part["settings"])}
        changed |= {
            key: f"{key} was {_said(before[key])} and is {_said(value)}"
            for key, value in now.items()
            if before.get(key) != value and key in before
        }
    fill_adapters(model, tensors, folder, trained=True)
    notices = [
        f"begins with the adapter in {folder} (SHA-256 {file_sha256(folder / TENSORS)[:12]}); what that was trained on "
        "is not compared with the suites"
    ]
    if scheduled := sorted({adapter.name for adapter in own.values() if has_schedule(adapter.method_class)}):
        notices.append(f"the schedule of {', '.join(scheduled)} begins anew")
    if changed:
        notices.append(f"other settings than that adapter was trained with: {'; '.join(changed.values())}")
    return notices


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
