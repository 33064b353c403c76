"""Tasks read directly from files: custom tasks, declared by a small YAML file, and suites in their published files.

A custom multiple-choice suite is two files and no code::

    title: Planets
    file: planets.jsonl                              # or .json, .csv, .parquet, ..., beside this file
    item: {choices: options, label: "'ABCD'.index(answer)"}     # Jinja, if the records' fields have other names

``subspace evaluate RUN evaluate.tasks=planets.yaml`` scores it by any protocol. The file may set everything that a file
in ``data/tasks`` may: other texts, other answer words, several splits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from subspace.common.foreign.templates import compile_expression, compile_template
from subspace.common.paths import find_resource
from subspace.data.items import Item, make_item, relabel
from subspace.data.rows import BadRow
from subspace.data.sources.files import file_records
from subspace.data.tasks import Task, build_task, list_tasks, read_task_file
from subspace.errors import UserError, nearest

ARC_INSTRUCTION = (
    "Please choose the correct answer to the question: {% if context %}{{ context }} {% endif %}{{ question }}\n\n"
    "{% for choice in choices %}Answer{{ loop.index }}: {{ choice }}{{ '' if loop.last else ' ' }}{% endfor %}\n\n"
    "Answer format: {% for choice in choices %}answer{{ loop.index }}{{ '' if loop.last else '/' }}{% endfor %}"
)

DEFAULTS: dict[str, Any] = {
    "position": 1000,
    "aliases": [],
    "license": "its owner's",
    "license_source": "",
    "instruction": ARC_INSTRUCTION,
    "answer": "answer{{ label + 1 }}",
    "output": "the correct answer is {{ answer }}",
    "answer_words": [],  # by the answers of the items
}
ITEM = {
    "id": "'%s-%d'|format(official, number)",
    "question": "question",
    "choices": "choices",
    "label": "label",
}
LIKELIHOOD = {
    "metrics": ["acc", "acc_norm"],
    "context": "{% if context %}{{ context }}\n{% endif %}Question: {{ question }}\nAnswer:",
    "choice": "{{ choice }}",
    "separator": None,
}
MOST_ANSWERS = 50  # different ones, beyond which they are texts and not words


def custom_task(file: Path) -> Task:
    """Return the task that a user's YAML file declares; omitted keys default to ARC's.

    Raises:
        UserError: the file is invalid, or has the name of a declared task.
    """
    file = (file if file.exists() else find_resource(file) or file).resolve()
    declared = read_task_file(file)
    if file.stem in list_tasks(None):
        raise UserError(f"{file} has the name of a task that exists already. Give the file another name")
    data = declared.pop("file", None)
    if data:
        declared["splits"] = {"test": {"official": "test", "file": {"path": data}}}
    if not declared.get("splits") or not all("file" in split for split in declared["splits"].values()):
        raise UserError(f"{file} names no file of rows. Add a line 'file: NAME.jsonl', with a file beside it")
    if declared.get("suite") in [task.suite for task in list_tasks(None).values()]:
        raise UserError(
            f"{file} says that it belongs to suite {declared['suite']!r}, which has its own tasks. Name another"
        )
    # A mean is taken over a suite, so a task that names none is one of its own.
    values = {**DEFAULTS, "title": file.stem, "suite": file.stem, "folder": file.parent, **declared}
    values["item"] = {**ITEM, **declared.get("item", {})}
    values["likelihood"] = {**LIKELIHOOD, **declared.get("likelihood", {})}
    task = build_task(file, values)
    _check_templates(task, str(file))
    return task


def _check_templates(task: Task, where: str) -> None:
    """Raise UserError that names the key of a template or an expression that cannot be understood."""
    expressions = {f"item.{name}": text for name, text in task.item.items()}
    for name, split in task.splits.items():
        expressions |= {f"splits.{name}.where": split.where} if split.where else {}
        for key, of in (("file", split.file), ("pypi", split.pypi)):
            own = of.item.items() if of else ()
            expressions |= {f"splits.{name}.{key}.item.{field}": text for field, text in own}
    texts = {name: getattr(task, f"{name}_template") for name in ("instruction", "answer", "output")}
    texts |= {f"likelihood.{name}": getattr(task.likelihood, name) for name in ("context", "choice")}
    for compiled, sources in ((compile_expression, expressions), (compile_template, texts)):
        for key, source in sources.items():
            try:
                compiled(source)
            except UserError as error:
                raise UserError(f"{where}: {key}: {error}") from None


def read_local_items(task: Task, split: str, folder: str | None) -> list[Item]:
    """Return a split's items from its file: beside a custom task's YAML file, or in ``folder`` of published files.

    The list is empty if the task's rows come from ``subspace prepare``.

    Raises:
        UserError: the split or its file is missing, or its rows are invalid.
    """
    base = task.folder or (Path(folder) if folder else None)
    if task.folder and split not in task.splits:
        raise UserError(f"{task.name} has no split {split!r}. {nearest(split, task.splits)}")
    declared = task.splits.get(split)
    if base is None or declared is None or declared.file is None:
        return []
    file = base / declared.file.path
    if not file.is_file():
        raise UserError(f"{task.name}/{split} was to be read from {file}, which does not exist")
    items = [
        _checked(task.make_item(record, number, split, file=True), where)
        for number, (where, record) in enumerate(_records(file))
        if task.selects(record, number, split)
    ]
    if declared.rows and len(items) != declared.rows:
        raise UserError(f"{file} has {len(items):,} rows where {task.name}/{split} has {declared.rows:,}")
    if not items:
        raise UserError(f"{file} has no rows" + (f" for which {declared.where}" if declared.where else ""))
    return items


def with_answer_words(task: Task, items: Sequence[Item]) -> Task:
    """Return a task with the words that a model may answer all items of its split with, unless it declares some."""
    if task.answer_words or task.extraction != "first-word":
        return task
    if task.answer_template == DEFAULTS["answer"]:
        most = max(len(item["choices"]) for item in items)
        return replace(task, answer_words=tuple(f"answer{number}" for number in range(1, max(most, 9) + 1)))
    words: dict[str, None] = {}
    for item in items:
        words |= dict.fromkeys(task.answer(relabel(item, label)) for label in range(len(item["choices"])))
        if len(words) > MOST_ANSWERS:
            return task
    return replace(task, answer_words=tuple(words))


def _checked(item: Item, where: str) -> Item:
    """Return an item whose texts are texts; raise UserError where that cannot be."""
    cure = "Set in the YAML file's 'item:' how it follows from the record"
    values: dict[str, Any] = {**item}
    for field in ("id", "topic", "context", "question"):
        optional = field in ("topic", "context")
        values[field] = "" if optional and values[field] is None else _text(values[field])
        if values[field] is None:
            raise UserError(f"{where}: {field} is {item[field]!r}, which is no text. {cure}")
    choices, label = values["choices"], values["label"]
    if not isinstance(choices, list | tuple) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise UserError(
            f"{where}, item {values['id']}: label {label!r} of the choices {choices!r}. A label counts the choices "
            f"from 0. {cure}"
        )
    values["choices"], values["label"] = [_text(choice) for choice in choices], int(label)
    if None in values["choices"]:
        raise UserError(f"{where}, item {values['id']}: one of the choices {choices!r} is no text. {cure}")
    return make_item(values)


def _text(value: Any) -> str | None:
    """Return a text, also of a number or a truth value; None for what is neither, such as null."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)) else None


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of a suite's file; a line that holds none is an error, as no item may be left out."""
    for record in file_records(file, nulls=True):
        if isinstance(record, BadRow):
            raise UserError(f"{record.where}: {record.reason}: {record.detail}")
        yield record
