"""The architecture: what may import what, who may know a foreign library, and how long a method's file may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "subspace"

# A file may import files of the lines above its own, nothing beside it and nothing below.
LAYERS = [
    "errors paths distributed linalg progress statistics formats checkpoint interruption watchdog host_memory",
    "zero attention norm",
    "optimizers speedups settings dropout base sites methods model_files results decomposition shards",
    "method branch",
    "access output_head lowrank spectrum bottleneck virtual_tokens",
    "methods.* declarations encoding",
    "inject contamination sources proof likelihood decoding partial workload loss",
    "mixed adapter_file budget log prepare generation checksum",
    "rows model optimizer_state checks answer_word published",
    "batches engine custom combination",
    "resume",
    "train evaluate merge scored_runs holdings rehearsal",
    "unseen config tables catalogue launcher",
    "run data_report subjects comparison plots lm_eval_model",
    "plan verb verbs",
    "verbs.*",
    "cli",
    "__main__ __init__",
]

# Who may import a foreign library at all, also inside a function.
OWNERS = {
    "deepspeed": "zero access engine combination",
    "transformers": "model model_files prepare merge shards",
    "bitsandbytes": "base model engine rehearsal optimizers",
    "datasets": "prepare batches sources",
    "huggingface_hub": "sources",
    "jsonargparse": "config",
    "yaml": "config declarations",
    "jinja2": "declarations",
    "rich": "progress formats",
    "scipy": "statistics",
    "matplotlib": "plots",
    "safetensors": "base decomposition adapter_file resume merge shards",
    "psutil": "launcher",
    "lm_eval": "lm_eval_model",
    "liger_kernel": "speedups",
}
#: What may be imported where only a type checker sees it.
TYPES_ONLY = {"transformers": "encoding rows batches data_report evaluate generation likelihood answer_word published"}

METHODS_KNOW = {"torch"} | {
    f"subspace.{name}"
    for name in [
        "method",
        "linalg",
        "branch",
        "dropout",
        "settings",
        "errors",
        "decomposition",
        "lowrank",
        "spectrum",
        "bottleneck",
        "virtual_tokens",
        "base",
    ]
}
LONGEST_METHOD = 100


@dataclass(frozen=True)
class Import:
    """One imported module, and how."""

    module: str
    line: int
    at_start: bool  # runs when the file is imported
    types_only: bool


def imports(file: Path) -> list[Import]:
    """Return what a file imports, ``from subspace import errors`` as ``subspace.errors``."""
    return list(_walk(ast.parse(file.read_text()), at_start=True, types_only=False))


def _walk(node: ast.AST, *, at_start: bool, types_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        names: list[str] = []
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative imports hide the layer"
            module = child.module or ""
            names = (
                [f"{module}.{alias.name}" for alias in child.names]
                if module in ("subspace", "subspace.methods", "subspace.verbs")
                else [module]
            )
        yield from (Import(name, getattr(child, "lineno", 0), at_start, types_only) for name in names)
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        yield from _walk(child, at_start=at_start and not inside, types_only=types_only or guarded)


def stem(file: Path) -> str:
    """Name a file of the package as the tables above do: ``method``, ``methods.lora``."""
    name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__") if "." in name else name


def layer(name: str) -> int:
    """Return the number of the line that a file stands in."""
    folder, _, inside = name.rpartition(".")
    short = f"{folder}.*" if folder else inside
    found = [number for number, line in enumerate(LAYERS) if short in line.split()]
    assert found, f"subspace/{name.replace('.', '/')}.py stands in no line of LAYERS"
    return found[0]


FILES = sorted(PACKAGE.rglob("*.py"))
METHODS = sorted(set((PACKAGE / "methods").glob("*.py")) - {PACKAGE / "methods" / "__init__.py"})
every_file = pytest.mark.parametrize("file", FILES, ids=stem)
every_method = pytest.mark.parametrize("file", METHODS, ids=stem)


@every_file
def test_imports_point_downwards(file: Path) -> None:
    own = layer(stem(file))
    upwards = [
        f"line {i.line}: {i.module}"
        for i in imports(file)
        if i.module.startswith("subspace.") and not i.types_only and layer(i.module.removeprefix("subspace.")) >= own
    ]
    assert not upwards


@every_file
def test_foreign_libraries_have_owners(file: Path) -> None:
    name = stem(file)
    strangers = [
        f"line {i.line}: {i.module}"
        for i in imports(file)
        if (library := i.module.partition(".")[0]) in OWNERS
        and name not in OWNERS[library].split()
        and not (i.types_only and name in TYPES_ONLY.get(library, "").split())
    ]
    assert not strangers


@every_file
def test_the_package_knows_neither_data_nor_launch_nor_tests(file: Path) -> None:
    assert not [i for i in imports(file) if i.module.partition(".")[0] in ("data", "launch", "tests")]


@every_method
def test_a_method_knows_torch_and_the_contract_only(file: Path) -> None:
    roots = {i.module for i in imports(file)} - METHODS_KNOW
    foreign = [m for m in roots if m.partition(".")[0] not in sys.stdlib_module_names | {"torch", "__future__"}]
    assert not foreign


@every_method
def test_a_method_is_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) < LONGEST_METHOD


@pytest.mark.parametrize("name", ["train", "evaluate", "merge"])
def test_an_entry_point_holds_no_logic(name: str) -> None:
    tree = ast.parse((ROOT / "launch" / f"{name}.py").read_text())
    kinds = {type(node) for node in ast.walk(tree)}
    assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.Try}


def test_the_command_starts_light() -> None:
    """What ``subspace --help`` imports is the standard library and this package's lightest files."""
    heavy = {"torch", *OWNERS}
    reached, todo = set(), ["__main__", "__init__"]
    while todo:
        name = todo.pop()
        reached.add(name)
        at_start = [
            i.module for i in imports(PACKAGE / f"{name.replace('.', '/')}.py") if i.at_start and not i.types_only
        ]
        assert not [m for m in at_start if m.partition(".")[0] in heavy], f"{name}: {at_start}"
        todo += [m.removeprefix("subspace.") for m in at_start if m.startswith("subspace.")]
        todo = [name for name in todo if name not in reached]
    assert {"cli", "verbs.train"} <= reached
