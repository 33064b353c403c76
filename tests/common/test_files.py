"""Files and folders are there whole or not at all, and may be read by whom the umask lets."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from subspace.common import files
from subspace.common.files import (
    MANIFEST,
    begin_folder,
    build_dir_atomically,
    file_sha256,
    finish_folder,
    move_folder,
    open_log,
    read_manifest,
    remove_folder,
    write_checked,
    write_file,
    write_folder,
    write_json,
)
from subspace.common.locks import this_process
from subspace.errors import UserError


class Killed(BaseException):
    """What stands for a signal that ends the process."""


@pytest.fixture(params=[0o022, 0o077, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def private_tensors(path: Path) -> None:
    """Write as libraries do that go through a temporary file of their own."""
    save_file({"x": torch.arange(3)}, path)
    path.chmod(0o600)


# Files.


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("größer\n", "größer\n".encode()),
        (b"\0\r\n", b"\0\r\n"),
        (lambda path: path.write_bytes(b"by a library"), b"by a library"),
    ],
    ids=["text", "bytes", "function"],
)
def test_a_file_holds_what_was_written(content: Any, found: bytes, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file"
    for _ in range(2):
        write_file(file, content)
        assert file.read_bytes() == found
        assert names(file.parent) == ["file"]


def test_json_takes_what_it_does_not_know_as_text(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", {"a": [1, None], "path": Path("x")})
    assert (tmp_path / "file.json").read_text() == '{\n  "a": [\n    1,\n    null\n  ],\n  "path": "x"\n}\n'


@pytest.mark.parametrize("content", ["text", private_tensors], ids=["text", "function"])
def test_a_file_s_permissions_follow_the_umask(content: Any, umask: int, tmp_path: Path) -> None:
    write_file(tmp_path / "deep" / "file", content)
    assert mode(tmp_path / "deep" / "file") == 0o666 & ~umask
    assert mode(tmp_path / "deep") == 0o777 & ~umask


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise Killed

    file = tmp_path / "file"
    write_file(file, "old")
    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(Killed):
        write_file(file, "new")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EFBIG])
def test_a_disk_that_does_not_take_a_file_leaves_the_old_one(error: int, tmp_path: Path) -> None:
    def refused(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(error, os.strerror(error))

    file = tmp_path / "file"
    write_file(file, "old")
    with pytest.raises(OSError, match=os.strerror(error)):
        write_file(file, refused)
    assert file.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_what_reads_back_differently_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"flipped")
    with pytest.raises(OSError, match="reads back differently; is the disk sound"):
        write_checked(tmp_path / "file", b"content")
    with pytest.raises(OSError, match="reads back differently"):
        write_file(tmp_path / "other", "content")
    assert names(tmp_path) == ["file"]


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """What is flushed to the disk and renamed, in that order."""
    seen: list[tuple[str, Path]] = []
    replace, rename, fsync = os.replace, Path.rename, files.fsync_path

    def replaced(source: Path, target: Path) -> None:
        seen.append(("rename", target))
        replace(source, target)

    def renamed(source: Path, target: Path) -> Path:
        seen.append(("rename", target))
        return rename(source, target)

    def flushed(path: Path) -> None:
        seen.append(("flush", path))
        fsync(path)

    monkeypatch.setattr("os.replace", replaced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(files, "fsync_path", flushed)
    return seen


@pytest.mark.parametrize("content", ["text", lambda path: path.write_text("text")], ids=["text", "function"])
def test_a_file_is_on_the_disk_before_its_name_and_the_name_after(
    content: Any, order: list[tuple[str, Path]], tmp_path: Path
) -> None:
    write_file(tmp_path / "file", content)
    (first, partial), *rest = order
    assert first == "flush"
    assert partial.parent == tmp_path
    assert rest == [("rename", tmp_path / "file"), ("flush", tmp_path)]


def test_flushing_reaches_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr("os.fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))
    write_file(tmp_path / "file", "text")
    assert flushed == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]


def test_a_folder_that_cannot_be_flushed_is_let_be_and_a_file_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(handle: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "file").touch()
    monkeypatch.setattr("os.fsync", unable)
    files.fsync_path(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        files.fsync_path(tmp_path / "file")


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    file = tmp_path / "file"

    def slowly(path: Path) -> None:
        path.write_text("slow")
        write_file(file, "fast")  # another one comes and goes meanwhile
        assert path.read_text() == "slow"

    write_file(file, slowly)
    assert file.read_text() == "slow"
    assert names(tmp_path) == ["file"]


def test_a_link_in_the_place_of_a_partial_file_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a file there overwritten: both could be another user's, in a shared folder."""
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    partial = tmp_path / f".file.{this_process()}.known.partial"
    partial.symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "file", "content")
    assert not (tmp_path / "victim").exists()
    assert not (tmp_path / "file").exists()


def test_a_checksum_is_sha256(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"content")
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()


# Folders.


def fill(folder: Path, content: str = "new") -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text(content)


def test_a_folder_replaces_the_one_before(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with write_folder(tmp_path / "deep" / "folder") as work:
            assert names(work) == []
            fill(work, content)
        assert (tmp_path / "deep" / "folder" / "inner" / "file").read_text() == content
        assert names(tmp_path / "deep") == ["folder"]


def test_a_folder_s_permissions_follow_the_umask(umask: int, tmp_path: Path) -> None:
    with write_folder(tmp_path / "folder") as work:
        fill(work)
        (work / "inner").chmod(0o700)
        private_tensors(work / "inner" / "tensors")
    assert {mode(path) for path in (tmp_path / "folder", tmp_path / "folder" / "inner")} == {0o777 & ~umask}
    assert {mode(path) for path in (tmp_path / "folder" / "inner").iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_breaks_off_leaves_the_old_folder(error: BaseException, tmp_path: Path) -> None:
    with write_folder(tmp_path / "folder") as work:
        fill(work, "old")

    def breaks_off() -> None:
        with write_folder(tmp_path / "folder") as work:
            fill(work)
            raise error

    with pytest.raises(type(error)):
        breaks_off()
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "old"
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_that_cannot_get_its_name_leaves_the_old_one(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fails(one: Path, other: Path) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    def fails_for_the_new_one(source: Path, target: Path) -> Path:
        if source.name == "folder.new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, target)

    with write_folder(tmp_path / "folder") as work:
        fill(work, "old")
    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    monkeypatch.setattr(files, "_exchange_names", fails if exchanges else lambda one, other: False)
    with pytest.raises(OSError, match="Input/output"), write_folder(tmp_path / "folder") as work:
        fill(work)
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_a_folder_with_content_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with write_folder(tmp_path / "folder", replace=False) as work:
        fill(work, "old")
    with pytest.raises(OSError, match="not empty"), write_folder(tmp_path / "folder", replace=False) as work:
        fill(work)
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_all_of_a_folder_is_on_the_disk_before_its_name_and_the_name_after(
    order: list[tuple[str, Path]], tmp_path: Path
) -> None:
    partial = begin_folder(tmp_path / "folder")
    fill(partial)
    finish_folder(partial, tmp_path / "folder")
    assert set(order[:3]) == {("flush", path) for path in (partial, partial / "inner", partial / "inner" / "file")}
    assert order[3:] == [("rename", tmp_path / "folder"), ("flush", tmp_path)]


def test_an_unfinished_folder_is_removed_by_the_next_one(tmp_path: Path) -> None:
    fill(begin_folder(tmp_path / "folder"))
    assert names(begin_folder(tmp_path / "folder")) == []


def test_a_folder_moves_in_place_of_another(tmp_path: Path) -> None:
    for name in ("folder", "other"):
        with write_folder(tmp_path / name) as work:
            fill(work, name)
    move_folder(tmp_path / "folder", tmp_path / "other")
    assert (tmp_path / "other" / "inner" / "file").read_text() == "folder"
    assert names(tmp_path) == ["other"]


def test_half_of_a_removed_folder_is_not_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, **_: object) -> None:
        if path.exists():
            raise Killed

    with write_folder(tmp_path / "folder") as work:
        fill(work)
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        remove_folder(tmp_path / "folder")
    assert names(tmp_path) == ["folder.old.partial"]
    monkeypatch.undo()
    remove_folder(tmp_path / "folder")  # is not there any more
    assert not (tmp_path / "folder").exists()


# Folders of the cache.


def build(work: Path) -> dict[str, Any]:
    (work / "inner").mkdir()
    (work / "inner" / "numbers").write_text("1 2 3")
    return {"from": "a test"}


def good(folder: Path) -> bool:
    return read_manifest(folder, thorough=True) is not None


def remains(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path != folder and not path.name.endswith(".lock")]


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    assert build_dir_atomically(folder, good, build)
    assert read_manifest(folder) == {"from": "a test"}
    assert (folder / "inner" / "numbers").read_text() == "1 2 3"
    assert not build_dir_atomically(folder, good, build)
    assert remains(folder) == []


def cut(file: Path) -> None:
    file.write_text("1 2")


def flip(file: Path) -> None:
    file.write_text("1 2 4")


@pytest.mark.parametrize("spoil", [cut, flip, Path.unlink])
def test_a_spoiled_folder_is_made_again(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    build_dir_atomically(folder, good, build)
    spoil(folder / "inner" / "numbers")
    assert build_dir_atomically(folder, good, build)
    assert (folder / "inner" / "numbers").read_text() == "1 2 3"
    assert remains(folder) == []


@pytest.mark.parametrize(
    "manifest", ["", "{}", "[]", '{"files": {"inner/numbers": 5}}', '{"files": {"other": [1, ""]}}']
)
def test_a_folder_with_a_spoiled_manifest_is_not_good(manifest: str, tmp_path: Path) -> None:
    build_dir_atomically(tmp_path / "folder", good, build)
    (tmp_path / "folder" / MANIFEST).write_text(manifest)
    assert read_manifest(tmp_path / "folder") is None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")])
def test_what_breaks_off_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    def breaks(work: Path) -> dict[str, Any]:
        build(work)
        raise error

    with pytest.raises(type(error)):
        build_dir_atomically(tmp_path / "folder", good, breaks)
    assert not (tmp_path / "folder").exists()
    assert remains(tmp_path / "folder") == []


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / "folder.partial" / "half").mkdir(parents=True)
    build_dir_atomically(tmp_path / "folder", good, build)
    assert remains(tmp_path / "folder") == []


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("IoError: No space left on device (os error 28)")],
)
def test_a_full_disk_is_said_in_words(error: Exception, tmp_path: Path) -> None:
    def full(work: Path) -> dict[str, Any]:
        build(work)
        raise error

    with pytest.raises(UserError, match=r"no space is left on the disk \(.* MB are free.*SUBSPACE_CACHE sets another"):
        build_dir_atomically(tmp_path / "folder", good, full)
    assert remains(tmp_path / "folder") == []


def test_a_disk_that_may_not_be_written_is_said_in_words(tmp_path: Path) -> None:
    def denied(work: Path) -> dict[str, Any]:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(UserError, match=r"permission is denied\. .* SUBSPACE_CACHE sets another"):
        build_dir_atomically(tmp_path / "folder", good, denied)


def test_who_comes_at_the_same_time_waits(tmp_path: Path) -> None:
    built = []

    def slow(work: Path) -> dict[str, Any]:
        time.sleep(0.2)
        built.append(work)
        return build(work)

    def come() -> None:
        build_dir_atomically(tmp_path / "folder", good, slow)
        assert good(tmp_path / "folder")

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_the_manifest_is_json_for_people(tmp_path: Path) -> None:
    build_dir_atomically(tmp_path / "folder", good, build)
    manifest = json.loads((tmp_path / "folder" / MANIFEST).read_text())
    assert manifest == {"from": "a test", "files": {"inner/numbers": [5, hashlib.sha256(b"1 2 3").hexdigest()]}}


def test_a_file_larger_than_allowed_is_said_in_words(tmp_path: Path) -> None:
    def large(work: Path) -> dict[str, Any]:
        raise OSError(errno.EFBIG, "File too large")

    with pytest.raises(UserError, match="allows no file of that size.* See 'ulimit -f'"):
        build_dir_atomically(tmp_path / "folder", good, large)


def test_a_good_folder_of_a_cache_that_may_only_be_read_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_dir_atomically(tmp_path / "folder", good, build)
    monkeypatch.setattr(files, "locked", None)
    assert not build_dir_atomically(tmp_path / "folder", good, build)


def test_a_log_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "log.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"):
        open_log(tmp_path / "log.jsonl")
    assert (tmp_path / "victim").read_text() == "mine"
