"""Malformed files inside a run's folder, and beside it: checkpoints, partial scorings, caches; and what is no file."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from subspace.adapters.serialization import read_adapter
from subspace.common.files import read_manifest
from subspace.common.locks import in_use
from subspace.common.random_state import random_states
from subspace.config import read_config
from subspace.evaluation.resume import ResumableResults
from subspace.models.base_record import identify
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model, open_tokenizer
from subspace.reporting.facts import read_facts
from subspace.resumption import is_finished
from subspace.training.checkpoint import _manifest as sealed
from subspace.training.checkpoint import begin_checkpoint, checkpoint_path, finish_checkpoint, own_adapter
from subspace.training.resume import find_checkpoint, read_checkpoint
from tests.hostile.inputs import OTHERS, Case, Place, paths_in, replaced, spoilt, written


def cases(rng: random.Random) -> Iterator[Case]:
    """Yield the cases of this module."""
    yield from _environments()
    yield from _checkpoints(rng)
    yield from _partial_scorings(rng)
    yield from _caches(rng)
    yield from _no_files()


# What a run says of itself.

ABOUT: dict[str, Any] = {
    "run": "0123456789abcdef",
    "outcome": {"steps": 6, "loss": 1.0, "seconds": 2.0, "peak_memory": 1000},
}
READERS: dict[str, Callable[[Path], object]] = {
    "resume": lambda run: is_finished(read_config(run / "config.yaml")),
    "evaluate": own_adapter,
}


def _environments() -> Iterator[Case]:
    for reader in READERS:
        for path in (("run",), ("outcome",), *(("outcome", key) for key in ABOUT["outcome"])):
            for name in ("true", "word", "list", "mapping", "nothing", "nan", "huge", "negative"):
                harmless = (path == ("run",) and name == "word") or (path == ("outcome", "loss") and name == "negative")
                if not harmless:
                    about = replaced(ABOUT, path, OTHERS[name])
                    if path != ("run",):
                        del about["run"]  # the adapter says none
                    give = partial(_environment, reader=reader, about=about)
                    yield Case("environment", f"{reader} {'.'.join(path)} {name}", give)
    for name in OTHERS:
        yield Case("environment", f"table {name}", partial(_facts, about={"outcome": OTHERS[name]}), refused=False)


def _environment(place: Place, folder: Path, reader: str, about: Any) -> int:
    run = _run(place, folder)
    written(run / "environment.json", json.dumps(about))
    READERS[reader](run)
    return 0


def _facts(place: Place, folder: Path, about: Any) -> int:
    written(folder / "environment.json", json.dumps(about))
    read_facts(folder, {})
    return 0


def _run(place: Place, folder: Path) -> Path:
    run = folder / "runs" / "theirs"
    shutil.copytree(place.adapter, run / "adapter")
    config = {**yaml.safe_load(place.config.read_text()), "runs": str(folder / "runs"), "name": "theirs"}
    written(run / "config.yaml", yaml.safe_dump(config))
    return run


# Checkpoints, whose manifest is as it should be: whoever makes one can seal it.

FACTS: dict[str, Any] = {
    "step": 3,
    "outcome": {"steps": 3, "loss": 1.0, "best_validation": 1e9, "best_step": 0, "validations_since_best": 0},
    "config": {"method": {"name": "lora", "r": 4}, "model": {}, "data": {}, "train": {}},
    "engine": {},
    "engine_state": {"steps": 3, "skipped": 0, "schedule": 3, "loss_scale": {}},
    "optimizer": True,
    "fed": "00",
    "start": {},
    "seconds": 1.0,
    "random": [{"torch": "00"}],
    "ranks": 1,
}
UNTYPED = ("engine", "loss_scale", "start", "model", "data", "train", "random", "torch")


def _checkpoints(rng: random.Random) -> Iterator[Case]:
    for path in paths_in(FACTS):
        if UNTYPED[-1] in path or path[-1] == "r":
            continue
        for name in rng.sample(["true", "word", "list", "nothing", "huge", "negative"], 3):
            values = replaced(FACTS, path, OTHERS[name])
            right = isinstance(OTHERS[name], type(_at(FACTS, path))) and name not in ("huge", "negative")
            harmless = right or (name == "negative" and path[-1] in ("loss", "schedule", "best_validation"))
            harmless |= name == "true" and path[-1] == "optimizer"
            yield Case("checkpoint", f"{'.'.join(map(str, path))} {name}", partial(_checkpoint, facts=values),
                       refused=not harmless)  # fmt: skip
    for key in FACTS:
        values = {name: value for name, value in FACTS.items() if name != key}
        yield Case("checkpoint", f"without {key}", partial(_checkpoint, facts=values))
    for number in range(20):
        text = spoilt(json.dumps(FACTS).encode(), rng)
        yield Case("checkpoint", f"spoilt {number}", partial(_checkpoint, facts=text), refused=False)
    for name, tensors in {"no": b"", "cut": b"\x10", "text": b"x" * 1000, "zeros": bytes(4096)}.items():
        yield Case("checkpoint", f"{name} tensors", partial(_checkpoint, facts=FACTS, tensors=tensors))
    for path in (("files",), ("step",), ("run",), ("format",)):
        for name in ("true", "word", "list", "nothing", "negative", "huge"):
            yield Case("checkpoint", f"manifest {path[0]} {name}", partial(_manifest, path=path, value=OTHERS[name]),
                       refused=False)  # fmt: skip
    made: list[dict[str, Any]] = [
        {"a": 3},
        {"a": []},
        {"a": [1]},
        {"../../x": [1, "0"]},
        {"/etc/passwd": [1, "0"]},
        {"": [0, ""]},
    ]
    for files in made:
        yield Case("checkpoint", f"manifest {files}", partial(_manifest, path=("files",), value=files), refused=False)


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        tree = tree[step]
    return tree


def _written_checkpoint(place: Place, folder: Path, facts: Any, tensors: bytes) -> Path:
    run = folder / "runs" / "theirs"
    target = checkpoint_path(run, 3)
    unfinished = begin_checkpoint(target)
    shutil.copytree(place.adapter, unfinished / "adapter")
    written(unfinished / "training.json", facts if isinstance(facts, bytes) else json.dumps(facts))
    written(unfinished / "training.safetensors", tensors)
    finish_checkpoint(unfinished, target, "run")
    return run


def _checkpoint(place: Place, folder: Path, facts: Any, tensors: bytes | None = None) -> int:
    run = _written_checkpoint(place, folder, facts, save({"a": torch.ones(1)}) if tensors is None else tensors)
    found = find_checkpoint(run)
    assert found.path
    read_checkpoint(found.path, found.facts)
    return 0


def _manifest(place: Place, folder: Path, path: tuple[str], value: Any) -> int:
    run = _written_checkpoint(place, folder, {**FACTS, "random": [random_states()]}, save({"a": torch.ones(1)}))
    file = checkpoint_path(run, 3) / "manifest.json"
    content = json.loads(file.read_text())
    del content["seal"]
    written(file, sealed(replaced(content, path, value)))
    found = find_checkpoint(run)
    assert (found.path is None) == bool(found.notices)  # it is put aside, and told
    return 0


# Partial scorings, which are read again where their key fits; what makes no sense there is passed over.


def _partial_scorings(rng: random.Random) -> Iterator[Case]:
    heads: list[Any] = [3, [], {}, {"key": "k"}, *({"key": "k", "budget": value} for value in OTHERS.values())]
    lines = [3, [], [0], [0, 3], [0, {}], ["0", {}], [True, {}], [-1, {}], [10**30, {}], {"0": {}}]
    given = [*((head, [0, {}]) for head in heads), *(({"key": "k", "budget": 9}, line) for line in lines)]
    for number, (head, line) in enumerate(given):
        text = f"{json.dumps(head)}\n{json.dumps(line)}\n"
        yield Case("partial", f"{number}", partial(_partial, data=text.encode()), refused=False)
    for number in range(10):
        data = spoilt(b'{"key": "k", "budget": 9}\n[0, {"id": "a"}]\n', rng)
        yield Case("partial", f"spoilt {number}", partial(_partial, data=data), refused=False)


def _partial(place: Place, folder: Path, data: bytes) -> int:
    file = folder / "scored" / "boolq.jsonl"
    written(file.with_name("boolq.jsonl.partial-0"), data)
    with ResumableResults(file, "k", None, 64, lambda number, record: bool(number == 0 and record)) as found:
        assert found.budget >= 1
        assert found.records.keys() <= {0}
        found.remove()
    return 0


# Caches.


def _caches(rng: random.Random) -> Iterator[Case]:
    good = {"files": {"a": [1, "0" * 64]}, "version": 1}
    texts = [json.dumps(replaced(good, ("files",), value)).encode() for value in OTHERS.values()]
    texts += [b"", b"[]", b"3", b"[" * 100_000, b"\xff", b'{"files": {"a": 3}}', b'{"files": {"../a": [1, "0"]}}']
    for number, text in enumerate([*texts, *(spoilt(json.dumps(good).encode(), rng) for _ in range(10))]):
        yield Case("cache", f"manifest {number}", partial(_cached, data=text), refused=False)


def _cached(place: Place, folder: Path, data: bytes) -> int:
    written(folder / "a", "x")
    written(folder / "prepared.json", data)
    read_manifest(folder, thorough=True)
    return 0


# What is no file: a pipe would be waited for, a device never ends.


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.mkdir()


KINDS = {"a pipe": _pipe, "a device": _device, "a folder": _folder}
OF_RUNS: dict[str, Callable[[Path], object]] = {
    "environment.json": own_adapter,
    "config.yaml": lambda run: read_config(run / "config.yaml"),
    "adapter/adapter.json": lambda run: read_adapter(run / "adapter"),
    "adapter/adapter.safetensors": lambda run: read_adapter(run / "adapter"),
}
OF_MODELS = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "chat_template.jinja",
             "model.safetensors.index.json", "generation_config.json", "special_tokens_map.json")  # fmt: skip
#: Files without which a model can be opened.
OPTIONAL = ("chat_template.jinja", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json",
            "model.safetensors.index.json")  # fmt: skip


def _no_files() -> Iterator[Case]:
    for kind in KINDS:
        for file in OF_RUNS:
            yield Case("no file", f"{file} {kind}", partial(_no_file_of_run, file=file, kind=kind))
        for file in OF_MODELS:
            give = partial(_no_file_of_model, file=file, kind=kind)
            yield Case("no file", f"{file} {kind}", give, refused=file not in OPTIONAL)
        for file in ("manifest.json", "training.json", "training.safetensors"):
            give = partial(_no_file_of_checkpoint, file=file, kind=kind)
            yield Case("no file", f"{file} {kind}", give, refused=False)
        for file in (".in-use.json", ".lock"):
            yield Case("no file", f"{file} {kind}", partial(_no_lock, file=file, kind=kind), refused=False)
        yield Case("no file", f"partial scoring {kind}", partial(_no_partial, kind=kind), refused=False)


def _no_file_of_run(place: Place, folder: Path, file: str, kind: str) -> int:
    run = _run(place, folder)
    written(run / "environment.json", json.dumps(ABOUT))
    _put(run / file, kind)
    OF_RUNS[file](run)
    return 0


def _no_file_of_model(place: Place, folder: Path, file: str, kind: str) -> int:
    copy = Path(shutil.copytree(place.model, folder / "model"))
    _put(copy / file, kind)
    config = ModelConfig(path=str(copy), dtype="float32")
    open_tokenizer(config)
    open_model(config)
    identify(config)
    return 0


def _no_file_of_checkpoint(place: Place, folder: Path, file: str, kind: str) -> int:
    run = _written_checkpoint(place, folder, FACTS, save({"a": torch.ones(1)}))
    _put(checkpoint_path(run, 3) / file, kind)
    assert find_checkpoint(run).path is None
    return 0


def _no_lock(place: Place, folder: Path, file: str, kind: str) -> int:
    run = _run(place, folder)
    _put(run / file, kind)
    try:
        with in_use(run):
            return 0
    finally:
        _take_away(run / file)


def _no_partial(place: Place, folder: Path, kind: str) -> int:
    file = folder / "scored" / "boolq.jsonl"
    file.parent.mkdir(parents=True)
    _put(file.with_name("boolq.jsonl.partial-1"), kind)
    try:
        with ResumableResults(file, "k", None, 64, lambda number, record: True):
            return 0
    finally:
        for left in file.parent.iterdir():
            _take_away(left)


def _take_away(path: Path) -> None:
    """Remove what a case has put there, which the product is right to leave."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _put(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    KINDS[kind](path)
