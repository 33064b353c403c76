"""YAML that somebody else may have written: a mapping of texts to plain values, bounded in size, depth and repetition.

PyYAML's safe loader runs no code, but it reads what no settings file means: the last of two equal keys, ``on`` as a
key ``true``, anchors that stand for 10^9 values or for themselves, and it fails with other exceptions than its own.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from subspace.common.foreign.text import MOST_DEPTH, check_bounds, read_text, refuse_controls
from subspace.errors import UserError, printable

#: Bytes of a file; PyYAML reads some 200 kB a second. And values in it, with those that aliases repeat.
MOST_YAML_BYTES, MOST_VALUES = 1 << 18, 50_000
_TEXT = "tag:yaml.org,2002:str"
_TEXT_TAGS = (_TEXT, "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")
_SWITCHES = ("on", "off", "yes", "no")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML loader that rejects duplicate keys and reads 1e-3 as a number.

    PyYAML silently lets the last duplicate win, and reads a number in scientific notation without a point as text.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _measure(node, {}, [])
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _fault("a key is a list or a mapping, and not a text", key)
            if key.value.casefold() in _SWITCHES:
                key.tag = _TEXT  # as a key, `on` is the word
            if key.tag not in _TEXT_TAGS:
                raise _fault(f"the key {key.value} is no text to YAML. Write it in quotes: '{key.value}'", key)
            if key.value in seen:
                raise _fault(f"'{key.value}' stands here twice", key)
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _fault(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], above: list[int]) -> tuple[int, int]:
    """Return how many values a node stands for and how deep they are nested; raise an error beyond the bounds."""
    if id(node) in above:
        raise _fault("an alias stands for what it is in itself", node)
    if id(node) in known:
        return known[id(node)]
    values, depth = 1, 0
    if isinstance(node, yaml.CollectionNode):
        above.append(id(node))
        if len(above) > MOST_DEPTH:
            raise _fault(f"it is nested deeper than {MOST_DEPTH} levels", node)
        pairs = isinstance(node, yaml.MappingNode)
        for inner in (each for pair in node.value for each in (pair if pairs else (pair,))):
            inside, below = _measure(inner, known, above)
            values, depth = values + inside, max(depth, below + 1)
            if values > MOST_VALUES:
                raise _fault(f"it stands for more than {MOST_VALUES:,} values", node)
        above.pop()
    if len(above) + depth > MOST_DEPTH:
        raise _fault(f"it is nested deeper than {MOST_DEPTH} levels", node)
    known[id(node)] = (values, depth)
    return known[id(node)]


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text; ``where`` names it in errors.

    Raises:
        UserError: it is not YAML, or beyond the bounds of size, depth, repetition and numbers, or holds control
            characters or a key that is no text.
    """
    if len(text) > MOST_YAML_BYTES:
        raise UserError(f"{where} has more than {MOST_YAML_BYTES:,} characters, which no file of its kind has")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line} is not YAML that can be understood: {printable(str(error.problem))}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {printable(' '.join(str(error).split()))}") from None
    except RecursionError:
        raise UserError(f"{where} is nested deeper than {MOST_DEPTH} levels") from None
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        # Of a scalar that is not what its tag or its form says, such as the date 2025-02-31.
        reason = printable(str(error).partition(";")[0]) or type(error).__name__
        raise UserError(f"{where} holds a value that cannot be understood: {reason}") from None
    refuse_controls(value, where)
    check_bounds(value, where, finite=False)  # what takes no `.inf` says so itself
    return value


def parse_value(text: str) -> Any:
    """Return a text's value as YAML, such as the integer for ``100``; the text itself if it is not valid YAML."""
    try:
        return parse_yaml(text, "the value")
    except UserError:
        return text


def format_value(value: Any) -> str:
    """Return a value formatted as one line of YAML."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def format_yaml(content: Any) -> str:
    """Return a mapping formatted as YAML, each section on one line where it fits."""
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    return text


def dump_yaml(content: Any) -> str:
    """Return a mapping as the YAML of a file, in its order, so that :func:`read_yaml` returns an equal one."""
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    return text


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file whose top level is a mapping; errors as of :func:`parse_yaml`."""
    content = parse_yaml(read_text(path, most=MOST_YAML_BYTES), str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path} should be a mapping: lines 'key: value'")
    return content
