"""What arrives is checked, and is whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from subspace.common import download as download_module
from subspace.common import files as files_module
from subspace.common.download import Hub, Wheel, wheels
from subspace.common.files import build_dir_atomically, read_manifest
from subspace.errors import UserError
from tests.helpers.toy_benchmark import TEST, TRAIN, make_wheel, make_world


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
    (tmp_path / "folder" / files_module.MANIFEST).write_text(manifest)
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
    (tmp_path / ".folder.tmp-abc" / "half").mkdir(parents=True)
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

    with pytest.raises(UserError, match="the disk is full .* set SUBSPACE_CACHE to another disk"):
        build_dir_atomically(tmp_path / "folder", good, full)
    assert remains(tmp_path / "folder") == []


def test_a_disk_that_may_not_be_written_is_said_in_words(tmp_path: Path) -> None:
    def denied(work: Path) -> dict[str, Any]:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(UserError, match="may not be. Set SUBSPACE_CACHE"):
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


# Wheels.


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A wheel that is not downloaded yet."""
    cache = make_world(tmp_path, monkeypatch)
    (declared,) = wheels().values()
    (cache / "downloads" / declared.file).rename(tmp_path / declared.file)
    return declared


def downloaded(wheel: Wheel, tmp_path: Path) -> Path:
    return tmp_path / "cache" / "downloads" / wheel.file


def test_pip_brings_a_wheel_and_it_is_kept(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real pip, with a folder for an index.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    found = download_module.fetch_wheel(wheel)
    assert found == downloaded(wheel, tmp_path)
    assert files_module.file_sha256(found) == wheel.sha256
    assert remains(found) == []

    monkeypatch.setattr(download_module, "_pip_download", None)
    assert download_module.fetch_wheel(wheel) == found


def test_a_wheel_that_pip_does_not_find(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"toy-wheel==1.0 was asked of PyPI .* did not come: .*put it into .*downloads"):
        download_module.fetch_wheel(wheel)
    assert remains(downloaded(wheel, tmp_path)) == []


def test_a_download_that_is_not_what_was_declared_is_thrown_away(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_download(wanted: str, work: Path, at: Callable[[int], None]) -> tuple[int, str]:
        (work / "whole").mkdir()
        (work / "whole" / wheel.file).write_bytes((tmp_path / wheel.file).read_bytes()[:-10])
        return 0, "Saved"

    monkeypatch.setattr(download_module, "_pip_download", cut_download)
    with pytest.raises(UserError, match=r"its sha256 is .* It was thrown away"):
        download_module.fetch_wheel(wheel)
    assert not downloaded(wheel, tmp_path).exists()


def test_a_cut_wheel_of_an_earlier_time_is_replaced(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole_download(wanted: str, work: Path, at: Callable[[int], None]) -> tuple[int, str]:
        (work / "whole").mkdir()
        (work / "whole" / wheel.file).write_bytes((tmp_path / wheel.file).read_bytes())
        return 0, "Saved"

    monkeypatch.setattr(download_module, "_pip_download", whole_download)
    downloaded(wheel, tmp_path).write_bytes(b"half of it")
    assert files_module.file_sha256(download_module.fetch_wheel(wheel)) == wheel.sha256


def test_a_wheel_is_not_asked_for_without_room(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "_pip_download", None)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2 * wheel.bytes - 1))
    with pytest.raises(UserError, match="the disk is full"):
        download_module.fetch_wheel(wheel)


def test_what_a_killed_download_left_is_swept_away(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = downloaded(wheel, tmp_path).parent / f".{wheel.file}.tmp-abc"
    left.mkdir()
    monkeypatch.setattr(download_module, "_pip_download", lambda *_: (1, ""))
    with pytest.raises(UserError):
        download_module.fetch_wheel(wheel)
    assert not left.exists()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (f"{sys.executable}: No module named pip", "-m ensurepip"),
        ("Looking\nERROR: Could not find a version\nERROR: No matching", "Could not find a version"),
        ("ERROR: Exception:\nTraceback\nValueError: x\n", "ValueError: x"),
        (
            "WARNING: Retrying after connection broken by 'Timeout()': /simple\nERROR: No matching",
            "no connection .*Timeout",
        ),
        ("error: cut\n\n× Download failed after 6 attempts\n\nnote: not pip", "Download failed after 6 attempts"),
        ("", "pip said nothing"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
    ],
)
def test_why_pip_failed_is_said(said: str, reason: str, wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "_pip_download", lambda *_: (1, said))
    with pytest.raises(UserError, match=reason):
        download_module.fetch_wheel(wheel)


def test_requests_give_each_question_once(tmp_path: Path) -> None:
    make_wheel(tmp_path / "toy.whl")
    records = list(download_module.wheel_records(tmp_path / "toy.whl", "toy/train/requests.jsonl.gz"))
    assert len(records) == TRAIN
    assert [record["query"].split()[-1] for record in records] == [f"{number}?" for number in range(TRAIN)]


def test_an_arrow_file_is_read(tmp_path: Path) -> None:
    make_wheel(tmp_path / "toy.whl")
    records = list(download_module.wheel_records(tmp_path / "toy.whl", "toy/test.arrow"))
    assert [record["right"] for record in records] == ["1", "2"] * (TEST // 2)


# The hub.


RESPONSE: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (GatedRepoError("gated", response=RESPONSE), "gated: accept its terms"),
        (RepositoryNotFoundError("404", response=RESPONSE), "the hub has no dataset toys/toy"),
        (OfflineModeIsEnabled("offline mode is enabled"), r"did not answer \(offline mode"),
        (ConnectionError("Name or service\nnot known"), r"did not answer \(Name or service not known\)"),
        (TimeoutError(), r"did not answer \(TimeoutError\)"),
    ],
)
def test_a_hub_that_does_not_give_is_explained(error: Exception, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    with pytest.raises(UserError, match=says):
        download_module.hub_revision("toys/toy", "dataset")


def test_the_hub_s_records_are_asked_of_one_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load(repo: str, config: str | None, **options: Any) -> list[dict[str, str]]:
        asked.update(repo=repo, config=config, **options)
        return [{"a": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(download_module.hub_records(Hub("toys/toy", "validation", "large"), "abc123")) == [{"a": "b"}]
    assert asked == {"repo": "toys/toy", "config": "large", "split": "validation", "revision": "abc123"}


@pytest.fixture
def hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder as the hub's client would leave it, and the hub's word on its checksum."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    lfs = SimpleNamespace(sha256=hashlib.sha256(b"weights").hexdigest())
    files = [
        SimpleNamespace(rfilename="model.safetensors", lfs=lfs),
        SimpleNamespace(rfilename="config.json", lfs=None),
        SimpleNamespace(rfilename="pytorch_model.bin", lfs=lfs),
    ]
    info = SimpleNamespace(sha="abc123", siblings=files)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    return folder


def test_a_model_of_the_hub_is_checked(hub_model: Path) -> None:
    assert download_module.hub_model("toys/model") == hub_model


def test_a_broken_file_of_the_hub_is_thrown_away(hub_model: Path) -> None:
    (hub_model / "model.safetensors").write_bytes(b"wei")
    with pytest.raises(UserError, match=r"broken model\.safetensors"):
        download_module.hub_model("toys/model")
    assert not (hub_model / "model.safetensors").exists()


def test_only_what_a_model_needs_is_asked_for(hub_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(*_: Any, allow_patterns: Any, **__: Any) -> str:
        asked.append(allow_patterns)
        return str(hub_model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    download_module.hub_model("toys/model")
    download_module.hub_model("toys/model", every_file=True)
    assert "*.safetensors" in asked[0]
    assert "*.bin" not in asked[0]
    assert asked[1] is None


def test_a_model_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    assert download_module.hub_model_here("toys/model") is None


def test_the_manifest_is_json_for_people(tmp_path: Path) -> None:
    build_dir_atomically(tmp_path / "folder", good, build)
    manifest = json.loads((tmp_path / "folder" / files_module.MANIFEST).read_text())
    assert manifest == {"from": "a test", "files": {"inner/numbers": [5, hashlib.sha256(b"1 2 3").hexdigest()]}}


def test_parquet_is_read_by_the_real_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "toy").mkdir()
    parquet.write_table(pyarrow.table({"ask": ["a", "b"]}), tmp_path / "toy" / "train-00000-of-00001.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    records = download_module.hub_records(Hub(str(tmp_path / "toy"), "train"), "main")
    assert list(records) == [{"ask": "a"}, {"ask": "b"}]
