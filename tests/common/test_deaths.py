"""Whatever operation a writer dies at, the old or the new is there, whole; and the next one cleans up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from subspace.adapters.inject import inject
from subspace.adapters.serialization import read_adapter, save_adapter
from subspace.common import files
from subspace.common.declarations import write_yaml
from subspace.common.files import build_dir_atomically, read_manifest, write_file, write_folder, write_json
from subspace.common.foreign.yaml_files import read_yaml
from subspace.evaluation.results import (
    TaskResult,
    accuracy,
    items_file,
    read_items,
    read_results,
    write_items,
    write_results,
)
from subspace.training.checkpoint import (
    begin_checkpoint,
    checkpoint_path,
    find_newest,
    finish_checkpoint,
    prune_checkpoints,
)
from tests.helpers.deaths import each_death


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no disk: thousands of flushes take most of a minute, and a death is none of the power."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


OLD, NEW = "old" * 20, "new" * 30


@dataclass
class Writer:
    """A writer: what it writes, and how that is read again; both take the folder that it works in."""

    write: Callable[[Path, str], object]
    read: Callable[[Path], Any]


def write_a_folder(root: Path, what: str) -> None:
    with write_folder(root / "folder") as work:
        (work / "inner").mkdir()
        for name in ("a", "inner/b"):
            (work / name).write_bytes(what.encode())


def read_a_folder(root: Path) -> str:
    files.settle_folder(root / "folder")
    (text,) = {(root / "folder" / name).read_text() for name in ("a", "inner/b")}
    return text


def build_a_cache(root: Path, what: str) -> None:
    def build(work: Path) -> dict[str, Any]:
        (work / "rows").write_bytes(what.encode())
        return {"what": what}

    def is_good(folder: Path) -> bool:
        return (read_manifest(folder, thorough=True) or {}).get("what") == what

    build_dir_atomically(root / "cache", is_good, build)


def read_a_cache(root: Path) -> str:
    files.settle_folder(root / "cache")
    facts = read_manifest(root / "cache", thorough=True)
    assert facts is not None
    return str(facts["what"])


def save_a_checkpoint(root: Path, what: str) -> None:
    target = checkpoint_path(root, 1 if what == OLD else 2)
    work = begin_checkpoint(target)
    (work / "training.json").write_bytes(what.encode())
    finish_checkpoint(work, target, run="ab")
    prune_checkpoints(root, 1, run="ab")


def read_a_checkpoint(root: Path) -> str:
    path, passed_over = find_newest(root, run="ab")
    assert path is not None
    assert passed_over == []
    return (path / "training.json").read_text()


def result(what: str, folder: Path) -> TaskResult:
    return TaskResult(
        model=what, adapter="", dtype="float32", protocol="likelihood", task="boolq",
        metrics={"acc": accuracy([True, False])}, n=2, majority=0.5, truncated=0, seconds=0.0,
        fingerprint_fields={"task version": "1"}, items=items_file(folder, "likelihood", "boolq"), subject=what,
    )  # fmt: skip


def write_a_file_of_items(root: Path, what: str) -> None:
    records: list[Any] = [{"id": what, "correct": {"acc": n == 0}} for n in range(2)]
    write_items(items_file(root, "likelihood", "boolq"), records)


def read_a_file_of_items(root: Path) -> str:
    (name,) = {record["id"] for record in read_items(items_file(root, "likelihood", "boolq"))}
    return name


@cache
def model() -> nn.Module:
    layers = nn.Sequential(nn.Linear(4, 4))
    inject(layers, "lora", {"r": 2}, targets=["0"])
    return layers


def save_an_adapter(root: Path, what: str) -> None:
    save_adapter(model(), root / "adapter", what=what)


def read_an_adapter(root: Path) -> str:
    return str(read_adapter(root / "adapter")[0]["about"]["what"])


WRITERS = {
    "text": Writer(lambda root, what: write_file(root / "file", what), lambda root: (root / "file").read_text()),
    "by a library": Writer(
        lambda root, what: write_file(root / "file", lambda path: path.write_bytes(what.encode())),
        lambda root: (root / "file").read_text(),
    ),
    "json": Writer(
        lambda root, what: write_json(root / "file", [what]), lambda root: json.loads((root / "file").read_text())[0]
    ),
    "yaml": Writer(
        lambda root, what: write_yaml(root / "file", {"what": what}), lambda root: read_yaml(root / "file")["what"]
    ),
    "folder": Writer(write_a_folder, read_a_folder),
    "cache": Writer(build_a_cache, read_a_cache),
    "checkpoint": Writer(save_a_checkpoint, read_a_checkpoint),
    "items": Writer(write_a_file_of_items, read_a_file_of_items),
    "results": Writer(
        lambda root, what: write_results(root, [result(what, root)]), lambda root: read_results(root)[0].model
    ),
    "adapter": Writer(save_an_adapter, read_an_adapter),
}
#: Those that replace a folder, which a file system may be unable to do in one operation.
FOLDERS = ["folder", "cache", "adapter"]


def left(root: Path) -> list[str]:
    """Return what is below a folder, besides locks."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.suffix != ".lock")


def check(name: str, root: Path) -> None:
    writer = WRITERS[name]
    outcomes = []
    clean = None
    for number in each_death(root, lambda: writer.write(root, NEW), lambda: writer.write(root, OLD)):
        outcomes.append(writer.read(root))
        assert outcomes[-1] in (OLD, NEW), f"after a death at operation {number}"
        writer.write(root, NEW)  # by the next process
        assert writer.read(root) == NEW
        clean = clean or left(root)
        assert left(root) == clean, f"after a death at operation {number}"
    assert set(outcomes) == {OLD, NEW}  # it died before the new one was there, and after
    assert outcomes == sorted(outcomes, key=[OLD, NEW].index)
    assert not any("partial" in path or path.endswith(".new") for path in clean or ["partial"])


@pytest.mark.parametrize("name", WRITERS)
def test_a_death_at_any_operation_leaves_the_old_or_the_new(name: str, tmp_path: Path) -> None:
    check(name, tmp_path / "root")


@pytest.mark.parametrize("name", FOLDERS)
def test_so_does_one_where_folders_cannot_be_exchanged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange_names", lambda one, other: False)
    check(name, tmp_path / "root")


@pytest.mark.parametrize("name", WRITERS)
def test_a_death_at_any_operation_of_the_first_writing_leaves_nothing_or_the_whole(name: str, tmp_path: Path) -> None:
    writer, root, outcomes = WRITERS[name], tmp_path / "root", []
    for number in each_death(root, lambda: writer.write(root, NEW), lambda: None):
        try:
            outcomes.append(writer.read(root))
        except Exception:  # of each writer's own kind: there is nothing to read
            outcomes.append("")
        assert outcomes[-1] in ("", NEW), f"after a death at operation {number}"
        writer.write(root, NEW)
        assert writer.read(root) == NEW
    assert outcomes[0] == ""
    assert outcomes[-1] == NEW
