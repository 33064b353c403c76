"""Declarations of tasks, mixtures, models and wheels, in YAML files.

A declaration is a frozen dataclass that pydantic validates and builds, nested ones included, from its annotations.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic

from subspace.common import paths
from subspace.common.files import write_file
from subspace.common.foreign.text import describe_fault
from subspace.common.foreign.yaml_files import dump_yaml, read_yaml
from subspace.common.settings import no_such_setting
from subspace.errors import UserError, nearest

_Declared = TypeVar("_Declared")


class Declaration:
    """Base class of YAML declarations; an unknown key is an error."""

    __pydantic_config__: ClassVar = pydantic.ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping to a YAML file, in its order, so that it is read as an equal one."""
    write_file(path, dump_yaml(content))


def build(kind: type[_Declared], values: Mapping[str, Any], where: str) -> _Declared:
    """Build a declaration from the content of a YAML file; ``where`` names that file in errors."""
    try:
        built: _Declared = _adapter(kind).validate_python(dict(values))  # type: ignore[arg-type]
        return built
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_complaint(kind, error)}") from None


def _complaint(kind: Any, error: pydantic.ValidationError) -> str:
    """Return what is wrong with the first value that does not fit a declaration."""
    faults = error.errors(include_url=False)
    above, key = list(faults[0]["loc"][:-1]), str(faults[0]["loc"][-1] if faults[0]["loc"] else "")
    holder = _kind_at(kind, above)
    owner = getattr(holder, "__name__", str(holder)).lower()
    if faults[0]["type"] == "unexpected_keyword_argument" and dataclasses.is_dataclass(holder):
        return no_such_setting(owner, key, [field.name for field in dataclasses.fields(holder)])
    if faults[0]["type"] == "missing":
        lacking = [str(f["loc"][-1]) for f in faults if f["type"] == "missing" and [*f["loc"][:-1]] == above]
        return f"{owner} lacks {', '.join(lacking)}"
    return describe_fault(error)


def declaration_files(folder: Path) -> list[Path]:
    """Return the YAML files of a folder of declarations; raise UserError if there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}. SUBSPACE_DATA should name one with tasks/, mixtures/, models/")
    return sorted(folder.glob("*.yaml"))


@cache
def _adapter(kind: type[Any]) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)


def _kind_at(kind: Any, location: Sequence[str | int]) -> Any:
    """Return the type at a location inside a declaration, given as pydantic's ``loc``."""
    for step in location:
        if isinstance(kind, types.UnionType):
            kind = next((member for member in typing.get_args(kind) if member is not types.NoneType), kind)
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(str(step), str)
        elif inside := typing.get_args(kind):
            kind = inside[-1 if issubclass(typing.get_origin(kind) or object, Mapping) else 0]
    if isinstance(kind, types.UnionType):
        kind = next((member for member in typing.get_args(kind) if member is not types.NoneType), kind)
    return kind


def read_folder(name: str, kind: type[_Declared]) -> dict[str, _Declared]:
    """Return the declarations in a folder of YAML files, by file name."""
    files = declaration_files(paths.declarations_folder() / name)
    return {file.stem: build(kind, {"name": file.stem, **read_yaml(file)}, file.name) for file in files}


def find_declared(name: str, declared: Mapping[str, _Declared], kind: str) -> _Declared:
    """Return a declaration by its name or an alias; letter case, spaces, ``_`` and ``-`` are ignored."""

    def plain(text: str) -> str:
        return re.sub(r"[\s_-]", "", text).casefold()

    for known, value in declared.items():
        aliases: Sequence[str] = getattr(value, "aliases", ())
        if plain(name) in map(plain, (known, *aliases)):
            return value
    raise UserError(f"no {kind} is called {name!r}. {nearest(name, declared)}")


# Values of JSON, checked strictly: for what a file holds that other versions and people may have written.

Share = typing.Annotated[float, pydantic.Field(ge=0, le=1, allow_inf_nan=False)]
Amount = typing.Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Finite = typing.Annotated[float, pydantic.Field(allow_inf_nan=False)]
Count = typing.Annotated[int, pydantic.Field(ge=0)]
Positive = typing.Annotated[int, pydantic.Field(ge=1)]
Name = typing.Annotated[str, pydantic.Field(min_length=1)]


def find_fault(value: Any, kind: Any) -> tuple[tuple[str | int, ...], str] | None:
    """Return the first place in a value at which it is not of a type, and what is wrong there; None if it is."""
    try:
        _adapter(kind).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        fault = error.errors(include_url=False)[0]
        return fault["loc"], f"{fault['msg'][0].lower()}{fault['msg'][1:]}"
    return None
