"""The resolved grid of a study: each method's settings at the budget, its ladder of rates, and its trials.

It is kept in ``runs/STUDY/study.json``. What is in it decides every number of the study, so runs that were made by
another grid are refused.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from subspace.adapters.base import Adapter
from subspace.adapters.parameter_count import count_trained, match_budget
from subspace.adapters.registry import configure, resolve_method
from subspace.common.foreign.yaml_files import format_value
from subspace.common.progress import Progress, no_progress
from subspace.config import RunConfig, portable, read_config
from subspace.errors import UserError
from subspace.models.loading import open_shape
from subspace.study.centres import exponents, gradient_norms
from subspace.study.config import ANSWER_LOGPROB, Budget, Method, Study
from subspace.study.search import HIGHEST_RATE, Rules, Trial, round_rate, rungs_of


@dataclass(frozen=True)
class Contender:
    """A method at its size.

    Attributes:
        label: its name in tables and folders.
        name: the method's.
        settings: of the method, its size among them.
        targets: whether it acts on the base's targets; the others choose their own sites.
        size: the setting that makes it larger or smaller, and its value; None for a method without.
        trained: how many numbers it trains.
        off: why it is not at the budget; empty where it is.
        gradient: its Euclidean norm before the first step.
        exponent: steps of the ladder between the base's rate and the middle of its own.
        trials: the planned ones.
    """

    label: str
    name: str
    settings: Mapping[str, Any]
    targets: bool
    size: tuple[str, int] | None
    trained: int
    off: str
    gradient: float = 0.0
    exponent: int = 0
    trials: tuple[Trial, ...] = ()

    def overrides(self) -> list[str]:
        """Return the settings of a run with this method, as ``key=value``."""
        own = [f"method.{name}={format_value(value)}" for name, value in self.settings.items()]
        return [f"method={self.name}", *own, *([] if self.targets else ["targets=null"])]


@dataclass(frozen=True)
class Grid:
    """All that decides the numbers of a study; ``shared`` are the settings that all its runs have."""

    name: str
    runs: str
    base: str
    overrides: tuple[str, ...]
    shared: Mapping[str, Any]
    budget: int
    within: float
    rules: Rules
    search_seeds: tuple[int, ...]
    final_seeds: tuple[int, ...]
    reference: str
    primary: str
    also: tuple[str, ...]
    passages: int | None
    contenders: tuple[Contender, ...] = field(default=())

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.runs) / self.name

    @property
    def steps(self) -> int:
        """The steps of a whole run."""
        return self.rules.rungs[-1]

    @property
    def planned(self) -> dict[str, Sequence[Trial]]:
        """Each method's planned trials."""
        return {contender.label: contender.trials for contender in self.contenders}

    def contender(self, label: str) -> Contender:
        """Return a method by its label."""
        return next(contender for contender in self.contenders if contender.label == label)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON has them."""
        return dataclasses.asdict(self)


def base_overrides(study: Study) -> list[str]:
    """Return the study's settings in place of its base's, as ``key=value``."""
    return [f"{name}={format_value(value)}" for name, value in study.settings.items()]


def resolve(study: Study, progress: Progress = no_progress, *, centred: bool = True) -> Grid:
    """Return the grid of a study.

    Args:
        study: the study.
        progress: shows the passes that centre the ladders.
        centred: whether to measure each method's gradient, which loads the model; otherwise all ladders are centred on
            the base's rate.

    Raises:
        UserError: a base without what a study needs, an unknown method or setting, or one of no method.
    """
    overrides = base_overrides(study)
    config = read_config(study.base, overrides)
    steps = _check_base(study, config)
    shape = open_shape(config.model)
    targets = config.method[0].targets
    budget = _budget(study.budget, shape, targets)
    contenders = [_contender(method, shape, targets, budget, study) for method in study.methods]
    halving, rates = study.search.halving, study.rates
    rungs = rungs_of(steps, halving.first, halving.keep, halving.rungs) if halving else (steps,)
    step = rates.step
    if rates.list:
        step = rates.list[-1] / rates.list[-2] if len(rates.list) > 1 else 0.0
    shared = {
        key: value for key, value in portable(config).items() if key not in ("name", "runs", "method", "published")
    }
    grid = Grid(
        name=study.name,
        runs=study.runs or config.runs,
        base=study.base,
        overrides=tuple(overrides),
        shared=shared,
        budget=budget,
        within=study.budget.within,
        rules=Rules(rungs, halving.keep if halving else 0.5, abs(step) if step and step != 1 else None),
        search_seeds=study.search.seeds,
        final_seeds=study.final.seeds,
        reference=study.reference,
        primary=study.outcome.primary,
        also=study.outcome.also,
        passages=study.outcome.passages,
        contenders=tuple(contenders),
    )
    if centred and not rates.list:
        configs = [read_config(study.base, [*overrides, *contender.overrides()]) for contender in contenders]
        norms = gradient_norms(configs, progress)
        at = norms[[contender.label for contender in contenders].index(study.reference)]
        found = zip(contenders, norms, exponents(norms, at, rates.step), strict=True)
        contenders = [dataclasses.replace(one, gradient=own, exponent=number) for one, own, number in found]
    contenders = [
        dataclasses.replace(one, trials=_trials(study, one, config.train.learning_rate, number))
        for number, one in enumerate(contenders)
    ]
    return dataclasses.replace(grid, contenders=tuple(contenders))


def _check_base(study: Study, config: RunConfig) -> int:
    """Return the steps of a run; raise UserError where the base lacks what a study needs."""
    if config.train.steps is None:
        raise UserError(
            f"the base {study.base} is {config.train.epochs:g} epochs long, but the rungs of a study are steps. Give "
            "their number in the study's settings: {train.steps: 300}"
        )
    if config.data.validation == 0:
        raise UserError(
            f"the base {study.base} holds no rows out, and held-out rows judge a search. Set data.validation in the "
            "study's settings: {data.validation: 120}"
        )
    if study.outcome.primary == ANSWER_LOGPROB and not answer_protocol(config):
        raise UserError(
            f"outcome.primary is {ANSWER_LOGPROB}, which the protocol {', '.join(config.evaluate.protocols)} does not "
            "give. Set evaluate.protocol=answer-word or likelihood in the study's settings, or outcome: {primary: "
            "validation_loss}"
        )
    own = ("method", "targets", "train.learning_rate", "train.seed", "train.validate_every", "name", "runs")
    for name in study.settings:
        if name in own or name.startswith("method."):
            raise UserError(f"the study's settings have {name}, which it varies itself. Leave it out there")
    return config.train.steps


def answer_protocol(config: RunConfig) -> str:
    """Return the first of the protocols that give the log-probability of every answer; empty if none does."""
    return next((name for name in config.evaluate.protocols if name in ("answer-word", "likelihood")), "")


def _budget(budget: Budget, shape: Any, targets: Sequence[str] | None) -> int:
    if budget.parameters is not None:
        return budget.parameters
    cls, presets = resolve_method(budget.like)
    return count_trained(shape, cls, configure(cls, {**presets, **budget.settings}), targets=_targets(cls, targets))


def _targets(cls: type[Adapter], targets: Sequence[str] | None) -> Sequence[str] | None:
    """Return the base's targets for methods of linear layers; others, and full fine-tuning, choose their sites."""
    return targets if cls.site == "linear" and cls.name != "full" else None


def _contender(method: Method, shape: Any, targets: Sequence[str] | None, budget: int, study: Study) -> Contender:
    """Return a method at the size that comes nearest to the budget, unless its settings give one."""
    cls, presets = resolve_method(method.name)
    given = {**presets, **method.settings}
    configure(cls, given)  # refuses what it does not know
    where = _targets(cls, targets)
    size = cls.size_setting
    if size in study.axes:
        raise UserError(
            f"axes has {size}, which is the size of {method.name}: the budget decides it. Leave it out there"
        )
    settings = dict(method.settings)
    if size and size not in given:
        settings[size] = match_budget(method.name, shape, budget, targets=where, **given)
    trained = count_trained(shape, cls, configure(cls, {**presets, **settings}), targets=where)
    off = ""
    if abs(trained - budget) > study.budget.within * budget:
        why = "as large as it is" if not size else "as given" if size in given else "nearest size"
        off = f"{trained / budget:.3g} x budget, {why}"
    final = configure(cls, {**presets, **settings})
    shown = (size, int(getattr(final, size))) if size else None
    return Contender(method.label, method.name, settings, where is not None, shown, trained, off)


def _trials(study: Study, contender: Contender, base_rate: float, number: int) -> tuple[Trial, ...]:
    """Return a method's trials: over its rates, or a Latin hypercube over rates and the axes that it has.

    M. McKay, R. Beckman, W. Conover (1979), Technometrics 21:239: each value of each axis occurs as often as any other,
    within one. A method without the axes has as many trials, at as many rates over the same span.
    """
    rates = _ladder(study, contender.exponent, base_rate, study.rates.ladder)
    if max(rates) > HIGHEST_RATE:
        raise UserError(
            f"the ladder of {contender.label} reaches {max(rates):.2g}, and train.learning_rate goes to "
            f"{HIGHEST_RATE:g}. Set rates.step or rates.ladder lower"
        )
    count = study.search.trials or len(rates)
    cls = resolve_method(contender.name)[0]
    known = cls.Config.__dataclass_fields__
    axes = {name: values for name, values in study.axes.items() if "." in name or name in known}
    if not axes:
        return tuple(Trial(rate) for rate in _spread(rates, count, contender.label))
    draw = np.random.default_rng((study.search.seeds[0], number))
    every = [Trial(row[0], tuple(zip(axes, row[1:], strict=True))) for row in itertools.product(rates, *axes.values())]
    if count > len(every):
        raise UserError(f"{count} trials were asked for, but {contender.label} has only {len(every)} different ones")
    found: dict[Trial, None] = {}
    for _ in range(100):  # a hypercube may hold a trial twice
        columns = [_balanced(rates, count, draw), *(_balanced(values, count, draw) for values in axes.values())]
        rows = zip(*columns, strict=True)
        found = dict.fromkeys(Trial(row[0], tuple(zip(axes, row[1:], strict=True))) for row in rows)
        if len(found) == count:
            break
    spare = (trial for trial in every if trial not in found)
    found |= dict.fromkeys(itertools.islice(spare, count - len(found)))
    return tuple(sorted(found, key=lambda trial: (trial.rate, str(trial.axes))))


def _spread(rates: Sequence[float], count: int, label: str) -> Sequence[float]:
    """Return so many different rates over the span of these."""
    if count == len(rates):
        return rates
    if len(rates) < 2:
        raise UserError(f"{label} has none of the axes, and one rate does not make {count} trials. Give more rates")
    low, span = min(rates), max(rates) / min(rates)
    return [round_rate(low * span ** (k / max(1, count - 1))) for k in range(count)]


def _ladder(study: Study, exponent: int, base_rate: float, count: int) -> list[float]:
    if study.rates.list:
        return [round_rate(rate) for rate in sorted(study.rates.list)]
    first = exponent - (count - 1) // 2
    return [round_rate(base_rate * study.rates.step**power) for power in range(first, first + count)]


def _balanced(values: Sequence[Any], count: int, draw: np.random.Generator) -> list[Any]:
    """Return so many of the values in random order, each as often as any other, within one."""
    order = [value for _ in range(-(-count // len(values))) for value in draw.permutation(len(values))][:count]
    return [values[index] for index in draw.permutation(order)]
