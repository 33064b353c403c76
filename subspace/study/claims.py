"""``subspace study claims``: what studies of this machine say of published claims, as ``CLAIMS.md`` beside their list.

A claim names what would show it: methods that are better than others in a study's finals, a best rate that lies below
another, two methods that compute the same, or an order that one rate for all would have found. :func:`judge` turns
differences into a verdict. A claim whose study has not been run gets none, unless an earlier table has one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from subspace.adapters.registry import configure, resolve_method
from subspace.common.declarations import Declaration, build
from subspace.common.files import write_file
from subspace.common.foreign.text import MOST_RESULT_BYTES, read_text
from subspace.common.foreign.yaml_files import read_yaml
from subspace.common.paths import find_resource, resource_name
from subspace.common.random_state import seeded
from subspace.common.tables import Grid as Table
from subspace.config import read_config
from subspace.errors import UserError, nearest
from subspace.reporting.continuous import MeanDifference, Spread, paired_over_seeds, seeds_for, spread
from subspace.reporting.statistics import ALPHA, holm
from subspace.study.cells import Cell
from subspace.study.config import ANSWER_LOGPROB, read_study
from subspace.study.execute import next_cells, remaining_steps
from subspace.study.grid import Grid, base_overrides
from subspace.study.record import STUDY_FILE, open_grid
from subspace.study.results import MethodResult, StudyResult, common_scores, difference_between, read_results

CONFIRMED, REFUTED, OPEN, NOT_RUN = "confirmed", "refuted", "not resolvable", "not run"
HEAD = ("claim", "what it says", "published", "ours [95 % interval]", "verdict")


@dataclass(frozen=True)
class Claim(Declaration):
    """A published claim, and what would show it.

    Attributes:
        claim: in words.
        published: the numbers that it was published with.
        study: the file of the study that can settle it, beside the claims' own.
        better: pairs of labels, of which the first is claimed to be better than the second. Alternatives (``a or b``)
            stand for the one that the study's search found best.
        lower_rate: two labels, of which the first is claimed to have the lower best rate.
        one_rate: that one rate for all gives the order that tuned rates give.
        same: two methods with settings that are claimed to compute the same.
        hours: of the study on the machine that its file says.
        untested: why nothing here can settle it.
    """

    claim: str
    published: str
    study: str = ""
    better: tuple[tuple[str, str], ...] = ()
    lower_rate: tuple[str, ...] = ()
    one_rate: bool = False
    same: tuple[Mapping[str, Any], ...] = ()
    hours: float = 0.0
    untested: str = ""


class Evidence(NamedTuple):
    """A difference that is above 0 if the claim holds.

    ``objects``: accuracy says the opposite. ``needed``: seeds that would show a true difference of this size; None: no
    number of them does on these items.
    """

    what: str
    difference: MeanDifference
    objects: bool = False
    needed: int | None = None


@dataclass(frozen=True)
class Finding:
    """What was found of a claim: a verdict, with what it takes to reach one, and the numbers in words."""

    verdict: str
    ours: str = ""
    note: str = ""
    evidence: Sequence[Evidence] = field(default=())

    @property
    def words(self) -> str:
        """The verdict and its note, which begins with what joins them."""
        return self.verdict + self.note


def judge(found: Sequence[Evidence]) -> str:
    """Return what differences say of a claim that all of them are above 0.

    Confirmed if every one is, refuted if one is below, each by p < .05 after Holm over the claim's differences, and
    accuracy not in the other direction; otherwise nothing was resolved.
    """
    p_values = holm([evidence.difference.p for evidence in found])
    sure = [p < ALPHA and not evidence.objects for evidence, p in zip(found, p_values, strict=True)]
    above = [evidence.difference.value > 0 for evidence in found]
    if any(clear and not up for clear, up in zip(sure, above, strict=True)):
        return REFUTED
    return CONFIRMED if found and all(sure) else OPEN


def judge_one_rate(reversed_pairs: Sequence[tuple[int, int]]) -> str:
    """Return what common rates say of the claim that any of them gives the tuned order.

    Args:
        reversed_pairs: for each rate, how many of the pairs that the finals tell apart it orders the other way, and how
            many these are.

    Returns:
        Refuted if each rate reverses more than one in twenty, confirmed if none does.
    """
    shares = [wrong / told for wrong, told in reversed_pairs if told]
    if shares and min(shares) > ALPHA:
        return REFUTED
    return CONFIRMED if shares and max(shares) <= ALPHA else OPEN


def read_claims(file: Path) -> dict[str, Claim]:
    """Return the claims of a file by their names."""
    content = read_yaml(file)
    if not content:
        raise UserError(f"{file} has no claims. launch/studies/claims.yaml shows how one is written")
    return {name: build(Claim, values, f"{file}, {name}") for name, values in content.items()}


def settle(claim: Claim, folder: Path) -> Finding:
    """Return what is known of a claim; ``folder`` has the file of its study.

    Raises:
        UserError: its study cannot be read, or does not compare what the claim names.
    """
    if claim.untested:
        return Finding(NOT_RUN, note=f": {claim.untested}")
    if claim.same:
        equal = compute_the_same(*claim.same)
        return Finding(CONFIRMED if equal else REFUTED, "equal to the bit" if equal else "not equal")
    file = folder / claim.study
    command = f"`subspace study run {shown_path(file)}`, about {claim.hours:g} h"
    grid = recorded_grid(file)
    if grid is None:
        return Finding(NOT_RUN, note=f": {command}")
    result = read_results(grid)
    unscored = grid.primary == ANSWER_LOGPROB and any(method.scores is None for method in result.methods)
    if unscored or next_cells(grid, result.outcome):
        left = remaining_steps(grid, result.outcome)
        return Finding(NOT_RUN, note=f" to the end, {left:,} steps and the finals' scores are left: {command}")
    if claim.one_rate:
        return one_rate(result)
    found = [lower_rate(result, *claim.lower_rate)] if claim.lower_rate else _better(result, claim)
    return _finding(result, found, searched=bool(claim.lower_rate))


def shown_path(file: Path) -> str:
    """Return a file's path in the repository, if it is there, in place of that on this machine."""
    return resource_name(file.resolve()) or str(file)


def recorded_grid(file: Path) -> Grid | None:
    """Return the grid of a study that was begun here; None otherwise, without opening its model."""
    study = read_study(file)
    runs = study.runs or read_config(study.base, base_overrides(study)).runs
    return open_grid(study) if (Path(runs) / study.name / STUDY_FILE).exists() else None


@seeded(0)
def compute_the_same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Return whether two methods with the same tensors have the same output and gradients at a layer, to the bit."""
    import torch
    from torch import nn

    base, outcomes = nn.Linear(24, 16), []
    tensors: dict[str, Any] = {}
    start = torch.randn(5, 24)
    for entry in (first, second):
        cls, presets = resolve_method(entry["name"])
        own = {name: value for name, value in entry.items() if name != "name"}
        adapter = cls(base, configure(cls, {**presets, **own}))
        for name, tensor in adapter.trained().items():
            tensor.data = tensors.setdefault(name, torch.randn_like(tensor))
        inputs = start.clone().requires_grad_()
        output = adapter(inputs)
        output.square().sum().backward()
        outcomes.append([output.detach(), inputs.grad, *(tensor.grad for tensor in adapter.trained().values())])
    return len(outcomes[0]) == len(outcomes[1]) and all(map(torch.equal, *outcomes))


def _better(result: StudyResult, claim: Claim) -> list[Evidence]:
    return [pair_evidence(result, _chosen(result, one), _chosen(result, other)) for one, other in claim.better]


def _chosen(result: StudyResult, labels: str) -> MethodResult:
    """Return the method of a label, or of several the one that the search found best."""
    known = [contender.label for contender in result.grid.contenders]
    for label in labels.split(" or "):
        if label not in known:
            raise UserError(f"{result.grid.name} compares no {label!r}. {nearest(label, known)}")
    methods = [result.method(label) for label in labels.split(" or ")]
    return min(methods, key=lambda method: math.inf if method.searched is None else method.searched)


def pair_evidence(result: StudyResult, better: MethodResult, other: MethodResult) -> Evidence:
    """Return by how much one method's finals are better than another's."""
    grid = result.grid
    found = difference_between(grid, other, better)
    if found is None:
        raise UserError(f"{better.contender.label} and {other.contender.label} of {grid.name} have no seed in common")
    what, seeds = f"{better.contender.label} - {other.contender.label}", len(better.seeds)
    pair = common_scores(other, better)
    if grid.primary != ANSWER_LOGPROB or pair is None:
        known = Spread(0.0, found.error**2 * seeds, 0.0)
        return Evidence(what, found, needed=seeds_for(abs(found.value), known, [2]))
    gains = [after.mean() - before.mean() for before, after in zip(pair[0].correct, pair[1].correct, strict=True)]
    known = spread(pair[0].log_odds, pair[1].log_odds)
    needed = seeds_for(abs(found.value), known, pair[0].items)
    return Evidence(what, found, sum(gains) * found.value < 0, needed)


def lower_rate(result: StudyResult, lower: str, higher: str) -> Evidence:
    """Return by how many decades the best rate of one method lies below another's, over the seeds of the search.

    Rates stand on a ladder, so each of the two is known to a step only, whatever the number of seeds.
    """
    grid = result.grid
    found = paired_over_seeds(*(_best_rates(result, label) for label in (lower, higher)), rounding=_step(grid))
    return Evidence(f"decades by which {lower}'s best rate lies below {higher}'s", found)


def _step(grid: Grid) -> float:
    return math.log10(grid.rules.step or 1.0)


def _best_rates(result: StudyResult, label: str) -> list[float]:
    """Return the decimal logarithm of a method's best rate by each seed of the search."""
    best = []
    for seed in result.grid.search_seeds:
        cells = [Cell(result.grid, label, trial, seed) for trial in result.outcome.trials[label]]
        ended = [cell for cell in cells if result.grid.steps in cell.losses()]
        best.append(math.log10(min(ended, key=lambda cell: cell.losses()[result.grid.steps]).trial.rate))
    return best


def one_rate(result: StudyResult) -> Finding:
    """Return whether any one rate for all would have found the order of the finals."""
    step, found = result.grid.rules.rungs[0], []
    rank = {method.contender.label: number for number, method in enumerate(_in_order(result))}
    groups = {method.contender.label: set(method.group) for method in result.methods}
    for rate, tau, _ in result.taus:
        at = {
            label: result.losses[label, trial, step]
            for label, tried in result.outcome.trials.items()
            for trial in tried
            if trial.rate == rate and (label, trial, step) in result.losses
        }
        told = [(a, b) for a in at for b in at if rank[a] < rank[b] and not groups[a] & groups[b]]
        found.append((rate, tau, sum(at[a] > at[b] for a, b in told), len(told)))
    words = "; ".join(f"at {rate:.2g}: {wrong} of {told} pairs, tau {tau:.2f}" for rate, tau, wrong, told in found)
    verdict = judge_one_rate([(wrong, told) for *_, wrong, told in found])
    note = "" if verdict != OPEN else " with these rates and methods"
    return Finding(verdict, f"pairs told apart that one rate orders the other way: {words}" if words else "", note)


def _in_order(result: StudyResult) -> list[MethodResult]:
    """Return the methods with finals, best first by the primary outcome's difference from the reference."""
    return sorted(result.methods, key=lambda method: -(method.against.value if method.against else 0.0))


def _finding(result: StudyResult, found: Sequence[Evidence], *, searched: bool) -> Finding:
    verdict = judge(found)
    unit = "decades" if searched else "log-odds" if result.grid.primary == ANSWER_LOGPROB else "nats of held-out loss"
    ours = "; ".join(
        f"{e.what}: {e.difference.value:+.3f} [{e.difference.low:+.3f}, {e.difference.high:+.3f}]" for e in found
    )
    note = ""
    if verdict == OPEN:
        scored = next((method.scores for method in result.methods if method.scores), None)
        items = "" if scored is None or searched else f"{sum(scored.items):,} items and "
        seeds = len(result.grid.search_seeds if searched else result.grid.final_seeds)
        needs = [evidence.needed for evidence in found if evidence.needed is None or evidence.needed > seeds]
        known = [need for need in needs if need is not None]
        more = "more items" if len(known) < len(needs) else str(max(known, default=seeds))
        note = f" with {items}{seeds} seeds" + (f" (needs {more})" if needs and not searched else "")
    return Finding(verdict, f"{ours} {unit}", note, found)


def report_claims(file: Path, earlier: Path | None = None) -> Table:
    """Return the table of a file's claims with their verdicts.

    Args:
        file: the claims.
        earlier: a table that was written before, as on another machine. What it says of a claim in the same words
            stands where the study of that claim has not been run here.
    """
    if not file.is_file():
        file = find_resource(file) or file
    if not file.is_file():
        raise UserError(f"there is no file of claims '{file}'. launch/studies/claims.yaml is one")
    rows, known, kept = [], _read_rows(earlier), []
    for name, claim in read_claims(file).items():
        finding = settle(claim, file.parent)
        said = (name, claim.claim, claim.published)
        if finding.verdict == NOT_RUN and said in known:
            kept.append(name)
        rows.append(known[said] if name in kept else (*said, finding.ours or "-", finding.words))
    notes = [
        "confirmed and refuted: p < .05 after Holm over the differences of the claim, accuracy not in the other "
        "direction; with other models and data than the published ones, so of the claim as a general one",
        "not resolvable: the difference may lie on either side of 0; needs: the seeds that would show a true one of "
        "the size observed, with power 80 %",
    ]
    if kept:
        notes.append(f"{', '.join(kept)}: as an earlier table says, whose runs are not on this machine")
    return Table("claims and what studies here say of them", HEAD, tuple(rows), tuple(notes), len(HEAD), marked=True)


def _read_rows(file: Path | None) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Return the rows of a table in Markdown that have a verdict, by their cells that say which claim it is of."""
    if file is None or not file.is_file():
        return {}
    lines = [line for line in read_text(file, most=MOST_RESULT_BYTES).splitlines() if line.startswith("| ")]
    rows = [tuple(cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines]
    return {row[:3]: row for row in rows if len(row) == len(HEAD) and not row[-1].startswith(NOT_RUN)}


def write_claims(file: Path) -> tuple[Path, Table]:
    """Write ``CLAIMS.md`` beside a file of claims, and return it with its table."""
    out = (file if file.is_file() else Path.cwd() / file.name).with_name("CLAIMS.md")
    table = report_claims(file, out)
    lines = [
        f"# {table.title[:1].upper()}{table.title[1:]}",
        "",
        f"Written by `subspace study claims {shown_path(file)}`.",
        "",
    ]
    write_file(out, "\n".join([*lines, replace(table, title="").markdown()]) + "\n")
    return out, table
