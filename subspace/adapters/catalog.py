"""The methods as tables, read off the register: for ``subspace methods`` and for the README."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from subspace.adapters import low_rank
from subspace.adapters.base import Adapter
from subspace.adapters.parameter_count import count_trained, match_budget
from subspace.adapters.registry import CONSTRAINTS, is_builtin, list_methods
from subspace.common.tables import Grid

#: The marks around the tables: the full one's in ``subspace/methods/README.md``, the short one's in ``README.md``.
BEGIN, END = "<!-- methods: written by `subspace methods --markdown` -->", "<!-- end of methods -->"
BEGIN_SHORT = "<!-- methods: written by `subspace methods --markdown --short` -->"
CONSTRAINT = "constraint"
METHODS_FOLDER = "subspace/methods"

FAMILY_MEANINGS = {
    "reconstruction": "φ(W): W, or what it is applied to, is transformed",
    "extension": "W + s ΔW: an update that does not depend on W's own subspaces is added",
    "combination": "φ(W) + s ΔW: both at once",
    "reference": "every number is trained",
    CONSTRAINT: "a term on the factors of a method, after its name: `lora+mpc-o`",
}


@dataclass(frozen=True)
class MethodInfo:
    """Summary of one method, or of a constraint that methods compose with."""

    name: str
    family: str
    equation: str  # LaTeX
    num_params: str  # numbers at one site, over the settings and the site's sizes
    site: str
    mergeable: bool
    weight_access: str
    settings: dict[str, Any]
    size_setting: str | None  # the setting that makes it larger or smaller
    composes: tuple[str, ...]  # a method with constraints, a constraint with methods
    arxiv: str  # of a method outside the package it may be missing, as the equation
    file: str  # from the repository's root; outside the package, its path
    trained: int | None = None  # numbers in a given model
    share: float | None = None  # of all numbers of that model and the adapters


def method_info(method: type[Adapter], settings: Mapping[str, Any] | None = None) -> MethodInfo:
    """Read one method's entry off its class and its file, with these settings where they are not the defaults."""
    manual = method_docstring(method)
    equation = re.search(r"^\.\. math:: (.+?)(?:,\\qquad|$)", manual, re.MULTILINE)
    paper = re.search(r"arXiv:(\d+\.\d+)", manual)
    config = method.Config(**(settings or {}))
    file = Path(getattr(inspect.getmodule(method), "__file__", None) or "")
    return MethodInfo(
        name=method.name,
        family=method.family,
        equation=equation[1] if equation else "",
        num_params=method.num_params,
        site=method.target_kind(config),
        mergeable=bool(method.mergeable),
        weight_access=method.weight_access,
        settings=dataclasses.asdict(config),
        size_setting=method.size_setting,
        composes=tuple(f"+{name}" for name in CONSTRAINTS) if _constrained(method) else (),
        arxiv=paper[1] if paper else "",
        file=f"{METHODS_FOLDER}/{file.name}" if is_builtin(method) else str(file),
    )


def method_infos(settings: Mapping[str, Mapping[str, Any]] | None = None) -> list[MethodInfo]:
    """Return every method's entry, and the constraints'; ``settings`` by method."""
    found = [method_info(method, (settings or {}).get(name)) for name, method in list_methods().items()]
    return found + [_constraint(name) for name in CONSTRAINTS]


def _own_infos() -> list[MethodInfo]:
    """Return the entries of the package's own methods, and the constraints'."""
    return [info for info in method_infos() if info.family == CONSTRAINT or is_builtin(list_methods()[info.name])]


def _constrained(method: type[Adapter]) -> bool:
    return issubclass(method.Config, low_rank.ConstrainedConfig)


def _constraint(name: str) -> MethodInfo:
    manual = inspect.getdoc(low_rank) or ""
    told = re.search(rf"^``{name[-1]}``  (.*:math:`(.+?)`.*)$", manual, re.MULTILINE)
    paper = re.search(r"arXiv:(\d+\.\d+)", manual)
    assert told, f"{name}: the docstring of {low_rank.__name__} has no row with a :math: for it"
    assert paper
    fields = dataclasses.fields(low_rank.ConstrainedConfig)
    return MethodInfo(
        name=f"+{name}",
        family=CONSTRAINT,
        equation=told[2],
        num_params="0",
        site="linear",
        mergeable="cannot be merged" not in told[1],
        weight_access="nothing",
        settings={f.name: f.default for f in fields if f.name.startswith("constraint_")},
        size_setting=None,
        composes=tuple(m.name for m in list_methods().values() if _constrained(m) and is_builtin(m)),
        arxiv=paper[1],
        file="subspace/adapters/low_rank.py",
    )


def with_param_count(
    e: MethodInfo, shape: nn.Module, targets: Sequence[str] | None = None, budget: int | None = None
) -> MethodInfo:
    """Add what a method trains in a model; with a budget, by that size of it which comes nearest.

    Targets name linear layers; a method of another kind has its usual sites.
    """
    if e.family == CONSTRAINT:
        return e
    where = targets if e.site == "linear" else None
    settings = dict(e.settings)
    if budget:
        others = {name: value for name, value in settings.items() if name != e.size_setting}
        size = match_budget(e.name, shape, budget, targets=where, **others)
        settings |= {e.size_setting or "": size}
    trained = count_trained(shape, e.name, settings, targets=where)
    every = sum(parameter.numel() for parameter in shape.parameters())
    added = 0 if e.family == "reference" else trained
    return dataclasses.replace(e, settings=settings, trained=trained, share=trained / (every + added))


def method_docstring(method: type[Adapter]) -> str:
    """Return the manual of one method: its file's docstring, else its class's."""
    return inspect.getdoc(inspect.getmodule(method)) or inspect.getdoc(method) or ""


def methods_table() -> str:
    """Return the table of the package's methods in Markdown, for ``subspace/methods/README.md``."""
    head = ("method", "family", "equation", "trained numbers a site", "settings", "merges", "paper")
    rows = []
    for info in _own_infos():
        settings = [f"`{name}={_plain(value)}`" for name, value in _own(info).items()] or ["none"]
        settings += [f"with {' '.join(f'`{name}`' for name in info.composes)}"] if info.composes else []
        rows.append(
            (
                f"[`{info.name}`]({os.path.relpath(info.file, METHODS_FOLDER)})",
                info.family,
                f"$`{info.equation}`$",  # between $` and `$ Markdown leaves LaTeX alone
                f"`{info.num_params}`",
                ", ".join(settings),
                _yes(info.mergeable),
                f"[{info.arxiv}](https://arxiv.org/abs/{info.arxiv})",
            )
        )
    return Grid("", head, tuple(rows), left=len(head), marked=True).markdown()


def short_methods_table() -> str:
    """Return the methods by family in Markdown, one line a family, for the top-level README."""
    infos = _own_infos()
    rows = [
        (family, meaning, ", ".join(f"[`{info.name}`]({info.file})" for info in infos if info.family == family))
        for family, meaning in FAMILY_MEANINGS.items()
    ]
    return Grid("", ("family", "what is done to W", "methods"), tuple(rows), left=3, marked=True).markdown()


def methods_grid(infos: Sequence[MethodInfo], model: str = "") -> Grid:
    """Return a table for a terminal; with what each method trains in the model of this name, where it was counted."""
    head = ("method", "family", f"trained in {model}" if model else "trained numbers a site", "merges", "settings")
    rows = []
    for info in infos:
        settings = [f"{name}={_plain(value)}" for name, value in _own(info).items()]
        settings += ["with", *info.composes] if info.composes else []
        trained = info.num_params if info.trained is None else _count(info)
        rows.append((info.name, info.family, trained, _yes(info.mergeable), " ".join(settings)))
    return Grid("", head, tuple(rows), left=len(head))


def method_page(e: MethodInfo, model: str = "") -> str:
    """Return the manual of one method: its file's docstring, names, settings, and what it trains in a model."""
    method = list_methods()[e.name]
    lines = [method_docstring(method), "", f"settings of {method.name}, as method.KEY:"]
    for field in dataclasses.fields(method.Config):
        values = f" ({' | '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
        lines.append(f"  {field.name}={_plain(e.settings[field.name])}".ljust(24) + f"{field.metadata['doc']}{values}")
    if not e.settings:
        lines.append("  (none)")
    if method.aliases:
        lines += ["", "other names:"]
        for alias, presets in method.aliases.items():
            lines.append(f"  {alias}".ljust(24) + " ".join(f"{key}={_plain(value)}" for key, value in presets.items()))
    if e.trained is not None:
        lines += ["", f"with these settings, {method.name} trains {_count(e)} of {model}"]
    return "\n".join(line.rstrip() for line in lines)


def _own(e: MethodInfo) -> dict[str, Any]:
    """Return a method's settings without those of the constraints, which have rows of their own."""
    shown = e.family == CONSTRAINT or not e.composes
    return {name: value for name, value in e.settings.items() if shown or not name.startswith("constraint")}


def _count(e: MethodInfo) -> str:
    return f"{e.trained:,} ({100 * (e.share or 0):.2f} %)"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool | None) else str(value)
