"""Coverage of intervals of one rate, exactly: mid-P, which tables show, beside Wilson's and Agresti and Coull's.

python -m tests.bench.bench_intervals
"""

from __future__ import annotations

import numpy as np
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from subspace.reporting.statistics import Array, mid_p

RATES = np.linspace(0.5, 1, 501)


def coverage(items: int, ends: Array) -> Array:
    """Return for each rate how often it lies in ``ends[right]``, over all that can come out."""
    chances = stats.binom.pmf(np.arange(items + 1), items, RATES[:, None])
    inside = (ends[:, 0] <= RATES[:, None] + 1e-12) & (ends[:, 1] >= RATES[:, None] - 1e-12)
    return np.asarray((chances * inside).sum(1))


def main() -> None:
    """Print a table: mean and smallest coverage over the rates, in per cent."""
    print("| items | mid-P | Wilson | Agresti and Coull |\n| ---: | ---: | ---: | ---: |")
    for items in (1, 2, 3, 5, 10, 17, 32, 100, 500, 2000):
        counts = np.arange(items + 1)
        several = [np.array([mid_p(int(right), items) for right in counts])]
        several += [np.array(proportion_confint(counts, items, method=name)).T for name in ("wilson", "agresti_coull")]
        found = [coverage(items, ends) for ends in several]
        print(f"| {items:,} |", " | ".join(f"{100 * c.mean():.1f}, {100 * c.min():.1f}" for c in found), "|")


if __name__ == "__main__":
    main()
