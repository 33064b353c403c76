"""Part of registry."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

from subspace.adapters.base import FAMILIES, Adapter, MethodConfig
from subspace.errors import UserError, nearest

_register: dict[str, type[Adapter]] = {}
_Class = TypeVar("_Class", bound=type[Adapter])
Presets = Mapping[str, Any]

#: The paper's matrix pattern constraints, by the word that follows a method's name: ``lora+mpc-o``.
CONSTRAINTS: dict[str, Presets] = {f"mpc-{letter}": {"mpc": letter} for letter in "odn"}


def register(
    name: str, *, family: str, num_params: str, aliases: Mapping[str, Presets] | None = None
) -> Callable[[_Class], _Class]:
    """Enter a method's class into the register.

    ``num_params`` is the number of trained values at one site as an expression over the method's settings and ``n_in``,
    ``n_out`` (the layer's features; of an embedding, its rows and its width), ``n_kv`` (key-value heads times head
    dimension, at an attention) or ``n_values`` (those of the module itself). An alias may stand for settings:
    ``aliases={"rslora": {"rslora": True}}``.
    """
    assert family in FAMILIES, family

    def enter(cls: _Class) -> _Class:
        cls.name, cls.family, cls.num_params, cls.aliases = name, family, num_params, aliases or {}
        _register[name] = cls
        return cls

    return enter


@cache
def _import_builtin_methods() -> None:
    """Import every file of ``subspace.methods``, which registers what it defines. Once a process."""
    package = importlib.import_module("subspace.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def list_methods() -> dict[str, type[Adapter]]:
    """Return every method by name."""
    _import_builtin_methods()
    return dict(sorted(_register.items()))


def resolve_method(name: str) -> tuple[type[Adapter], Presets]:
    """Return the method of this name or alias, and the settings that the alias, or a constraint behind it, stands for.

    Letter case is free, and ``_`` stands for ``-``: ``LoRA+MPC_o`` is LoRA with ``mpc: o``.
    """
    known = list_methods()
    by_name: dict[str, tuple[type[Adapter], Presets]] = {name: (cls, {}) for name, cls in known.items()}
    for cls in known.values():
        by_name |= {alias: (cls, presets) for alias, presets in cls.aliases.items()}
    word, plus, constraint = name.casefold().replace("_", "-").partition("+")
    if word not in by_name:
        raise UserError(f"no method is called '{name}'. {nearest(word, by_name)}")
    cls, presets = by_name[word]
    if not plus:
        return cls, presets
    if constraint not in CONSTRAINTS:
        raise UserError(f"'{name}' asks for a constraint '{constraint}'. {nearest(constraint, CONSTRAINTS)}")
    if "mpc" not in cls.Config.__dataclass_fields__:
        able = [other.name for other in known.values() if "mpc" in other.Config.__dataclass_fields__]
        raise UserError(f"'{name}': {constraint} constrains two factors, which {cls.name} has not. {nearest('', able)}")
    return cls, {**presets, **CONSTRAINTS[constraint]}


def configure(cls: type[Adapter], settings: Mapping[str, Any]) -> MethodConfig:
    """Build a method's Config from a mapping; unknown keys are refused with the nearest known one."""
    import dataclasses

    known = [field.name for field in dataclasses.fields(cls.Config)]
    for key in settings:
        if key not in known:
            raise UserError(f"method {cls.name} has no setting '{key}'. {nearest(key, known)}")
    return cls.Config(**settings)
