"""``subspace recipes``: list, show and copy the configurations shipped with the package."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from subspace.cli.command import Command, json_argument, say
from subspace.errors import UserError, nearest


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="show one recipe, with the files it builds on merged in"
    )
    parser.add_argument(
        "--copy",
        nargs="?",
        const="",
        metavar="FILE",
        help="write the recipe to a file; default: NAME.yaml",
    )
    json_argument(parser)


def _run(options: argparse.Namespace) -> int:
    if options.copy is not None and not options.name:
        raise UserError("--copy was given without a recipe's name: subspace recipes NAME --copy")
    if options.name:
        return _copy(options) if options.copy is not None else _show(options)
    found = [_describe(file) for file in list_recipes().values()]
    if options.json:
        say(json.dumps(found, indent=2))
        return 0
    from subspace.common.tables import Grid, print_grid

    rows = tuple((recipe["name"], recipe["model"], recipe["method"], recipe["about"]) for recipe in found)
    print_grid(Grid("recipes", ("recipe", "model", "method", "what it is"), rows, left=4))
    return 0


def list_recipes() -> dict[str, Path]:
    """Return the recipes' files by name, without the base files that others build on."""
    from subspace.common.paths import recipes_folder

    return {file.stem: file for file in sorted(recipes_folder().glob("*.yaml")) if not file.stem.startswith("base-")}


def find_recipe(name: str) -> Path:
    """Return a recipe's file; raise UserError with the nearest name if there is none."""
    recipes = list_recipes()
    if name.removesuffix(".yaml") not in recipes:
        raise UserError(f"no recipe is called '{name}'. {nearest(name, recipes, 'subspace recipes')}")
    return recipes[name.removesuffix(".yaml")]


def _describe(file: Path) -> dict[str, str]:
    """Return a recipe's name, model, methods, and the first line of its comment."""
    from subspace.config import read_config

    config = read_config(file)
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return {"name": file.stem, "model": config.model.path, "method": config.methods, "about": first.lstrip("# ")}


def _show(options: argparse.Namespace) -> int:
    from subspace.config import read_given

    file = find_recipe(options.name)
    say(json.dumps(read_given(file), indent=2) if options.json else _standalone(file).rstrip())
    return 0


def _copy(options: argparse.Namespace) -> int:
    """Write a self-contained copy of a recipe: its comment, and its settings with those of its base files."""
    from subspace.common.files import write_file

    file = find_recipe(options.name)
    target = Path(options.copy or f"{file.stem}.yaml")
    if target.is_dir():
        target = target / f"{file.stem}.yaml"
    if target.exists():
        raise UserError(f"{target} already exists and is not overwritten. Give the copy another name: --copy FILE")
    write_file(target, _standalone(file))
    say(json.dumps({"file": str(target)}) if options.json else f"{target}\nnext: subspace train {target}")
    return 0


def _standalone(file: Path) -> str:
    """Return a recipe's self-contained text: its comment, and its settings with those of its base files."""
    from subspace.common.foreign.yaml_files import format_yaml
    from subspace.config import read_given

    comment = re.match(r"(#.*\n)*", file.read_text(encoding="utf-8"))
    return (comment[0] if comment else "") + format_yaml(read_given(file))


COMMAND = Command(
    "recipes",
    "list the configurations shipped with the package; show or copy one",
    """examples:
  subspace recipes
  subspace recipes llama-7b-lora-r32                       all its settings
  subspace recipes llama-7b-lora-r32 --copy mine.yaml      to change it
  subspace train mine.yaml""",
    _arguments,
    _run,
)
