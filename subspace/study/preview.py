"""What a study will cost and what it will be able to show, before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from subspace.common.tables import Grid as TextGrid
from subspace.config import read_config
from subspace.data.samples import select_samples
from subspace.errors import UserError
from subspace.planning.plan import build_plan, format_time
from subspace.reporting.continuous import Spread, mean_spread, seeds_for, smallest_difference
from subspace.reporting.statistics import ALPHA, ASSUMED_DISCORDANCE, POWER, Run
from subspace.study.cells import read_search
from subspace.study.config import ANSWER_LOGPROB, RETENTION
from subspace.study.execute import planned_steps, remaining_steps, retention_trouble
from subspace.study.grid import Grid
from subspace.study.results import Scores, StudyResult, common_scores, read_results

#: Before finals show it: of the answers that only one of two methods gets right, the share that every seed repeats, and
#: the standard deviation over seeds of a difference in accuracy, of half a point.
REPEATED, SEED_SD = 1 / 3, 0.005
ASSUMED = Spread(ASSUMED_DISCORDANCE * REPEATED, SEED_SD**2, ASSUMED_DISCORDANCE * (1 - REPEATED))


@dataclass(frozen=True)
class Preview:
    """The forecast of a study.

    Attributes:
        grid: its grid.
        trials: all of them, if no ladder grows.
        steps: of all runs; ``left`` are still to be trained.
        seconds: the range of the time of all steps that are left; None where it cannot be estimated.
        items: the number of items of each task; empty where held-out losses decide.
        alpha: the level of the first test, by Holm over all methods.
        known: by how much differences in accuracy vary: as the finals so far show, else as is assumed.
        pilot: how many finals show it; 0 where it is assumed.
        smallest: the smallest difference in accuracy that is detected; None if none is, or without items.
        primary: the same in the primary outcome, by the finals so far; None before two seeds of two methods.
        power: the power it is for.
        wanted: the difference in accuracy for which seeds are asked, and how many that takes; None: no number does.
    """

    grid: Grid
    trials: int
    steps: int
    left: int
    seconds: tuple[float, float] | None
    items: tuple[int, ...]
    alpha: float
    known: Spread
    pilot: int
    smallest: float | None
    primary: float | None
    power: float
    wanted: tuple[float, int | None] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "study": self.grid.name,
            "folder": str(self.grid.folder),
            "methods": [
                {
                    "method": c.label,
                    "size": dict([c.size]) if c.size else None,
                    "trained": c.trained,
                    "off_budget": c.off,
                    "gradient": c.gradient,
                    "trials": [{"rate": trial.rate, **dict(trial.axes)} for trial in c.trials],
                }
                for c in self.grid.contenders
            ],
            "budget": self.grid.budget,
            "rungs": self.grid.rules.rungs,
            "trials": self.trials,
            "finals": len(self.grid.contenders) * len(self.grid.final_seeds),
            "steps": self.steps,
            "steps_left": self.left,
            "seconds": self.seconds,
            "items": self.items,
            "alpha": self.alpha,
            "power": self.power,
            "smallest_points": None if self.smallest is None else 100 * self.smallest,
            "smallest_primary": self.primary,
            "assumed": not self.pilot,
            "spread": self.known._asdict(),
            "seeds_for": None if self.wanted is None else {"points": 100 * self.wanted[0], "seeds": self.wanted[1]},
        }

    @property
    def table(self) -> TextGrid:
        """The methods, their sizes and their rates."""
        rows = tuple(
            (
                c.label,
                "{} {}".format(*c.size) if c.size else "",
                f"{c.trained:,}",
                c.off,
                ", ".join(f"{rate:.2g}" for rate in sorted({trial.rate for trial in c.trials})),
            )
            for c in self.grid.contenders
        )
        head = ("method", "size", "trained", "not at the budget", "rates")
        title = f"study {self.grid.name}: budget {self.grid.budget:,} ± {100 * self.grid.within:g} %"
        return TextGrid(title, head, rows, left=2)

    def lines(self) -> Iterator[str]:
        """Yield what stands below the table."""
        grid = self.grid
        finals = len(grid.contenders) * len(grid.final_seeds)
        rungs = ", ".join(f"{rung:,}" for rung in grid.rules.rungs)
        yield f"{self.trials} trials, judged on held-out rows after {rungs} steps; {finals} finals of {grid.steps:,}"
        left = f"; {self.left:,} left" if self.left < self.steps else ""
        yield f"{self.steps:,} steps in all, if no ladder grows{left}"
        if self.seconds:
            yield f"time here, one run after another: {format_time(self.seconds[0])} to {format_time(self.seconds[1])}"
        if self.items:
            yield from self._power_lines()
            yield from self._retention_lines()
        if self.primary is not None:
            unit = "log-odds" if grid.primary == ANSWER_LOGPROB else "of held-out loss"
            yield f"smallest difference in the primary outcome, by the finals so far: {self.primary:.3f} {unit}"

    def _retention_lines(self) -> Iterator[str]:
        if RETENTION in self.grid.also:
            trouble, count = retention_trouble(self.grid), self.grid.passages
            passages = "all" if count is None else f"{count:,}"
            yield (
                f"what is kept of the base is not measured: {trouble}"
                if trouble
                else f"what is kept of the base: bits per byte on {passages} Wikipedia passages (outcome.passages)"
            )

    def _power_lines(self) -> Iterator[str]:
        seeds, items, others = len(self.grid.final_seeds), sum(self.items), len(self.grid.contenders) - 1
        found = "none" if self.smallest is None else f"{100 * self.smallest:.1f} points of accuracy"
        differ, repeated, sd = _in_words(self.known)
        yield (
            f"smallest difference from {self.grid.reference} that {seeds} seeds and {items:,} items show: {found} "
            f"(power {100 * self.power:.0f} %, Holm over {others} methods)"
        )
        source = f"as the {self.pilot} finals so far show" if self.pilot else "as is assumed before there are finals"
        yield (
            f"{source}: {differ:.1f} % of the answers differ between two methods, {repeated:.0f} % of these with every "
            f"seed, and a difference varies by {sd:.2g} points between seeds"
        )
        if self.wanted:
            points, needed = 100 * self.wanted[0], self.wanted[1]
            if needed is None:
                more = "score more of them (evaluate.limit, evaluate.tasks)"
                yield f"no number of seeds shows {points:g} points on these items: {more}"
            else:
                yield f"{points:g} points take {needed} seeds: final: {{seeds: {list(range(needed))}}}"


def _in_words(known: Spread) -> tuple[float, float, float]:
    """Return per cent of answers that differ, of these per cent that do with every seed, and points between seeds.

    A difference of two answers is -1, 0 or 1, so its mean square is the share that differs.
    """
    differ = known.items + known.rest
    return 100 * differ, 100 * known.items / differ if differ else 0.0, 100 * known.seeds**0.5


def preview(grid: Grid, *, power: float = POWER, difference: float | None = None) -> Preview:
    """Return the forecast of a study.

    Args:
        grid: the study's.
        power: the probability with which a difference is to be found.
        difference: in points of accuracy; how many seeds find it is solved for.
    """
    if not 0 < power < 1:
        raise UserError(f"--power is {power:g}, but is a probability between 0 and 1")
    if difference is not None and difference <= 0:
        raise UserError(f"--difference is {difference:g}, but takes points of accuracy above 0")
    config = read_config(grid.base, [*grid.overrides, *grid.contender(grid.reference).overrides()])
    scored = grid.primary == ANSWER_LOGPROB
    if difference is not None and not scored:
        raise UserError(
            "--difference is in points of accuracy, but this study scores no items: outcome.primary decides"
        )
    items = [len(sample.items) for sample in select_samples(config.evaluate.selection)] if scored else []
    steps, alpha = planned_steps(grid), ALPHA / max(1, len(grid.contenders) - 1)
    outcome, _ = read_search(grid)
    left = remaining_steps(grid, outcome)
    one = build_plan(config).seconds
    seeds = len(grid.final_seeds)
    found = read_results(grid)
    observed, pilot = pilot_spread(found, lambda scores: scores.correct)
    known = observed or ASSUMED
    wanted = None
    if difference is not None:
        share = difference / 100
        wanted = share, seeds_for(share, known, items, power=power, alpha=alpha)
    return Preview(
        grid=grid,
        trials=sum(len(contender.trials) for contender in grid.contenders),
        steps=steps,
        left=left,
        seconds=(one[0] * left / grid.steps, one[1] * left / grid.steps) if one else None,
        items=tuple(items),
        alpha=alpha,
        known=known,
        pilot=pilot,
        smallest=smallest_difference(known, items, seeds, power=power, alpha=alpha) if items else None,
        primary=_smallest_primary(found, items, power, alpha),
        power=power,
        wanted=wanted,
    )


def pilot_spread(result: StudyResult, of: Callable[[Scores], Run]) -> tuple[Spread | None, int]:
    """Return by how much a difference between two methods varies, a mean over all pairs, and of how many finals.

    The luck of the reference's seeds is in every difference from it, so these alone would know it by few seeds.

    Args:
        result: the results so far.
        of: the outcome of a method's scores.

    Returns:
        ``(None, 0)`` before two methods have two seeds in common that were scored.
    """
    pairs = [pair for one, two in itertools.combinations(result.methods, 2) if (pair := common_scores(one, two))]
    paired = [(of(before), of(after)) for before, after in pairs if len(before.log_odds[0]) > 1]
    if not paired:
        return None, 0
    return mean_spread(paired), sum(len(method.seeds) for method in result.methods)


def _smallest_primary(result: StudyResult, items: list[int], power: float, alpha: float) -> float | None:
    """Return the smallest difference in the primary outcome that the study will find, by the finals so far."""
    seeds = len(result.grid.final_seeds)
    if result.grid.primary == ANSWER_LOGPROB:
        known, _ = pilot_spread(result, lambda scores: scores.log_odds)
        return smallest_difference(known, items, seeds, power=power, alpha=alpha) if known else None
    errors = [m.against.error**2 * len(m.seeds) for m in result.methods if m.against and len(m.seeds) > 1]
    if not errors or seeds < 2:
        return None
    # One number a seed, which varies by nothing but the seed: the number of items does not matter.
    return smallest_difference(Spread(0.0, float(np.mean(errors)), 0.0), [2], seeds, power=power, alpha=alpha)
