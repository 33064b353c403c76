"""``subspace methods``: what methods there are."""

from __future__ import annotations

import argparse
import dataclasses
import json

from subspace.cli.command import Command, count, json_argument
from subspace.errors import UserError


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("words", nargs="*", metavar="METHOD|key=value", help="tell all about one method; settings of it, or of all")
    add("--shape", metavar="NAME", help="count what is trained in llama-7b, llama3-8b, ..., or any model or folder")
    add("--targets", nargs="+", metavar="TARGET", help="with --shape: the layers that get an adapter")
    add("--budget", type=count, metavar="N", help="with --shape: in that size of a method which trains nearest to N")
    add("--r", type=count, metavar="N", help="short for r=N")
    add("--markdown", action="store_true", help="the table of subspace/methods/README.md")
    add("--short", action="store_true", help="with --markdown: one line a family, the table of README.md")
    json_argument(parser)


def _run(options: argparse.Namespace) -> int:
    from subspace.adapters import catalog
    from subspace.common.tables import print_grid
    from subspace.config import method_settings
    from subspace.models.config import ModelConfig
    from subspace.models.loading import open_shape

    if not options.shape and (options.targets or options.budget):
        raise UserError("--targets and --budget count, so they need a model to count in: --shape llama-7b, say")
    names = [word for word in options.words if "=" not in word]
    if len(names) > 1:
        raise UserError(f"subspace methods tells about one method or lists all, but was given {', '.join(names)}")
    given = [word for word in options.words if "=" in word] + ([f"r={options.r}"] if options.r else [])
    settings = method_settings(names[0] if names else None, given)
    if options.markdown:
        print(catalog.short_methods_table() if options.short else catalog.methods_table())
        return 0
    found = [entry for entry in catalog.method_infos(settings) if not names or entry.name in settings]
    if options.shape:
        targets = [word for words in options.targets or [] for word in words.split(",")] or None
        shape = open_shape(ModelConfig(path=options.shape))
        if options.budget and not names:
            found = [entry for entry in found if entry.size_setting]
        found = [catalog.with_param_count(entry, shape, targets, options.budget) for entry in found]
    if options.json:
        plain = [dataclasses.asdict(entry) for entry in found]
        print(json.dumps(plain[0] if names else plain, indent=2))
    elif names:
        print(catalog.method_page(found[0], options.shape))
    else:
        print_grid(catalog.methods_grid(found, options.shape))
    return 0


VERB = Command(
    "methods",
    "list the methods, or tell all about one",
    """examples:
  subspace methods
  subspace methods lora+mpc-o
  subspace methods --shape llama-7b --r 32                 what each num_params, on the usual layers
  subspace methods dora --shape llama3-8b --targets q_proj v_proj --r 8 alpha=16
  subspace methods houlsby --shape llama-7b --budget 56098816""",
    _arguments,
    _run,
)
