"""Pareto fronts, and how surely a method is on one."""

from __future__ import annotations

import numpy as np
import pytest

from subspace.reporting.fronts import drawn_means, front_shares, on_front


def test_the_front_is_what_nothing_beats() -> None:
    scores = np.array([1.0, 2.0, 2.0, 0.5, 3.0])
    costs = np.array([1.0, 2.0, 3.0, 1.0, 9.0])
    assert on_front(scores, costs).tolist() == [True, True, False, False, True]
    assert on_front(np.array([1.0, 1.0]), np.array([1.0, 1.0])).tolist() == [True, True]  # neither beats the other


def test_a_front_is_found_as_by_definition() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        scores, costs = draw.integers(0, 5, 12).astype(float), draw.integers(0, 5, 12).astype(float)
        beaten = [
            any(
                scores[i] >= scores[j] and costs[i] <= costs[j] and (scores[i], -costs[i]) != (scores[j], -costs[j])
                for i in range(12)
            )
            for j in range(12)
        ]
        assert on_front(scores, costs).tolist() == [not one for one in beaten]


def test_draws_have_the_spread_of_a_mean_over_seeds_and_items() -> None:
    draw = np.random.default_rng(1)
    run = [draw.normal(size=(4, 50)) + draw.normal(size=(4, 1)) + 2 * draw.normal(size=(1, 50))]
    means = drawn_means([run], draws=20_000)[:, 0]
    by_seed, by_item = run[0].mean(1).var() / 4, run[0].mean(0).var() / 50
    assert means.mean() == pytest.approx(run[0].mean(), abs=0.02)
    rest = run[0] - run[0].mean(0) - run[0].mean(1, keepdims=True) + run[0].mean()
    assert means.var() == pytest.approx(by_seed + by_item + rest.var() / 200, rel=0.05)


def test_methods_are_drawn_with_the_same_seeds_and_items() -> None:
    run = [np.random.default_rng(2).normal(size=(3, 20))]
    means = drawn_means([run, [run[0] + 1.0]])
    assert np.allclose(means[:, 1] - means[:, 0], 1.0)
    assert front_shares(means, np.array([1.0, 1.0])) == [0.0, 1.0]
    assert front_shares(means, np.array([1.0, 2.0])) == [1.0, 1.0]


def test_two_equal_methods_share_the_front() -> None:
    draw = np.random.default_rng(3)
    one, other = ([draw.normal(size=(3, 200))] for _ in range(2))
    other = [other[0] - other[0].mean() + one[0].mean()]
    shares = front_shares(drawn_means([one, other]), np.array([1.0, 1.0]))
    assert sum(shares) == pytest.approx(1.0)
    assert 0.3 < shares[0] < 0.7
