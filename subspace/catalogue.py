"""The methods as tables, read off the register: for ``subspace methods`` and for the README."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace.inject import inject, trained_parameters
from subspace.method import Adapter, methods
from subspace.model import ModelConfig, open_shape

BEGIN, END = "<!-- methods: written by `subspace methods --markdown` -->", "<!-- end of methods -->"


@dataclass(frozen=True)
class Entry:
    """What a reader wants to know of one method at a glance."""

    name: str
    family: str
    equation: str  # LaTeX
    trains: str  # numbers at one site, over the settings and n_in, n_out or n_kv
    site: str
    mergeable: bool
    settings: dict[str, Any]  # with their defaults
    arxiv: str
    file: str  # from the repository's root


def entry(method: type[Adapter]) -> Entry:
    """Read one method's entry off its class and its file."""
    manual = text(method)
    equation = re.search(r"^\.\. math:: (.+?)(?:,\\qquad|$)", manual, re.MULTILINE)
    paper = re.search(r"arXiv:(\d+\.\d+)", manual)
    assert equation, f"{method.name}: its module's docstring has no '.. math::' line"
    assert paper, f"{method.name}: its module's docstring cites no arXiv paper"
    return Entry(
        name=method.name,
        family=method.family,
        equation=equation[1],
        trains=method.trains,
        site=method.site,
        mergeable=method.mergeable,
        settings={field.name: field.default for field in dataclasses.fields(method.Config)},
        arxiv=paper[1],
        file=f"subspace/methods/{Path(inspect.getfile(method)).name}",
    )


def entries() -> list[Entry]:
    """Return every method's entry."""
    return [entry(method) for method in methods().values()]


def text(method: type[Adapter]) -> str:
    """Return the manual of one method: its file's docstring."""
    return inspect.getdoc(inspect.getmodule(method)) or ""


def markdown() -> str:
    """Write the README's table."""
    rows = [
        "| method | family | equation | trained numbers a site | settings | merges | paper |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for e in entries():
        settings = ", ".join(f"`{name}={_plain(value)}`" for name, value in e.settings.items()) or "none"
        paper = f"[{e.arxiv}](https://arxiv.org/abs/{e.arxiv})"
        # Between $` and `$ Markdown leaves LaTeX alone.
        rows.append(
            f"| [`{e.name}`]({e.file}) | {e.family} | $`{e.equation}`$ | `{e.trains}` | {settings} "
            f"| {'yes' if e.mergeable else 'no'} | {paper} |"
        )
    return "\n".join(rows)


def count_trained(method: type[Adapter], model: ModelConfig) -> int:
    """Count the numbers that a method trains in a model, with its default settings at its usual sites."""
    shape = open_shape(model)
    inject(shape, method.name, start=False)
    return sum(parameter.numel() for parameter in trained_parameters(shape).values())


def listing(model: ModelConfig | None = None) -> str:
    """List the methods for a terminal; with what each trains in a model, where one is given."""
    rows = [
        ("method", "family", f"trained in {model.path}" if model else "trained numbers a site", "merges", "settings")
    ]
    for e in entries():
        settings = " ".join(f"{name}={_plain(value)}" for name, value in e.settings.items())
        trained = f"{count_trained(methods()[e.name], model):,}" if model else e.trains
        rows.append((e.name, e.family, trained, "yes" if e.mergeable else "no", settings))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


def page(method: type[Adapter], model: ModelConfig | None = None) -> str:
    """Tell all about one method: its file's docstring, its settings, and what it trains in a model, if one is given."""
    lines = [text(method), "", f"settings of {method.name}, as method.KEY:"]
    for field in dataclasses.fields(method.Config):
        values = f" ({' | '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
        lines.append(f"  {field.name}={_plain(field.default)}".ljust(24) + f"{field.metadata['doc']}{values}")
    if not dataclasses.fields(method.Config):
        lines.append("  (none)")
    if model:
        lines += ["", f"with these, {method.name} trains {count_trained(method, model):,} numbers in {model.path}"]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
