"""The architecture: which package may import which, who may know a foreign library, and how long a file may be.

What may import what stands in pyproject.toml, as contracts of import-linter; ``lint-imports`` shows the same.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import io
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import grimp
import pytest
from importlinter import api
from importlinter.application import use_cases

from subspace.common.paths import REPOSITORY

PACKAGE = REPOSITORY / "subspace"
FILES = sorted(PACKAGE.rglob("*.py"))
METHODS = PACKAGE / "methods"

#: What a method's file may import, besides torch and the standard library: the contract, and what families share.
METHODS_KNOW = {
    "subspace.adapters.base",
    "subspace.adapters.bottleneck",
    "subspace.adapters.linalg",
    "subspace.adapters.low_rank",
    "subspace.adapters.registry",
    "subspace.adapters.singular_values",
    "subspace.adapters.virtual_tokens",
    "subspace.common.settings",
    "subspace.errors",
    "subspace.kernels.dropout",
    "subspace.kernels.low_rank",
    "subspace.models.frozen_weights",
}
LONGEST_METHOD, LONGEST_MODULE, LARGEST_FOLDER = 100, 400, 17

#: Not imported before a command knows what it is asked for.
HEAVY = {
    "torch",
    "transformers",
    "deepspeed",
    "bitsandbytes",
    "datasets",
    "scipy",
    "matplotlib",
    "safetensors",
    "numpy",
}


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@functools.cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("subspace", include_external_packages=True, exclude_type_checking_imports=True)


def contracts() -> list[str]:
    declared = api.read_configuration(str(REPOSITORY / "pyproject.toml"))["contracts_options"]
    return [contract["id"] for contract in declared]


@pytest.mark.parametrize("contract", contracts())
def test_a_contract_of_imports_is_kept(contract: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with redirect_stdout(io.StringIO()) as said:
        kept = use_cases.lint_imports(
            config_filename="pyproject.toml", limit_to_contracts=(contract,), cache_dir=None, is_debug_mode=False
        )
    assert kept, said.getvalue()


def test_both_contracts_are_declared() -> None:
    assert {"architecture", "owners"} <= set(contracts())


def test_no_import_is_relative() -> None:
    relative = [
        f"{name_of(file)}:{node.lineno}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_a_method_knows_torch_and_the_contract_only() -> None:
    allowed = METHODS_KNOW | {"torch", *sys.stdlib_module_names}
    strangers = [
        f"{module} imports {imported}"
        for module in sorted(graph().find_children("subspace.methods"))
        for imported in sorted(graph().find_modules_directly_imported_by(module) - allowed)
    ]
    assert not strangers


def test_the_package_knows_neither_data_nor_launch_nor_tests() -> None:
    assert not {"data", "launch", "tests"} & graph().modules


def test_files_and_folders_are_small() -> None:
    def limit(file: Path) -> int:
        return LONGEST_METHOD if file.parent == METHODS else LONGEST_MODULE

    lengths = {file: len(file.read_text().splitlines()) for file in FILES}
    too_long = {name_of(file): lines for file, lines in lengths.items() if lines >= limit(file)}
    assert too_long == {}
    folders = {folder: len(list(folder.glob("*.py"))) for folder in {file.parent for file in FILES} - {METHODS}}
    assert {name_of(folder): files for folder, files in folders.items() if files > LARGEST_FOLDER} == {}


def test_an_entry_point_holds_no_logic() -> None:
    for file in (REPOSITORY / "launch").glob("*.py"):
        kinds = {type(node) for node in ast.walk(ast.parse(file.read_text()))}
        assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.Try}, file


@pytest.mark.processes
def test_the_command_starts_light() -> None:
    """What ``subspace --help`` imports is the standard library and this package's lightest files."""
    code = (
        "import pkgutil, sys, subspace.cli.main, subspace.cli.commands as all_of_them\n"
        "assert 'subspace.cli.commands.train' in sys.modules\n"
        f"print(*sorted({HEAVY} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == []


#: Modules that know one another, with the reason: what is attached to a model when adapters are put in writes them,
#: and what reads them puts them in.
CIRCLE = ("subspace.adapters.exchange.pretrained", "subspace.adapters.serialization")


def test_no_modules_import_one_another_in_a_circle() -> None:
    """Also not inside functions, where the order in which modules are loaded does not show it."""
    imported = graph()
    own = [module for module in imported.modules if module.startswith("subspace")]
    known = {module: imported.find_modules_directly_imported_by(module).intersection(own) for module in own}
    known[CIRCLE[0]].remove(CIRCLE[1])
    graphlib.TopologicalSorter(known).prepare()  # raises CycleError, with the circle
