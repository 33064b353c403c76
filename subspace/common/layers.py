"""Layers of settings by name, such as ``train.steps``: a base file, a file over it, the command line over both."""

from __future__ import annotations

import logging
import types
from typing import Any, NamedTuple

from subspace.common.foreign.yaml_files import parse_value
from subspace.common.settings import SettingInfo
from subspace.errors import UserError

logger = logging.getLogger("subspace")

COMMAND_LINE = "the command line"


class Given(NamedTuple):
    """A setting's value in a layer, and where it comes from."""

    value: Any
    origin: str  # the file, or the command line
    text: str | None = None  # the text on the command line, which was parsed as YAML

    def value_for(self, info: SettingInfo | None) -> Any:
        """Return the value; for a setting of type text, ``5`` or ``true`` on the command line stays text."""
        is_null = self.value is None and info is not None and types.NoneType in info.types
        if self.text is None or info is None or str not in info.types or is_null:
            return self.value
        return self.value if isinstance(self.value, str | list | dict) else self.text


Layer = dict[str, Given]


def only_typed(layer: Layer, name: str, harmful: Any) -> Layer:
    """Return a layer without a setting that counts only where this call's command line gives it, with a notice.

    A file may come from somebody else, and settings that let it run code would let its author do so.
    """
    given = layer.get(name)
    if given is None or given.origin == COMMAND_LINE or given.value is not harmful:
        return layer
    if given.origin not in _told:
        _told.add(given.origin)
        logger.warning(f"{given.origin} sets {name}, which counts on the command line only: {name}={given.value}")
    return {key: value for key, value in layer.items() if key != name}


#: Files that a notice was given of.
_told: set[str] = set()


def parse_override(override: str) -> tuple[str, Given]:
    """Split ``key=value`` into the setting's name and its value."""
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"'{override}' is not a setting of the form key=value")
    return name, Given(parse_value(text), COMMAND_LINE, text)


def merge_layers(below: Layer, above: Layer) -> Layer:
    """Merge a layer over another; keys of the upper layer come last, and later keys take precedence."""
    return {**{name: given for name, given in below.items() if name not in above}, **above}
