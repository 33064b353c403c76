"""Pareto fronts of score against cost, and how surely a method is on one.

A method is on the front if no other one is at least as good and as cheap, and better in one of the two. Which ones are
depends on the seeds and items that were drawn: the share of bootstrap draws of seeds crossed with items (A. Owen
(2007), Annals of Applied Statistics 1:386) in which a method is on the front says how much. With few seeds such draws
vary less than new seeds would.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from subspace.reporting.statistics import Array, Run

DRAWS = 2000
Flags = npt.NDArray[np.bool_]


def on_front(scores: Array, costs: Array) -> Flags:
    """Return whether each method is on the front; scores and costs are ``(.., methods)``, less cost is better."""
    better, cheaper = scores[..., None] > scores[..., None, :], costs[..., None] < costs[..., None, :]
    as_good, as_cheap = scores[..., None] >= scores[..., None, :], costs[..., None] <= costs[..., None, :]
    beats = (better & as_cheap) | (cheaper & as_good)  # [.., i, j]: i beats j
    return np.asarray(~beats.any(-2))


def front_shares(scores: Array, costs: Array) -> list[float]:
    """Return the share of draws in which each method is on the front; scores and costs are ``(draws, methods)``."""
    return [float(share) for share in on_front(scores, np.broadcast_to(costs, scores.shape)).mean(0)]


def drawn_means(runs: Sequence[Run], draws: int = DRAWS) -> Array:
    """Return the means over tasks of methods' runs in bootstrap draws: ``(draws, methods)``, seeds crossed with items.

    All methods are drawn with the same items, and those with equally many seeds with the same seeds: they are paired.
    The draws are the same at every call.
    """
    draw = np.random.default_rng(0)
    items = [_weights(draw, draws, task.shape[1]) for task in runs[0]]
    seeds: dict[int, Array] = {}
    means = []
    for run in runs:
        count = len(run[0])
        if count not in seeds:
            seeds[count] = _weights(np.random.default_rng((1, count)), draws, count)
        of_seeds = np.mean([weight @ task.T for weight, task in zip(items, run, strict=True)], axis=0)
        means.append((seeds[count] * of_seeds).sum(1))
    return np.stack(means, axis=1)


def _weights(draw: np.random.Generator, draws: int, count: int) -> Array:
    """Return how much each of so many counts in each draw with replacement."""
    return np.asarray(draw.multinomial(count, np.full(count, 1 / count), size=draws) / count, dtype=np.float64)
