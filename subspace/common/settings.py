"""How a setting is declared: once, as a typed, documented, bounded field of a frozen dataclass.

The command line, the YAML file, the README's tables, a run's ``config.yaml`` and an adapter's file are all read off
these declarations; nothing is written down a second time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from subspace.errors import UserError, nearest


def setting(
    default: Any,
    doc: str,
    *,
    min: float = -math.inf,
    max: float = math.inf,
    choices: Sequence[str] = (),
) -> Any:
    """Declare one setting: its default, what it means (with its unit), and the values it may take."""
    metadata = {"doc": doc, "min": min, "max": max, "choices": tuple(choices)}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of every settings class. Refuses values outside their declared bounds, whoever passes them."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            bounds = field.metadata
            name = f"{type(self).__qualname__}.{field.name}"
            if not bounds or value is None:
                continue
            if bounds["choices"] and value not in bounds["choices"]:
                raise UserError(f"{name} is {value!r}: {bounds['doc']}. {nearest(str(value), bounds['choices'])}")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and not bounds["min"] <= value <= bounds["max"]:
                raise UserError(
                    f"{name} is {value}, but must lie in [{bounds['min']}, {bounds['max']}]: {bounds['doc']}"
                )


def split_names(value: str | Sequence[str]) -> list[str]:
    """Return the names that a setting lists: as a list, or in one text with commas."""
    return [name.strip() for name in (value.split(",") if isinstance(value, str) else value)]
