"""The file of a study: what is compared, at which size, over which rates, on which seeds."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subspace.common.declarations import Declaration, build
from subspace.common.foreign.yaml_files import read_yaml
from subspace.common.paths import find_resource
from subspace.errors import UserError, nearest
from subspace.study.search import HIGHEST_RATE

#: Outcomes by which methods are called better: of each item, the log-odds of the right answer; or the held-out loss.
ANSWER_LOGPROB, VALIDATION_LOSS = "answer_logprob", "validation_loss"
OUTCOMES = (ANSWER_LOGPROB, VALIDATION_LOSS)
RETENTION = "retention"
BEYOND = ("accuracy", "validation_loss", RETENTION)


@dataclass(frozen=True)
class Budget(Declaration):
    """How many numbers each method may train: ``parameters``, or as many as a method ``like`` with its ``settings``."""

    like: str = "lora"
    parameters: int | None = None
    within: float = 0.02
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method(Declaration):
    """A method, its settings, and the name that it has in tables and folders."""

    name: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rates(Declaration):
    """The learning rates: a ladder of so many, a factor ``step`` apart, around each method's own; or a ``list``."""

    ladder: int = 5
    step: float = 3.16
    list: tuple[float, ...] = ()


@dataclass(frozen=True)
class Halving(Declaration):
    """Successive halving: the ``first`` rung as a share of the steps, what each keeps; ``rungs`` in between."""

    first: float = 0.2
    keep: float = 0.5
    rungs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Search(Declaration):
    """The search: its seeds, its trials a method (null: one a rate), and halving (null: none)."""

    seeds: tuple[int, ...] = (100,)
    on: str = "validation"
    trials: int | None = None
    halving: Halving | None = field(default_factory=Halving)


@dataclass(frozen=True)
class Final(Declaration):
    """The seeds with which each method's best trial is trained anew."""

    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class OutcomeChoice(Declaration):
    """What decides, and what is shown besides: retention is measured on so many ``passages`` (null: on all 2,938)."""

    primary: str = ANSWER_LOGPROB
    also: tuple[str, ...] = BEYOND
    passages: int | None = 200


@dataclass(frozen=True)
class Study(Declaration):
    """A study as its file declares it.

    Attributes:
        base: configuration of what all runs share.
        methods: what is compared.
        settings: settings in place of the base's, by name, as ``train.steps``.
        name: of its folder; by default the file's.
        runs: parent of its folder; by default the base's.
        axes: further settings to search, each with its values.
        reference: the method that each is compared with; by default the first.
    """

    base: str
    methods: tuple[Method, ...]
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    runs: str | None = None
    budget: Budget = field(default_factory=Budget)
    rates: Rates = field(default_factory=Rates)
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    search: Search = field(default_factory=Search)
    final: Final = field(default_factory=Final)
    outcome: OutcomeChoice = field(default_factory=OutcomeChoice)
    reference: str = ""


def read_study(file: Path | str) -> Study:
    """Read a study's file; raise UserError if it is invalid. A base beside the file comes before one of that path."""
    file = Path(file)
    if not file.is_file():
        file = find_resource(file) or file
    if not file.is_file():
        raise UserError(f"there is no study '{file}'. launch/studies has some, such as launch/studies/quick.yaml")
    content = read_yaml(file)
    values = _in_full(content, str(file))
    beside = file.parent / str(values.get("base", ""))
    if "base" in values and beside.is_file():
        values["base"] = str(beside)
    study = build(Study, {"name": file.stem, **values}, str(file))
    study = dataclasses.replace(study, reference=study.reference or study.methods[0].label)
    _check(study, str(file))
    return study


def _in_full(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a file's content with what it writes short in full: a budget's number, methods' names, a list of rates."""
    values = dict(content)
    if "methods" in values:
        if not isinstance(values["methods"], list) or not values["methods"]:
            raise UserError(f"{where}: methods is {values['methods']!r}, but takes a list of methods' names")
        values["methods"] = [_method_in_full(entry, where) for entry in values["methods"]]
    budget = values.get("budget")
    if isinstance(budget, int):
        values["budget"] = {"parameters": budget}
    elif isinstance(budget, Mapping):
        own = {f.name for f in dataclasses.fields(Budget)} - {"settings"}
        settings = {key: value for key, value in budget.items() if key not in own}
        values["budget"] = {**{key: budget[key] for key in budget if key in own}, "settings": settings}
    if isinstance(values.get("rates"), list):
        values["rates"] = {"list": values["rates"]}
    return values


def _method_in_full(entry: Any, where: str) -> dict[str, Any]:
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise UserError(
            f"{where}: methods has {entry!r}, but takes names, or mappings with a name: {{name: lora, r: 8}}"
        )
    settings = {key: value for key, value in entry.items() if key not in ("name", "label")}
    return {"name": entry["name"], "label": str(entry.get("label", entry["name"])), "settings": settings}


def _check(study: Study, where: str) -> None:
    """Raise UserError for values that contradict one another or cannot be searched."""
    labels = [method.label for method in study.methods]
    for name in (study.name, *labels):
        if not re.fullmatch(r"[\w.+-]+", name) or name in (".", ".."):
            raise UserError(f"{where}: {name!r} names a folder: letters, digits and . _ + - only")
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(f"{where}: {twice[0]} is compared twice; give one of them a label: {{name: .., label: ..}}")
    if study.reference not in labels:
        raise UserError(
            f"{where}: reference is {study.reference!r}, which is not compared. {nearest(study.reference, labels)}"
        )
    if both := sorted({*study.search.seeds} & {*study.final.seeds}):
        raise UserError(
            f"{where}: seed {both[0]} is used by the search and by the finals. Finals need seeds that chose nothing: "
            f"give final.seeds others than search.seeds={list(study.search.seeds)}"
        )
    for name, seeds in (("search", study.search.seeds), ("final", study.final.seeds)):
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise UserError(f"{where}: {name}.seeds is {list(seeds)}, but takes different whole numbers from 0")
    if study.search.on != "validation":
        raise UserError(f"{where}: search.on is {study.search.on!r}, but held-out rows judge a search: validation")
    if study.outcome.primary not in OUTCOMES:
        raise UserError(
            f"{where}: outcome.primary is {study.outcome.primary!r}. {nearest(study.outcome.primary, OUTCOMES)}"
        )
    for name in study.outcome.also:
        if name not in BEYOND:
            raise UserError(f"{where}: outcome.also names {name!r}. {nearest(name, BEYOND)}")
    _check_numbers(study, where)


def _check_numbers(study: Study, where: str) -> None:
    halving, rates, trials = study.search.halving, study.rates, study.search.trials
    passages = study.outcome.passages
    shares = (halving.first, *halving.rungs) if halving else ()
    allowed = {
        "rates.ladder": (rates.ladder, rates.ladder >= 1, "at least 1"),
        "rates.step": (rates.step, rates.step > 1, "a factor above 1"),
        "rates.list": (
            list(rates.list),
            all(0 < rate <= HIGHEST_RATE for rate in rates.list),
            f"rates above 0, to {HIGHEST_RATE:g}",
        ),
        "budget.within": (study.budget.within, study.budget.within >= 0, "a share from 0"),
        "budget.parameters": (study.budget.parameters, (study.budget.parameters or 1) > 0, "a number above 0"),
        "search.trials": (trials, trials is None or trials >= 1, "at least 1"),
        "search.halving": (list(shares), all(0 < share <= 1 for share in shares), "shares of the steps, to 1"),
        "search.halving.keep": (halving and halving.keep, not halving or 0 < halving.keep < 1, "between 0 and 1"),
        "outcome.passages": (passages, passages is None or passages >= 1, "at least 1, or null for all"),
        "axes": (dict(study.axes), all(study.axes.values()), "values to search for each setting"),
    }
    for name, (value, good, wanted) in allowed.items():
        if not good:
            raise UserError(f"{where}: {name} is {value!r}, but takes {wanted}")
    if trials is not None and not study.axes and trials != (len(rates.list) or rates.ladder):
        raise UserError(
            f"{where}: search.trials is {trials}, but without axes there is a trial for each of the "
            f"{len(rates.list) or rates.ladder} rates. Set rates.ladder={trials}, or leave search.trials out"
        )
