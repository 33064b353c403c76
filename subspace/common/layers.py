"""Layers of settings by name, as ``train.steps``: a file, the file that it builds on, the command line over both."""

from __future__ import annotations

import types
from typing import Any, NamedTuple

from subspace.common.declarations import parse_value
from subspace.common.settings import SettingInfo
from subspace.errors import UserError

COMMAND_LINE = "the command line"


class Given(NamedTuple):
    """A value that a layer gives to a setting."""

    value: Any
    origin: str  # the file, or the command line
    text: str | None = None  # what stood on the command line, which YAML read as the value

    def value_for(self, info: SettingInfo | None) -> Any:
        """Return the value; for a setting that takes text, 5 on the command line is text, and so is true."""
        is_null = self.value is None and info is not None and types.NoneType in info.types
        if self.text is None or info is None or str not in info.types or is_null:
            return self.value
        return self.value if isinstance(self.value, str | list | dict) else self.text


Layer = dict[str, Given]


def parse_override(override: str) -> tuple[str, Given]:
    """Return the setting's name and the value that ``key=value`` gives it."""
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"'{override}' stands where settings do, as key=value")
    return name, Given(parse_value(text), COMMAND_LINE, text)


def merge_layers(below: Layer, above: Layer) -> Layer:
    """Put a layer over another. What stands later in the order of the keys counts more."""
    return {**{name: given for name, given in below.items() if name not in above}, **above}
