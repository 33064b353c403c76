"""Jinja templates and expressions of tasks and prompts: sandboxed, and limited in time, memory and output.

Those of this package's own pages are trusted, and escape what is put into them. Every failure of the others
is a :class:`BadTemplate`: of the syntax, of a field that the record lacks, of the sandbox, of arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from functools import lru_cache
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, TemplateError, TemplateSyntaxError, Undefined
from jinja2.sandbox import SandboxedEnvironment

from subspace.common.foreign.limits import MOST_MEMORY, limited
from subspace.errors import UserError, printable, shown

#: Characters of a template's text, and of what it writes.
MOST_SOURCE, MOST_OUTPUT = 1 << 16, 1 << 20

_FAILURES = (
    *(TemplateError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError),
    *(RecursionError, re.error, AssertionError, SyntaxError, NotImplementedError),
)


class BadTemplate(UserError):
    """A template or an expression that cannot be understood, or fails on what it is given.

    Attributes:
        reason: what is wrong, without the template.
    """

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"{what}: {reason}")
        self.reason = reason


def _regex_group(text: str, pattern: str, group: int) -> str:
    match = re.fullmatch(pattern, text, re.DOTALL)
    if not match:
        raise TemplateError(f"{text[:60]!r}... does not match {pattern!r}")
    return match[group]


def _regex_replace(text: str, pattern: str, new: str) -> str:
    return re.sub(pattern, new, text)


class _Sandbox(SandboxedEnvironment):
    def make_globals(self, d: MutableMapping[str, Any] | None) -> MutableMapping[str, Any]:
        """Return names as a dict: each call of a template copies them, and Jinja's ChainMap goes one by one."""
        return {**self.globals, **(d or {})}


_JINJA = _Sandbox(undefined=StrictUndefined, keep_trailing_newline=True)
_JINJA.filters.update(regex_group=_regex_group, regex_replace=_regex_replace)


@lru_cache(maxsize=1024)
def compile_template(source: str) -> Template:
    """Return a template; raise BadTemplate where its syntax is wrong. Constants in it are computed now."""
    compiled: Template = _compiled(_name("template", source), source, _JINJA.from_string)
    return compiled


@lru_cache(maxsize=1024)
def compile_expression(source: str) -> Any:
    """Return an expression as a function of its variables; raise BadTemplate where its syntax is wrong."""
    return _compiled(
        _name("expression", source), source, lambda text: _JINJA.compile_expression(text, undefined_to_none=False)
    )


def _compiled(what: str, source: str, compile_source: Any) -> Any:
    if len(source) > MOST_SOURCE:
        raise BadTemplate(what, f"it has more than {MOST_SOURCE:,} characters")
    try:
        with limited(what, memory=MOST_MEMORY):
            return compile_source(source)
    except TemplateSyntaxError as error:
        line = f"line {error.lineno}: " if "\n" in source else ""
        raise BadTemplate(what, f"{line}{printable(str(error.message))}") from None
    except _FAILURES as error:
        raise BadTemplate(what, _reason(error)) from None


def render(template: str, fields: Mapping[str, Any], /, **more: Any) -> str:
    """Return a template filled with these fields; raise BadTemplate for a missing one, and for any other failure."""
    compiled, what = compile_template(template), _name("template", template)
    try:
        with limited(what, memory=_memory(template)):
            text = compiled.render(fields, **more)
    except _FAILURES as error:
        raise BadTemplate(what, _reason(error)) from None
    if len(text) > MOST_OUTPUT and len(text) > MOST_OUTPUT + 8 * sum(len(str(value)) for value in fields.values()):
        raise BadTemplate(what, f"it writes {len(text):,} characters, more than {MOST_OUTPUT:,}")
    return text


def evaluate(expression: str, record: Mapping[str, Any], /, **more: Any) -> Any:
    """Return an expression's value over a record's fields; raise BadTemplate for a missing one, and other failures."""
    compiled, what = compile_expression(expression), _name("expression", expression)
    try:
        with limited(what, memory=_memory(expression)):
            value = compiled(record, **more)
        if isinstance(value, Undefined):
            str(value)  # raises what is missing
    except _FAILURES as error:
        raise BadTemplate(what, _reason(error)) from None
    return value


def page_template(source: str, **known: Any) -> Template:
    """Return one of this package's own templates of a page, with names that it knows: every value in it is escaped."""
    page = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=False)
    page.globals.update(known)
    return page.from_string(source)


@lru_cache(maxsize=1024)
def _name(kind: str, source: str) -> str:
    return f"the {kind} {shown(source)}"


@lru_cache(maxsize=1024)
def _memory(source: str) -> int | None:
    """Return the limit of memory: none for what only puts fields together, as nearly all templates do."""
    inside = " ".join(re.findall(r"\{\{.*?\}\}|\{%.*?%\}", source, re.DOTALL)) or source
    grows = re.search(r"[*(~]|\d{3}|\b(set|macro)\b|\+\s*[^\s\d]|[^{]%[^}]", inside)
    return MOST_MEMORY if grows else None


def _reason(error: BaseException) -> str:
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"
