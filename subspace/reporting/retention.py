"""What runs have kept of their base: how many bits per byte more they need for texts that training did not show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from subspace.evaluation.results import digest
from subspace.evaluation.retention import Retention, read_retention
from subspace.reporting.continuous import MeanDifference, paired_difference
from subspace.reporting.statistics import Run

#: The name of the row or column in tables, and what it means.
KEPT = "kept"


@dataclass(frozen=True)
class Kept:
    """The retention of a method.

    Attributes:
        passages: how many texts.
        base: bits per byte of the base model, the mean over texts.
        differences: of each seed and text, ``(seeds, texts)``, in bits per byte more than the base; zeros of the base.
        more: their mean, with its interval over seeds and texts; None of a base model.
        fingerprint: equal for what was measured alike.
    """

    passages: int
    base: float
    differences: Run
    more: MeanDifference | None
    fingerprint: str

    def __str__(self) -> str:
        d = self.more
        return f"{self.base:.3f}" if d is None else f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"

    @property
    def note(self) -> str:
        """What the numbers are, for below a table."""
        return (
            f"{KEPT}: bits per byte on {self.passages:,} Wikipedia passages that no prompt shows, more than the "
            f"base's {self.base:.3f}, paired by passage [95 % interval]; less is kept better"
        )


def read_kept(runs: Iterable[tuple[Path, str | None]]) -> Kept | None:
    """Return the retention of a method's runs, given as their folders and the checksums of what was scored there.

    It is None unless every run was measured, all alike, and what was measured is what was scored (None: not compared).

    Raises:
        UserError: what was measured is damaged.
    """
    found: list[Retention] = []
    for folder, subject in runs:
        measured = read_retention(folder)
        if measured is None or subject not in (None, "", measured.subject):
            return None
        found.append(measured)
    fingerprints = {digest([dict(one.fingerprint_fields), one.ids, one.base is None]) for one in found}
    if len(fingerprints) != 1:
        return None
    own = np.array([one.own for one in found])
    base = np.array([one.base or one.own for one in found])
    return Kept(
        passages=own.shape[1],
        base=float(base.mean()),
        differences=[own - base],
        more=None if found[0].base is None else paired_difference([base], [own]),
        fingerprint=digest([dict(found[0].fingerprint_fields), found[0].ids]),
    )
