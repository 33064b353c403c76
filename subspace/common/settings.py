"""Declaration of settings as typed, documented and bounded fields of frozen dataclasses.

The command line, YAML files, the README's tables, a run's ``config.yaml`` and an adapter's file are all derived from
these declarations, the single source of every setting. pydantic validates all values against them, in this module
only, whether they come from a file, the command line or Python.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Self

import pydantic
from typing_extensions import TypedDict

from subspace.common.synonyms import hint, setting_elsewhere, value_elsewhere
from subspace.errors import UserError, nearest, shown

logger = logging.getLogger("subspace")

#: Upper bounds of settings that count steps or rows, rows of one step, and the ranks and widths of factors. More is a
#: slip of the keyboard, and would be found out by running out of memory.
MOST_COUNT, MOST_ROWS, MOST_RANK = 10**9, 1 << 20, 1 << 16


#: What lists every setting.
ALL_SETTINGS = "subspace train --help"


def setting(
    default: Any,
    doc: str,
    *,
    min: float = -math.inf,
    max: float = math.inf,
    choices: Iterable[str] = (),
    formerly: str = "",
    former_values: Mapping[Any, Any] = types.MappingProxyType({}),
) -> Any:
    """Declare one setting of a :class:`Settings` class.

    Args:
        default: The default value.
        doc: Its help text, with the unit.
        min: The smallest value of a number.
        max: The largest value of a number.
        choices: The allowed values of a text, or of each entry of a list.
        formerly: Its old name, still accepted with a notice.
        former_values: Old values, each with its current one; under the old name only, if it has one.
    """
    metadata = {
        "doc": doc,
        "min": min,
        "max": max,
        "choices": tuple(choices),
        "formerly": formerly,
        "former_values": former_values,
    }
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SettingInfo:
    """The declaration of one setting; ``name`` may have a section prefix, as in ``train.learning_rate``."""

    name: str
    type: Any
    default: Any
    doc: str = ""
    min: float = -math.inf
    max: float = math.inf
    choices: tuple[str, ...] = ()
    formerly: str = ""
    former_values: Mapping[Any, Any] = field(default_factory=dict)

    @property
    def types(self) -> tuple[Any, ...]:
        """The allowed types: the members of a union, or the one type."""
        return typing.get_args(self.type) if _is_union(self.type) else (self.type,)

    @property
    def type_hint(self) -> str:
        """The allowed types, in words."""
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
        kinds = {list: "a list", dict: "a mapping"}
        return " or ".join(words.get(m) or kinds.get(typing.get_origin(m) or m, "a section") for m in self.types)


def declared_settings(cls: type[Settings]) -> Mapping[str, SettingInfo]:
    """Return a class's declared settings, by name."""
    return _declared(_key(cls))


def _key(cls: type[Settings]) -> Any:
    return cls  # for mypy, which takes a frozen dataclass's class for unhashable


@cache
def _declared(cls: type[Settings]) -> Mapping[str, SettingInfo]:
    hints, found = typing.get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        found[f.name] = SettingInfo(f.name, hints[f.name], default, **f.metadata)
    return found


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of all settings; raises UserError for values of other types or outside their bounds."""

    def __post_init__(self) -> None:
        for name, value in check_settings(type(self), vars(self), section=type(self).__qualname__).items():
            object.__setattr__(self, name, value)

    @classmethod
    def build(cls, values: Mapping[str, Any], **context: Any) -> Self:
        """Build from a mapping; arguments and errors as for :func:`check_settings`."""
        return cls(**check_settings(cls, values, **context))


def current_names(cls: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with old names and values of settings, as they declare them, replaced by the current ones."""
    declared = declared_settings(cls)
    former = {info.formerly or name: info for name, info in declared.items() if info.formerly or info.former_values}
    current: dict[str, Any] = {}
    for key, value in values.items():
        info = former.get(key)
        if info and isinstance(value, str):
            value = info.former_values.get(value, value)
        current[info.name if info else key] = value
    return current


class Rename(NamedTuple):
    """A setting that was given under its old name."""

    origin: str
    old: str
    new: str


@contextmanager
def one_notice_per_origin() -> Iterator[list[Rename]]:
    """Context manager: yield a list of renames to fill, and log one notice for each origin at the end."""
    renames: list[Rename] = []
    try:
        yield renames
    finally:
        for origin in dict.fromkeys(rename.origin for rename in renames):
            start = f"{origin} uses old setting names" if origin else "old setting names are used"
            pairs = ", ".join(f"{old} is now {new}" for by, old, new in renames if by == origin)
            logger.warning(f"{start}: {pairs}. The next version will not accept the old names")


def check_settings(
    cls: type[Settings],
    values: Mapping[str, Any],
    *,
    section: str = "",
    owner: str = "",
    origin: Mapping[str, str] | str = "",
    renames: list[Rename] | None = None,
) -> dict[str, Any]:
    """Return validated values of some or all of a class's settings, under their current names.

    Args:
        cls: The class that declares them.
        values: The values by name. If both the old and the current name are given, the later one wins.
        section: Their section of the configuration, such as ``train``; for messages.
        owner: The owner of the settings, such as ``method lora``; for messages, by default the section.
        origin: The source of all values, or of each by name, such as a file's path; for messages.
        renames: Collects the old names in use, for :func:`one_notice_per_origin`; by default, they are logged here.

    Raises:
        UserError: An unknown setting, or a value that its declaration does not allow.
    """
    if renames is None:
        with one_notice_per_origin() as own:
            return check_settings(cls, values, section=section, owner=owner, origin=origin, renames=own)
    declared = declared_settings(cls)
    current: dict[str, Any] = {}
    origins: dict[str, str] = {}
    prefix = f"{section}." if section else ""
    for key, value in values.items():
        source = origin if isinstance(origin, str) else origin.get(key, "")
        ((name, present),) = current_names(cls, {key: value}).items()
        if name != key:
            renames.append(Rename(source, f"{prefix}{key}", f"{prefix}{name}"))
        current.pop(name, None)
        current[name], origins[name] = present, source
    try:
        return dict(_validator(_key(cls)).validate_python(current))
    except pydantic.ValidationError as error:
        fault = _nearest_fault(error)
        key = str(fault["loc"][0])
        by = f"{origins[key]} sets " if origins[key] else ""
        if fault["type"] == "extra_forbidden":
            start = f"{by}{shown(f'{prefix}{key}')}, but " if by else ""
            raise UserError(start + no_such_setting(owner or section, key, declared)) from None
        value = fault["input"] if fault["type"] == "literal_error" else current[key]
        start = f"{by}{prefix}{key} to {shown(value)}" if by else f"{prefix}{key} is {shown(value)}"
        raise UserError(start + _complaint(declared[key], fault, f"{prefix}{key}")) from None


def no_such_setting(owner: str, key: str, known: Iterable[str]) -> str:
    """Return the message for an unknown setting, with the closest known one."""
    called = setting_elsewhere(key)
    advice = f"Here it is {called}" if called else nearest(key, known, ALL_SETTINGS)
    return f"{owner} has no setting {shown(key)}. {advice}"


def suggest_setting(name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown setting of no section: the same key elsewhere, or the sections."""
    if any(key.startswith(f"{name}.") for key in known):
        return f"{name} is a section. Its settings are given one by one, as {name}.KEY=VALUE"
    same = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    if same:
        return f"there is no such setting. Did you mean '{same[0]}'?"
    if called := setting_elsewhere(name):
        return f"there is no such setting. Here it is {called}"
    return f"there is no such setting. {nearest(name.partition('.')[0], {key.partition('.')[0] for key in known})}"


def _nearest_fault(error: pydantic.ValidationError) -> Mapping[str, Any]:
    """Return the first setting's fault that says most: of ``str | list[str]``, that of the one wrong word in the list.

    pydantic reports each member of a union in turn. A list is wrong as a whole for ``str``, which comes first.
    """
    faults = error.errors(include_url=False)
    of_first = [fault for fault in faults if fault["loc"][0] == faults[0]["loc"][0]]
    words = [fault for fault in of_first if fault["type"] == "literal_error" and isinstance(fault["loc"][-1], int)]
    return [*words, *of_first][0]


def _complaint(info: SettingInfo, fault: Mapping[str, Any], name: str) -> str:
    if fault["type"] == "literal_error":
        return f": {info.doc}. {hint(name, fault['input'], info.choices)}"
    if fault["type"] in ("greater_than_equal", "less_than_equal"):
        least, most = (f"{bound:,}" if isinstance(bound, int) else f"{bound:g}" for bound in (info.min, info.max))
        return f", but it must lie in [{least}, {most}]: {info.doc}"
    called = f". {hint(name, fault['input'], ())}" if value_elsewhere(name, fault["input"]) else ""
    return f", but it takes {info.type_hint}: {info.doc}{called}"


@cache
def _validator(cls: type[Settings]) -> pydantic.TypeAdapter[dict[str, Any]]:
    """Return pydantic's validator of a mapping of a class's settings, none of which is required."""
    types_of = {name: _checked_type(info) for name, info in declared_settings(cls).items()}
    typed_dict: Any = TypedDict  # mypy would require literal fields in the call
    shape = typed_dict(cls.__name__, types_of, total=False)
    shape.__pydantic_config__ = pydantic.ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )
    return pydantic.TypeAdapter(shape)


def _checked_type(info: SettingInfo) -> Any:
    """Return a setting's type annotated with its bounds and choices, for pydantic."""
    checked = _narrowed(info.type, info.choices) if info.choices else info.type
    if math.isfinite(info.min):
        checked = Annotated[checked, pydantic.Field(ge=info.min)]
    if math.isfinite(info.max):
        checked = Annotated[checked, pydantic.Field(le=info.max)]
    if any(typing.get_origin(kind) is list for kind in info.types):
        checked = Annotated[checked, pydantic.BeforeValidator(split_names)]
    return checked


def _narrowed(kind: Any, choices: Sequence[str]) -> Any:
    """Return a type with ``str`` replaced by the literal choices."""
    if kind is str:
        return Literal[tuple(choices)]
    if _is_union(kind):
        return typing.Union[tuple(_narrowed(member, choices) for member in typing.get_args(kind))]  # noqa: UP007
    return list[_narrowed(str, choices)] if typing.get_origin(kind) is list else kind  # type: ignore[misc]


def split_names(value: Any) -> Any:
    """Return ``['q_proj', 'v_proj']`` for ``q_proj,v_proj``; return any other type unchanged."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


def _is_union(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
