"""What is downloaded is checked, and is there whole or not at all."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pyarrow
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from subspace.common import download as download_module
from subspace.common.download import Hub, Wheel, wheels
from subspace.common.files import file_sha256
from subspace.errors import UserError
from tests.helpers.toy_benchmark import TEST, TRAIN, make_wheel, make_world


def remains(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path != folder and not path.name.endswith(".lock")]


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
    assert file_sha256(found) == wheel.sha256
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
    assert file_sha256(download_module.fetch_wheel(wheel)) == wheel.sha256


def test_a_wheel_is_not_asked_for_without_room(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "_pip_download", None)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2 * wheel.bytes - 1))
    with pytest.raises(UserError, match="no space is left on the disk"):
        download_module.fetch_wheel(wheel)


def test_what_a_killed_download_left_is_swept_away(
    wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = downloaded(wheel, tmp_path).parent / f"{wheel.file}.partial"
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
        ("OSError: [Errno 28] No space left on device", "no space is left on the disk"),
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


def test_arrow_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "parts.whl", "w") as wheel:
        for name in ("b", "a", "c"):
            sink = pyarrow.BufferOutputStream()
            table = pyarrow.Table.from_pylist([{"from": name, "row": row} for row in range(2)])
            with pyarrow.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            wheel.writestr(f"parts/{name}/test/data.arrow", sink.getvalue().to_pybytes())
    records = list(download_module.wheel_records(tmp_path / "parts.whl", "parts/*/test/data.arrow"))
    assert [(record["from"], record["row"]) for record in records] == [(n, r) for n in "abc" for r in (0, 1)]
    with pytest.raises(KeyError, match="train"):
        download_module.wheel_records(tmp_path / "parts.whl", "parts/*/train/data.arrow")


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
