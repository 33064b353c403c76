"""Names that other libraries keep for themselves are used in their compat file alone, where canaries watch them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from subspace.common.paths import PACKAGE

#: Internals of DeepSpeed and transformers that no underscore marks, or that are named in strings.
UNMARKED = {
    "_attn_implementation",
    "averaged_gradients",
    "bit16_groups",
    "convert_to_zero_parameters",
    "ds_id",
    "ds_numel",
    "ds_shape",
    "ds_status",
    "ds_tensor",
    "fp16_groups",
    "fp32_partitioned_groups_flat",
    "grad_position",
    "single_partition_of_fp32_groups",
    "skipped_steps",
}
#: Documented in spite of their underscore.
PUBLIC = {"_asdict", "_fields", "_replace", "_exit", "_current_frames", "_get_frame"}
#: Of torch, which has no compat file: each where nothing public does the same.
ALLOWED = {
    "_base",
    "_cdata",
    "_C",
    "_current_graph_task_id",
    "_foreach_copy_",
    "_foreach_mul_",
    "_foreach_norm",
    "_is_in_bad_fork",
    "_is_view",
    "_make_wrapper_subclass",
    "_non_persistent_buffers_set",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_softmax_backward_data",
    "_unflatten_dense_tensors",
    "torch._utils",
    "torch.utils._python_dispatch",
    "torch.utils._pytree",
}
TREES = {file: ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def own_names() -> set[str]:
    """Return every name that this package defines, as a function, a class, a variable or an attribute of an object."""
    found: set[str] = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                    found.add(name)
                case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                    found.add(name)
    return found


def foreign_internals(tree: ast.AST, own: set[str]) -> Iterator[tuple[int, str]]:
    """Find what a file uses of others' internals: attributes, imported names and modules, names in strings."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if name in UNMARKED or (is_private(name) and name not in own | PUBLIC):
                yield node.lineno, name
            case ast.ImportFrom(module=str(module), names=names) if not module.startswith(("subspace", "__future__")):
                if any(map(is_private, module.split("."))):
                    yield node.lineno, module
                yield from ((node.lineno, alias.name) for alias in names if is_private(alias.name))
            case ast.Constant(value=str(name)) if name in UNMARKED:
                yield node.lineno, name


def used(file: Path, own: set[str]) -> list[str]:
    place = file.relative_to(PACKAGE).as_posix()
    return [f"{place}:{line}: {name}" for line, name in foreign_internals(TREES[file], own) if name not in ALLOWED]


def test_others_internals_are_used_in_compat_files_alone() -> None:
    own = own_names()
    assert [place for file in TREES if not file.stem.endswith("_compat") for place in used(file, own)] == []


def test_what_is_looked_for_is_found() -> None:
    lines = ["parameter.ds_tensor", "getattr(config, '_attn_implementation')", "torch._C", "from torch._x import y"]
    own = own_names()
    assert [len(list(foreign_internals(ast.parse(line), own))) for line in lines] == [1] * 4
    assert not list(foreign_internals(ast.parse("self.x\ntorch.nn\nfrom subspace._x import y"), own))


def test_every_allowed_internal_is_used() -> None:
    own = own_names()
    found = {name for tree in TREES.values() for _, name in foreign_internals(tree, own)}
    assert sorted(ALLOWED - found) == []
