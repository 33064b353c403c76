"""The search of a study as pure functions of the losses so far: what is due next, and which trial of a method wins.

Every method has equally many trials. By successive halving (K. Jamieson, A. Talwalkar (2016), AISTATS) all of them are
trained to the first rung, the better ones to the next, and so on to the end. If a method's best rate is at an end of
its ladder, the ladder of *every* method grows by one on that side, so that trials stay equal. Nothing is remembered
between calls: a study that was killed goes on with what is due by the losses on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from subspace.training.config import TrainConfig

#: The highest rate that a run takes.
HIGHEST_RATE: float = TrainConfig.__dataclass_fields__["learning_rate"].metadata["max"]
#: How often a ladder grows on a side, before a best rate at its end is only marked.
EXTENSIONS = 2

Side = Literal["low", "high"]
SIDES: tuple[Side, Side] = ("low", "high")


class Trial(NamedTuple):
    """One set of searched settings of a method: a learning rate, and values of further axes."""

    rate: float
    axes: tuple[tuple[str, Any], ...] = ()


class Job(NamedTuple):
    """A trial of a method that is to be trained up to a step."""

    method: str
    trial: Trial
    step: int


#: The held-out loss of a method's trial after a step, a mean over the search's seeds; infinite if training failed.
Losses = Mapping[tuple[str, Trial, int], float]


@dataclass(frozen=True)
class Rules:
    """How a study searches: the rungs in steps, the last of which is the whole run, and the share that each keeps.

    ``step`` is the factor between neighbouring rates of the ladder; without it, no ladder grows.
    """

    rungs: tuple[int, ...]
    keep: float
    step: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a search has found so far.

    Attributes:
        due: what is to be trained next, in order; empty at the end.
        trials: each method's trials, extensions included.
        best: each method's best trial, where its search has ended.
        edges: the side of the ladder on which a method's best rate still lies at the end.
    """

    due: tuple[Job, ...]
    trials: Mapping[str, tuple[Trial, ...]]
    best: Mapping[str, Trial]
    edges: Mapping[str, Side]

    @property
    def ended(self) -> bool:
        """Whether every method has its best trial."""
        return not self.due


def search(planned: Mapping[str, Sequence[Trial]], losses: Losses, rules: Rules) -> Outcome:
    """Return what is due, and what is known, of a search with these planned trials."""
    rounds: dict[str, list[list[Trial]]] = {method: [list(trials)] for method, trials in planned.items()}
    grown: dict[Side, int] = dict.fromkeys(SIDES, 0)
    while True:
        due, best = [], {}
        for method, of_method in rounds.items():
            jobs, winner = _method_search(method, of_method, losses, rules)
            due += jobs
            if winner is not None and not jobs:
                best[method] = winner
        trials = {method: tuple(trial for group in groups for trial in group) for method, groups in rounds.items()}
        edges = {method: side for method, trial in best.items() if (side := _edge(trial, trials[method]))}
        sides = {side for side in edges.values() if grown[side] < EXTENSIONS}
        top = max(trial.rate for tried in trials.values() for trial in tried)
        if rules.step and round_rate(top * rules.step) > HIGHEST_RATE:
            sides.discard("high")
        if due or not sides or rules.step is None:
            return Outcome(tuple(due), trials, best, edges if not due else {})
        for side in sorted(sides):
            grown[side] += 1
        for method, groups in rounds.items():
            groups.append([_next(best[method], trials[method], side, rules.step) for side in sorted(sides)])


def _method_search(
    method: str, groups: Sequence[Sequence[Trial]], losses: Losses, rules: Rules
) -> tuple[list[Job], Trial | None]:
    """Return what is due of one method, and its best trial of those that reached the end.

    The first group is halved. A trial that was added later goes on from a rung where it is no worse than the worst of
    the first group that went on, so no earlier decision changes.
    """
    alive = list(groups[0])
    late = [trial for group in groups[1:] for trial in group]
    due: list[Job] = []
    for number, rung in enumerate(rules.rungs):
        unknown = [trial for trial in alive if (method, trial, rung) not in losses]
        if unknown:
            return [Job(method, trial, rung) for trial in unknown], None
        loss = {trial: losses[method, trial, rung] for trial in alive}
        alive = sorted(alive, key=lambda trial: (loss[trial], trial.rate))
        if number < len(rules.rungs) - 1:
            alive = alive[: math.ceil(rules.keep * len(alive))]
        bar = loss[alive[-1]] if number < len(rules.rungs) - 1 else math.inf
        waiting = [trial for trial in late if (method, trial, rung) not in losses]
        due += [Job(method, trial, rung) for trial in waiting]
        late = [trial for trial in late if trial not in waiting and losses[method, trial, rung] <= bar]
    last = rules.rungs[-1]
    ended = [*alive, *late]
    return due, min(ended, key=lambda trial: (losses[method, trial, last], trial.rate))


def _edge(best: Trial, trials: Sequence[Trial]) -> Side | None:
    rates = {trial.rate for trial in trials}
    if len(rates) < 2:
        return None
    return "low" if best.rate == min(rates) else "high" if best.rate == max(rates) else None


def _next(best: Trial, trials: Sequence[Trial], side: Side, step: float) -> Trial:
    """Return the trial one rate beyond a ladder's end, with the other settings of the best."""
    rates = [trial.rate for trial in trials]
    return best._replace(rate=round_rate(min(rates) / step if side == "low" else max(rates) * step))


def round_rate(rate: float) -> float:
    """Return a rate to two digits, as it is written and as its folder is named."""
    return float(f"{rate:.1e}")


def rungs_of(steps: int, first: float, keep: float, shares: Sequence[float] = ()) -> tuple[int, ...]:
    """Return the rungs of a run of so many steps: multiples of the first one, and the end.

    Without ``shares`` of the steps for the rungs between, each is ``1 / keep`` times the one before, as long as it
    saves a quarter.
    """
    if first >= 1:
        return (steps,)
    base = max(1, round(first * steps))
    if not shares:
        shares, share = [], first
        while share <= 0.75:
            shares.append(share)
            share /= keep
    inner = {base, *(max(1, round(share * steps / base)) * base for share in shares)}
    return (*sorted(rung for rung in inner if rung < steps), steps)


# What the search says of one rate for all.


def kendall_tau(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """Return Kendall's tau-b between two orders of the methods that both have; None for fewer than three.

    M. Kendall (1945), Biometrika 33:239: pairs in the same order less those in the other, ties left out of the scale.
    """
    names = [name for name in before if name in after]
    if len(names) < 3:
        return None
    same = tied_before = tied_after = 0
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i]]
    for a, b in pairs:
        one, two = _sign(before[a], before[b]), _sign(after[a], after[b])
        same += one * two
        tied_before += one == 0
        tied_after += two == 0
    scale = math.sqrt((len(pairs) - tied_before) * (len(pairs) - tied_after))
    return same / scale if scale else None


def _sign(a: float, b: float) -> int:
    return (a > b) - (a < b)


def common_rates(
    losses: Losses, trials: Mapping[str, Sequence[Trial]], step: int
) -> Iterator[tuple[float, dict[str, float]]]:
    """Yield each rate that at least half of the methods, and three, tried, and their losses there after a step.

    Of several trials of a method with one rate, the first stands for it.
    """
    rates = sorted({trial.rate for tried in trials.values() for trial in tried})
    for rate in rates:
        found: dict[str, float] = {}
        for method, tried in trials.items():
            at = next((trial for trial in tried if trial.rate == rate), None)
            if at is not None and (method, at, step) in losses:
                found[method] = losses[method, at, step]
        if len(found) >= max(3, len(trials) / 2):
            yield rate, found


# Groups.


def letters(names: Sequence[str], apart: set[frozenset[str]]) -> dict[str, str]:
    """Return each method's letters: two methods share one unless they are told apart.

    H.-P. Piepho (2004), Journal of Computational and Graphical Statistics 13:456: insert and absorb.

    Args:
        names: the methods, best first; the first gets an ``a``.
        apart: the pairs that are told apart.
    """
    columns: list[set[str]] = [set(names)]
    for pair in sorted(map(sorted, apart)):
        one, two = pair
        split: list[set[str]] = []
        for column in columns:
            split += [column - {one}, column - {two}] if {one, two} <= column else [column]
        columns = []
        for column in sorted(split, key=len, reverse=True):  # absorb what is part of another
            if not any(column <= other for other in columns):
                columns.append(column)
    columns.sort(key=lambda column: sorted(map(names.index, column)))
    marks = [_letter(number) for number in range(len(columns))]
    return {
        name: "".join(mark for mark, column in zip(marks, columns, strict=True) if name in column) for name in names
    }


def _letter(number: int) -> str:
    above, rest = divmod(number, 26)
    return (_letter(above - 1) if above else "") + chr(ord("a") + rest)
