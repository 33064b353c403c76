"""What the panels of a study's page share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from subspace.reporting.page.document import MEDIUM, NARROW, WIDE
from subspace.reporting.page.figure import Figure

#: Widths of a panel that stands alone, beside another, and beside two.
WIDTHS = {1: (NARROW, MEDIUM, WIDE), 2: (NARROW, 528.0), 3: (NARROW,)}
Rows = Sequence[Mapping[str, Any]]


def several(across: int, draw: Callable[[float], Figure]) -> tuple[Figure, ...]:
    """Return a chart for each width that a panel has beside so many others."""
    return tuple(draw(width) for width in WIDTHS[across])


def listed(labels: Sequence[str], most: int = 6) -> str:
    """Return names in a sentence, the first ones of many."""
    shown = ", ".join(labels[:most])
    return shown + (f" and {len(labels) - most} more" if len(labels) > most else "") if labels else "none"
