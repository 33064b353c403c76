"""``subspace methods``: list and describe the fine-tuning methods."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from subspace.cli.command import Command, count, json_argument, say
from subspace.errors import UserError, nearest

if TYPE_CHECKING:
    from subspace.adapters.catalog import MethodInfo


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="METHOD|FILE|key=value",
        help="a method to describe; settings of it, or of all methods",
    )
    add(
        "--shape", metavar="NAME", help="count trainable parameters in llama-7b, llama3-8b, ..., or any model or folder"
    )
    add("--targets", nargs="+", metavar="TARGET", help="with --shape: the layers that get an adapter")
    add(
        "--budget",
        type=count,
        metavar="N",
        help="with --shape: each method in the size that trains closest to N parameters",
    )
    add("--r", type=count, metavar="N", help="short for r=N")
    add("--markdown", action="store_true", help="the table of subspace/methods/README.md")
    add("--short", action="store_true", help="with --markdown: one line a family, the table of README.md")
    json_argument(parser)


def _run(options: argparse.Namespace) -> int:
    files = [word for word in options.words if "=" not in word and word.endswith(".py")]
    names = [word for word in options.words if "=" not in word and word not in files]
    names += [name for file in files for name in _load(file)]
    if len(names) > 1:
        raise UserError(f"subspace methods describes one method or lists all, but was given {', '.join(names)}")
    if not options.shape and (options.targets or options.budget):
        raise UserError("--targets and --budget need a model to count parameters in, such as --shape llama-7b")
    if options.markdown:
        from subspace.adapters.catalog import methods_table, short_methods_table

        say(short_methods_table() if options.short else methods_table())
        return 0
    overrides = [word for word in options.words if "=" in word] + ([f"r={options.r}"] if options.r else [])
    return _show(names[0], overrides, options) if names else _list(overrides, options)


def _load(file: str) -> list[str]:
    """Load a user's method file and return the names of its methods."""
    from subspace.adapters.registry import load_method_file

    return list(load_method_file(file).methods)


def _list(overrides: Sequence[str], options: argparse.Namespace) -> int:
    """List all methods and constraints."""
    from subspace.adapters.catalog import method_infos, methods_grid
    from subspace.common.tables import print_grid

    found = method_infos(method_settings(None, overrides))
    if options.budget:
        found = [info for info in found if info.size_setting]
    found = _counted(found, options)
    if options.json:
        say(json.dumps([dataclasses.asdict(info) for info in found], indent=2))
    else:
        print_grid(methods_grid(found, options.shape))
    return 0


def _show(name: str, overrides: Sequence[str], options: argparse.Namespace) -> int:
    """Print the description of one method."""
    from subspace.adapters.catalog import method_info, method_page
    from subspace.adapters.registry import resolve_method

    method = resolve_method(name)[0]
    (info,) = _counted([method_info(method, method_settings(name, overrides)[method.name])], options)
    say(json.dumps(dataclasses.asdict(info), indent=2) if options.json else method_page(info, options.shape))
    return 0


def _counted(found: list[MethodInfo], options: argparse.Namespace) -> list[MethodInfo]:
    """Add each method's number of trainable parameters in the model that ``--shape`` names."""
    if not options.shape:
        return found
    from subspace.adapters.catalog import with_param_count
    from subspace.models.config import ModelConfig
    from subspace.models.loading import open_shape

    targets = [word for words in options.targets or [] for word in words.split(",")] or None
    shape = open_shape(ModelConfig(path=options.shape))
    return [with_param_count(info, shape, targets, options.budget) for info in found]


def method_settings(name: str | None, overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return settings by method name, for one method or for all, from ``key=value`` overrides and an alias's presets.

    A setting that only some methods have is set in those.
    """
    from subspace.adapters.registry import list_methods, resolve_method
    from subspace.common.layers import COMMAND_LINE, parse_override
    from subspace.common.settings import check_settings, declared_settings

    wanted = [resolve_method(name)] if name else [(method, {}) for method in list_methods().values()]
    found = {method.name: dict(presets) for method, presets in wanted}
    given = dict(map(parse_override, overrides))
    for method, _ in wanted:
        declared = declared_settings(method.Config)
        own = {key: value.value_for(declared.get(key)) for key, value in given.items() if name or key in declared}
        found[method.name] |= check_settings(method.Config, own, owner=f"method {method.name}", origin=COMMAND_LINE)
    known = {key for method, _ in wanted for key in declared_settings(method.Config)}
    for key in given:
        if key not in known:
            raise UserError(f"no method has a setting '{key}'. {nearest(key, known)}")
    return found


COMMAND = Command(
    "methods",
    "list the methods, or describe one",
    """examples:
  subspace methods
  subspace methods lora+mpc-o
  subspace methods my_method.py                            one of your own, in a file that registers it
  subspace methods --shape llama-7b --r 32                 trainable parameters of each, on its default layers
  subspace methods dora --shape llama3-8b --targets q_proj v_proj --r 8 alpha=16
  subspace methods houlsby --shape llama-7b --budget 56098816""",
    _arguments,
    _run,
)
