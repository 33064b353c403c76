"""What a text of ``data.mixture`` names: a file, files by a pattern, a folder, a data set saved to disk or on the hub.

Which files belong to which configuration and split of a folder or of a data set on the hub is found by ``datasets``, as
``load_dataset`` finds it; the files are then read one by one, so that every row has a file and a line.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from subspace.common.download import HubFiles, hub_data_files
from subspace.common.files import file_sha256
from subspace.common.hashing import hash_json
from subspace.common.paths import find_resource
from subspace.data.rows import BadRow, Row
from subspace.data.sources.files import WHAT_IS_READ, file_kind, file_records, without_nulls
from subspace.data.sources.shapes import Seen, check_columns, read_row
from subspace.data.sources.tables import batch_records
from subspace.errors import UserError, nearest

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what ``save_to_disk`` writes
CARD = "README.md"  # may declare the configurations and splits of a folder
ABOUT = {CARD, SAVED, SAVED_SPLITS, "config.json", "dataset_info.json", "dataset_infos.json"}  # no data
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.+-]+))?(?:@(?P<revision>[\w./-]+))?")
_PATTERN = re.compile(r"[*?\[]")
_SPLIT = re.compile(r"(?P<name>.*[^\[\]])\[(?P<split>[\w.-]+)\]")


class DataFile(NamedTuple):
    """A file of a source, and its name in places and errors. ``path`` may be a folder that ``save_to_disk`` wrote."""

    path: Path
    shown: str


@dataclass(frozen=True)
class Source:
    """Rows of a user's own: ``files`` in their order, and what the user is told about them (``notices``).

    ``commit`` is that of a data set on the hub.
    """

    name: str
    files: tuple[DataFile, ...]
    columns: Mapping[str, str | None] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    commit: str = ""

    @property
    def short_name(self) -> str:
        """The end of the name, for a folder of the cache."""
        return self.name.rstrip("/").rpartition("/")[2][-40:] or "rows"

    @property
    def record(self) -> dict[str, Any]:
        """What a run keeps on record about the data: the number of files, a checksum of all, and the commit."""
        return {"files": len(self.files), "sha256": hash_json(self.fingerprint), "commit": self.commit or None}

    @cached_property
    def fingerprint(self) -> tuple[str, ...]:
        """All that determines the rows: the names and bytes of the files, and the columns."""
        columns = [f"{ours}={theirs}" for ours, theirs in sorted(self.columns.items())]
        return tuple(f"{Path(file.shown).name}={_checksum(file.path)}" for file in self.files) + tuple(columns)

    def records(self) -> Iterator[tuple[str, dict[str, Any]] | BadRow]:
        """Yield the records as the files have them, each with its place."""
        for file in self.files:
            yield from _saved_records(file) if file.path.is_dir() else file_records(*file)

    def rows(self, seen: Seen | None = None) -> Iterator[Row | BadRow]:
        """Yield the rows in their order, and what cannot be read as one; count keys and shapes in ``seen``.

        Raises:
            UserError: a file is damaged; there are no rows; or no row has a column of ``data.columns``.
        """
        seen = Seen() if seen is None else seen
        for record in self.records():
            if isinstance(record, BadRow):
                seen.rows += 1
                yield record
            else:
                yield read_row(*record, self.columns, seen)
        if not seen.rows:
            raise UserError(f"{self.name} has no rows")
        absent = [theirs for theirs in self.columns.values() if theirs is not None and theirs not in seen.keys]
        if absent and seen.keys:
            raise UserError(f"data.columns: no row of {self.name} has '{absent[0]}'. {nearest(absent[0], seen.keys)}")


def _checksum(path: Path) -> str:
    if path.is_dir():
        return " ".join(f"{file.name}={file_sha256(file)}" for file in sorted(path.iterdir()) if file.is_file())
    return file_sha256(path)


def _saved_records(file: DataFile) -> Iterator[tuple[str, dict[str, Any]] | BadRow]:
    """Yield the records of a folder that ``save_to_disk`` wrote."""
    import datasets

    try:
        table = datasets.load_from_disk(str(file.path)).with_format("arrow")
        batches = (batch for part in table.iter(batch_size=1000) for batch in part.to_batches())
        for record in batch_records(table.features.arrow_schema, batches):
            assert not isinstance(record, BadRow)
            yield f"{file.shown}, {record[0]}", without_nulls(record[1])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file.shown} was saved by 'save_to_disk' and cannot be loaded: {error}") from None


# Texts.


class HubName(NamedTuple):
    """Name of a data set on the hub: ``org/name:config@revision``."""

    repo: str
    config: str | None
    revision: str | None


def hub_name(text: str) -> HubName | None:
    """Return the parts of a text that has the form of a name on the hub and not of a path; None if it has not."""
    match = _HUB.fullmatch(text)
    if not match or text.startswith((".", "~", "/")) or file_kind(match["repo"]):
        return None
    return HubName(match["repo"], match["config"], match["revision"])


def split_of(text: str) -> tuple[str, str | None]:
    """Return a text without the split in brackets at its end, and the split: of ``org/name[test]``, say."""
    match = _SPLIT.fullmatch(text)
    return (match["name"], match["split"]) if match and not _matches(text) else (text, None)


def is_here(text: str) -> bool:
    """Return True if a text is the path of a file or folder, or a pattern that some match."""
    return bool(text) and bool(_matches(text))


def looks_like_data(text: str) -> bool:
    """Return True if a text can only mean data of the user's own: a path that is there, or the form of one."""
    name = split_of(text)[0]
    is_path = name.startswith(("~", "./", "../", "/")) or file_kind(name) is not None
    return is_here(name) or is_path or hub_name(name) is not None


def find_source(text: str, columns: Mapping[str, str | None] | None = None, split: str | None = None) -> Source:
    """Return the source that a text names.

    Args:
        text: a path, with ``~`` and the pattern characters ``*?[]``; or ``org/name:config@revision`` on the hub. Either
            may end in a split, as ``[test]``.
        columns: ``data.columns``: for names of this project the file's own; None for a key that is left out.
        split: the split where the text names none; by default ``train``, or the only one.

    Raises:
        UserError: nothing is there, or nothing that is read; or the configuration, split or revision is unknown.
    """
    check_columns(columns or {})
    name, given = split_of(text)
    split = given or split
    found, commit = _matches(name), ""
    if found:
        files, notices = _local(found, name, split)
    elif hub := hub_name(name):
        try:
            files, notices, commit = _from_hub(hub, split)
        except UserError as error:
            if not Path(name).parent.is_dir():
                raise
            raise UserError(f"no file or folder {name} is here; and {error}") from None
    else:
        raise UserError(_not_there(name))
    return Source(text, tuple(files), columns or {}, tuple(notices), commit)


def _matches(text: str) -> list[Path]:
    """Return the paths that a text names, one if it is a path itself."""
    try:
        path = Path(text).expanduser()
        if path.exists():
            return [path]
        if own := find_resource(text):
            return [own]
    except (OSError, RuntimeError):  # no file is called so: too long a name, or a user that there is not
        return []
    if not _PATTERN.search(text):
        return []
    root = Path(path.anchor)
    found = root.glob(str(path.relative_to(path.anchor)) if path.anchor else str(path))
    return sorted(match for match in found if not match.name.startswith("."))


def _not_there(text: str) -> str:
    path = Path(text).expanduser()
    beside = [file.name for file in path.parent.glob("*") if file_kind(file.name)] if path.parent.is_dir() else []
    hint = nearest(path.name, beside) if beside else f"No data file lies in {path.parent}. {WHAT_IS_READ}"
    return f"the data file {text} is not there. {hint}"


# Files and folders.

Found = tuple[list[DataFile], list[str]]


def _local(paths: list[Path], text: str, split: str | None) -> Found:
    """Return the data files that paths name, and notices."""
    files: list[DataFile] = []
    notices: list[str] = []
    others = []
    for path in paths:
        if path.is_dir():
            more, told = _folder(path, split)
            files, notices = files + more, notices + told
        elif file_kind(path.name):
            files.append(DataFile(path, str(path)))
        else:
            others.append(path.name)
    if not files:
        raise UserError(f"{text} is no data file of a kind that is read. {WHAT_IS_READ}")
    if others:
        notices.append(f"{text}: {len(others)} files of other kinds are not read: {', '.join(others[:3])}")
    return files, notices


def _folder(folder: Path, split: str | None) -> Found:
    """Return the data files of a folder's split, and notices."""
    if (folder / SAVED).is_file():
        return [DataFile(folder, str(folder))], []
    if (folder / SAVED_SPLITS).is_file():
        splits = {path.parent.name: [DataFile(path.parent, str(path.parent))] for path in folder.glob(f"*/{SAVED}")}
    else:
        splits = _folder_splits(folder)
    files, notices = _choose(splits, split, str(folder))
    if not (folder / SAVED_SPLITS).is_file():
        listed = {file.path.resolve() for files in splits.values() for file in files}
        inside = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.resolve() not in listed)
        left = [path.name for path in inside if path.name not in ABOUT and not path.name.startswith((".", "_"))]
        if left:
            notices.append(f"{folder}: {len(left):,} other files are not read: {', '.join(left[:3])}")
    return files, notices


def _folder_splits(folder: Path) -> dict[str, list[DataFile]]:
    """Return the data files of each split of a folder."""
    root = folder.resolve()
    if (folder / CARD).is_file():
        named = _splits(folder, None, str(folder))
        return {
            split: [DataFile(path, str(folder / path.relative_to(root))) for path in paths]
            for split, paths in named.items()
        }
    # ``datasets`` reads files of one kind only. A layout in which all have the same leaves it the splits.
    inside = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() and file_kind(path.name))
    known = [path for path in inside if path.name not in ABOUT and not any(part[0] in "._" for part in path.parts)]
    with tempfile.TemporaryDirectory() as work:
        layout = Path(work).resolve() / folder.resolve().name
        layout.mkdir()
        for path in known:
            same = layout / f"{path}.json"
            same.parent.mkdir(parents=True, exist_ok=True)
            same.touch()
        named = _splits(layout, None, str(folder))
        found = {
            split: [folder / path.relative_to(layout).with_suffix("") for path in paths]
            for split, paths in named.items()
        }
    return {split: [DataFile(path, str(path)) for path in paths] for split, paths in found.items()}


def _choose(splits: Mapping[str, list[DataFile]], split: str | None, name: str) -> Found:
    """Return the files of the wanted split, and a notice about splits that are left out."""
    wanted = split or "train"
    if wanted not in splits and split is None and len(splits) == 1:
        wanted = next(iter(splits))
    if wanted not in splits:
        raise UserError(f"{name} has no split '{wanted}': write {name}[SPLIT]. {nearest(wanted, splits)}")
    others = ", ".join(other for other in splits if other != wanted)
    return splits[wanted], [f"{name}: the split {wanted} is trained on, and not {others}"] if others else []


def _splits(folder: Path, config: str | None, name: str) -> dict[str, list[Path]]:
    """Return the data files of each split of a folder with the layout of a data set on the hub."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:  # where a builder leaves an empty folder
        try:
            builder = datasets.load_dataset_builder(str(folder.resolve()), config, cache_dir=cache)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            # Of the two sentences about configurations, both list them.
            if listed := re.search(r"(?:Available|available configs): \[([^\]]*)\]", str(error)):
                configs = re.findall(r"'([^']+)'", listed[1])
                asked = f"has no configuration '{config}'" if config else "has several configurations"
                hint = nearest(config or "", configs)
                raise UserError(f"{name} {asked}: write {name.partition(':')[0]}:CONFIG. {hint}") from None
            raise UserError(f"{name} holds no data file of a kind that is read. {WHAT_IS_READ}") from None
        files = builder.config.data_files or {}
        named = {str(split): [Path(file) for file in paths] for split, paths in files.items()}
    unread = [path.name for paths in named.values() for path in paths if not file_kind(path.name)]
    if unread:
        raise UserError(f"{name} holds {unread[0]}, which is no data file of a kind that is read. {WHAT_IS_READ}")
    return named


# The hub.


def _from_hub(wanted: HubName, split: str | None) -> tuple[list[DataFile], list[str], str]:
    """Return the files of a split of a data set on the hub, downloaded unless they are here, notices, the commit."""
    name = wanted.repo + (f":{wanted.config}" if wanted.config else "")

    def choose(files: HubFiles) -> list[str]:
        # The layout alone says which files belong to the split: no other is downloaded.
        with tempfile.TemporaryDirectory() as work:
            layout = Path(work) / wanted.repo.rpartition("/")[2]
            for file in files.names:
                (layout / file).parent.mkdir(parents=True, exist_ok=True)
                (layout / file).touch()
            if files.readme is not None:
                (layout / CARD).write_bytes(files.readme.read_bytes())
            root = layout.resolve()
            splits = {
                split: [DataFile(path, path.relative_to(root).as_posix()) for path in paths]
                for split, paths in _splits(layout, wanted.config, name).items()
            }
            return [file.shown for file in _choose(splits, split, name)[0]]

    downloaded = hub_data_files(wanted.repo, wanted.revision, f"{wanted.config} {split}", choose)
    files = [DataFile(path, f"{wanted.repo}/{file}") for file, path in downloaded.paths.items()]
    return files, [*downloaded.notices], downloaded.commit
