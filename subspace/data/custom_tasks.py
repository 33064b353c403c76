"""Tasks read directly from files: custom tasks, declared by a small YAML file, and suites in their published files.

A custom multiple-choice suite is two files and no code::

    title: Planets
    file: planets.jsonl                              # or .json, .csv, .parquet, ..., beside this file
    item: {choices: options, label: "'ABCD'.index(answer)"}     # Jinja, if the records' fields have other names

``subspace evaluate RUN evaluate.tasks=planets.yaml`` scores it by any protocol. The file may set everything that a file
in ``data/tasks`` may: other texts, other answer words, several splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from subspace.common.foreign.templates import compile_expression, compile_template
from subspace.data.items import Item
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
    "suite": "custom",
    "position": 1000,
    "aliases": [],
    "license": "its owner's",
    "license_source": "",
    "instruction": ARC_INSTRUCTION,
    "answer": "answer{{ label + 1 }}",
    "output": "the correct answer is {{ answer }}",
    "answer_words": [f"answer{number}" for number in range(1, 10)],
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
}


def custom_task(file: Path) -> Task:
    """Return the task that a user's YAML file declares; omitted keys default to ARC's.

    Raises:
        UserError: the file is invalid, or has the name of a declared task.
    """
    return _custom_task(file.resolve())


@cache
def _custom_task(file: Path) -> Task:
    declared = read_task_file(file)
    if file.stem in list_tasks(None):
        raise UserError(f"{file} has the name of a task that exists already. Give the file another name")
    data = declared.pop("file", None)
    if data:
        declared["splits"] = {"test": {"official": "test", "file": {"path": data}}}
    if not declared.get("splits") or not all("file" in split for split in declared["splits"].values()):
        raise UserError(f"{file} names no file of rows. Add a line 'file: NAME.jsonl', with a file beside it")
    values = {**DEFAULTS, "title": file.stem, "folder": file.parent, **declared}
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
    items: list[Item] = [task.make_item(record, n, split, file=True) for n, (_, record) in enumerate(_records(file))]
    if declared.rows and len(items) != declared.rows:
        raise UserError(f"{file} has {len(items):,} rows where {task.name}/{split} has {declared.rows:,}")
    for item in items:
        label = item["label"]
        if not isinstance(item["choices"], list) or not isinstance(label, int) or not 0 <= label < len(item["choices"]):
            raise UserError(
                f"{file}, item {item['id']}: label {label!r} of the choices {item['choices']!r}. A label counts the "
                "choices from 0; set in the YAML file's 'item:' how it follows from the record"
            )
    if not items:
        raise UserError(f"{file} has no rows")
    return items


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of a suite's file; a line that holds none is an error, as no item may be left out."""
    for record in file_records(file, nulls=True):
        if isinstance(record, BadRow):
            raise UserError(f"{record.where}: {record.reason}: {record.detail}")
        yield record
