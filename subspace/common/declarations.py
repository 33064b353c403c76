"""Part of declarations."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from subspace.common import paths
from subspace.errors import UserError, nearest

if TYPE_CHECKING:
    pass


_Declared = TypeVar("_Declared")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file whose top level is a mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} should be a mapping of names to values")
    return content


def build(kind: type[_Declared], values: Mapping[str, Any], where: str) -> _Declared:
    """Build a declaration's dataclass from what a YAML file says; ``where`` names that file in an error."""
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: {kind.__name__.lower()} has no {key!r}. {nearest(key, fields)}")
    needed = [name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in values]:
        raise UserError(f"{where}: {kind.__name__.lower()} lacks {', '.join(missing)}")

    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for key, nested in getattr(kind, "NESTED", {}).items():
        if key in values:
            values[key] = tuple(build(nested, part, where) for part in values[key])
    return kind(**values)


def declaration_files(folder: Path) -> list[Path]:
    """Return the YAML files of a folder of declarations, which must be there."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}. SUBSPACE_DATA should name one with tasks/, mixtures/, models/")
    return sorted(folder.glob("*.yaml"))


def _folder(name: str, kind: type[_Declared]) -> dict[str, _Declared]:
    files = declaration_files(paths.declarations_folder() / name)
    return {file.stem: build(kind, {"name": file.stem, **read_yaml(file)}, file.name) for file in files}


def _find(name: str, declared: Mapping[str, _Declared], kind: str) -> _Declared:
    def plain(text: str) -> str:
        return re.sub(r"[\s_-]", "", text).casefold()

    for known, value in declared.items():
        aliases: Sequence[str] = getattr(value, "aliases", ())
        if plain(name) in map(plain, (known, *aliases)):
            return value
    raise UserError(f"no {kind} is called {name!r}. {nearest(name, declared)}")
