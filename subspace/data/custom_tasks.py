"""Tasks whose rows are read as they are: a user's own, from a small YAML file, and suites from their published files.

A multiple-choice suite of one's own is two files and no code::

    title: Planets
    file: planets.jsonl                              # .json, .jsonl or .parquet, beside this file
    item: {choices: options, label: "'ABCD'.index(answer)"}     # Jinja, where the records' fields are called otherwise

It is scored by ``subspace evaluate RUN evaluate.tasks=planets.yaml``, by every protocol. All that a file in
``data/tasks`` may say, this one may too: other texts, other answer words, several splits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from subspace.common.declarations import read_yaml
from subspace.data.items import Item
from subspace.data.records import records
from subspace.data.tasks import Task, build_task, list_tasks
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
    """Return the task that a file of one's own declares; what it leaves out is as in ARC."""
    return _custom_task(file.resolve())


@cache
def _custom_task(file: Path) -> Task:
    given = read_yaml(file)
    if file.stem in list_tasks(None):
        raise UserError(f"{file} is called as a task that is there already. Give the file another name")
    data = given.pop("file", None)
    if data:
        given["splits"] = {"test": {"official": "test", "file": {"path": data}}}
    if not given.get("splits") or not all("file" in split for split in given["splits"].values()):
        raise UserError(f"{file} should say where its rows lie: a line 'file: NAME.jsonl', beside it")
    values = {**DEFAULTS, "title": file.stem, "folder": file.parent, **given}
    values["item"] = {**ITEM, **given.get("item", {})}
    values["likelihood"] = {**LIKELIHOOD, **given.get("likelihood", {})}
    return build_task(file, values)


def read_local_items(task: Task, split: str, folder: str | None) -> list[Item]:
    """Return a split's items from its file: beside a custom task's, or in a folder of published files, if one is given.

    Nothing where the task's rows are to come from ``subspace prepare``.
    """
    place = task.folder or (Path(folder) if folder else None)
    if task.folder and split not in task.splits:
        raise UserError(f"{task.name} has no split {split!r}. {nearest(split, task.splits)}")
    declared = task.splits.get(split)
    if place is None or declared is None or declared.file is None:
        return []
    file = place / declared.file.path
    if not file.is_file():
        raise UserError(f"{task.name}/{split} was to be read from {file}, which is not there")
    items: list[Item] = [task.make_item(record, n, split, file=True) for n, (_, record) in enumerate(records(file))]
    if declared.rows and len(items) != declared.rows:
        raise UserError(f"{file} has {len(items):,} rows where {task.name}/{split} has {declared.rows:,}")
    for item in items:
        label = item["label"]
        if not isinstance(item["choices"], list) or not isinstance(label, int) or not 0 <= label < len(item["choices"]):
            raise UserError(
                f"{file}, item {item['id']}: label {label!r} of the choices {item['choices']!r}. A label counts the "
                "choices from 0; say in the YAML file's 'item:' how it comes from the record"
            )
    if not items:
        raise UserError(f"{file} has no rows")
    return items
