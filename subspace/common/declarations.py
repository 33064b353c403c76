"""YAML files, and the declarations of tasks, mixtures, models and wheels that they contain.

A declaration is a frozen dataclass that pydantic validates and builds, nested ones included, from its annotations.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic
import yaml

from subspace.common import paths
from subspace.common.files import write_file
from subspace.common.settings import no_such_setting
from subspace.errors import UserError, nearest

_Declared = TypeVar("_Declared")


class Declaration:
    """Base class of YAML declarations; an unknown key is an error."""

    __pydantic_config__: ClassVar = pydantic.ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML loader that rejects duplicate keys and reads 1e-3 as a number.

    PyYAML silently lets the last duplicate win, and reads a number in scientific notation without a point as text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' stands here twice", problem_mark=key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_value(text: str) -> Any:
    """Return a text's value as YAML, such as the integer for ``100``; the text itself if it is not valid YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def format_value(value: Any) -> str:
    """Return a value formatted as one line of YAML."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def format_yaml(content: Mapping[str, Any]) -> str:
    """Return a mapping formatted as YAML, each section on one line where it fits."""
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    return text


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping to a YAML file, in its order, so that :func:`read_yaml` returns an equal one."""
    write_file(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file whose top level is a mapping."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line} is not YAML that can be understood: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} should be a mapping: lines 'key: value'")
    return content


def build(kind: type[_Declared], values: Mapping[str, Any], where: str) -> _Declared:
    """Build a declaration from the content of a YAML file; ``where`` names that file in errors."""
    try:
        built: _Declared = _adapter(kind).validate_python(dict(values))  # type: ignore[arg-type]
        return built
    except pydantic.ValidationError as error:
        fault = error.errors(include_url=False)[0]
        *above, key = fault["loc"]
        holder = _kind_at(kind, above)
        owner = getattr(holder, "__name__", str(holder)).lower()
        if fault["type"] == "unexpected_keyword_argument":
            names = [field.name for field in dataclasses.fields(holder)]
            raise UserError(f"{where}: {no_such_setting(owner, str(key), names)}") from None
        if fault["type"] == "missing":
            lacking = [
                str(f["loc"][-1]) for f in error.errors() if f["type"] == "missing" and [*f["loc"][:-1]] == above
            ]
            raise UserError(f"{where}: {owner} lacks {', '.join(lacking)}") from None
        name = ".".join(map(str, fault["loc"]))
        raise UserError(f"{where}: {name} is {fault['input']!r}. {fault['msg']}") from None


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
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind)[str(step)]
            if isinstance(kind, types.UnionType):
                kind = next(member for member in typing.get_args(kind) if member is not types.NoneType)
        else:
            kind = typing.get_args(kind)[-1 if issubclass(typing.get_origin(kind), Mapping) else 0]
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
