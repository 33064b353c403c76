"""What a run's training took: trained numbers, steps, learning rate and seconds, for tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from subspace.common.foreign.text import read_json
from subspace.errors import UserError


class TrainingFacts(NamedTuple):
    """What training took; None for what is not known, as of a base model. Over several seeds, means.

    Attributes:
        trained: trained numbers.
        steps: optimizer steps.
        learning_rate: the highest, without units.
        seconds: of training.
    """

    trained: float | None = None
    steps: float | None = None
    learning_rate: float | None = None
    seconds: float | None = None

    @property
    def texts(self) -> dict[str, str]:
        """The facts as cells of a table, by their names there."""
        return {
            "trained numbers": _whole(self.trained),
            "steps": _whole(self.steps),
            "learning rate": NONE if self.learning_rate is None else f"{self.learning_rate:.3g}",
            "training seconds": _whole(self.seconds),
        }


NONE = "-"


def read_facts(folder: Path, config: Mapping[str, Any]) -> TrainingFacts:
    """Return what a run's folder says of its training; what it lacks, or what makes no sense there, is None."""
    about: Any = {}
    with suppress(UserError):
        about = read_json(folder / "environment.json", Any, finite=False)
    return TrainingFacts(
        trained=_number(about, "adapters", "trained"),
        steps=_number(about, "outcome", "steps"),
        learning_rate=_number(config, "train", "learning_rate"),
        seconds=_number(about, "outcome", "seconds"),
    )


def join_facts(facts: Sequence[TrainingFacts]) -> TrainingFacts:
    """Return the means over seeds of what all of them know."""
    return TrainingFacts(*(_mean(values) for values in zip(*facts, strict=True)))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return known[0] if len(set(known)) == 1 else sum(known) / len(known)


def _number(values: Any, *keys: str) -> float | None:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    is_number = isinstance(values, int | float) and not isinstance(values, bool)
    return values if is_number and 0 <= values < math.inf else None


def _whole(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"
