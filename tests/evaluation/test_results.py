"""Results on disk, their fingerprints, and their errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace.errors import UserError
from subspace.evaluation.records import make_record
from subspace.evaluation.results import (
    RESULTS,
    Score,
    TaskResult,
    accuracy,
    digest,
    items_file,
    mean_score,
    read_correct,
    read_items,
    read_results,
    write_items,
    write_results,
)
from tests.helpers.items import items

INGREDIENTS = {
    "protocol": "likelihood 1",
    "template": "0123456789ab",
    "decoding": "none",
    "task": "piqa",
    "task version": "1.0",
    "items": "ba9876543210",
    "metrics": "acc",
    "tokenizer": "abcabcabcabc",
}


def result(folder: Path | None = None, **changes: Any) -> TaskResult:
    values: dict[str, Any] = {
        "model": "tiny",
        "adapter": "",
        "dtype": "float32",
        "protocol": "likelihood",
        "task": "piqa",
        "metrics": {"acc_norm": Score(0.5, 0.1), "acc": Score(0.25, 0.08)},
        "n": 30,
        "majority": 0.51,
        "truncated": 0,
        "seconds": 1.5,
        "fingerprint_fields": INGREDIENTS,
    }
    values |= changes
    file = items_file(folder, values["protocol"], values["task"]) if folder else None
    return TaskResult(**values, items=file)


def test_results_are_read_back(tmp_path: Path) -> None:
    written = [result(tmp_path), result(tmp_path, task="boolq", adapter="lora")]
    write_results(tmp_path, written)
    found = read_results(tmp_path)
    assert found == [written[1], written[0]]
    assert [r.items for r in found] == [r.items for r in (written[1], written[0])]
    assert list(found[1].metrics) == ["acc_norm", "acc"]


def test_a_run_that_is_moved_keeps_its_items(tmp_path: Path) -> None:
    write_results(tmp_path / "a", [result(tmp_path / "a")])
    (tmp_path / "a").rename(tmp_path / "b")
    assert read_results(tmp_path / "b")[0].items == tmp_path / "b" / "evaluation" / "likelihood" / "piqa.jsonl"


def test_a_newer_result_takes_the_place_of_an_older_one_of_its_task_and_protocol(tmp_path: Path) -> None:
    write_results(tmp_path, [result(), result(task="boolq"), result(protocol="llm-adapters")])
    write_results(tmp_path, [result(n=31)])
    found = {(r.protocol, r.task): r.n for r in read_results(tmp_path)}
    assert found == {("likelihood", "boolq"): 30, ("likelihood", "piqa"): 31, ("llm-adapters", "piqa"): 30}


def test_a_row_says_what_it_is(tmp_path: Path) -> None:
    write_results(tmp_path, [result(tmp_path)])
    (row,) = json.loads((tmp_path / RESULTS).read_text())
    assert row["fingerprint"] == result().fingerprint
    assert row["items"] == "evaluation/likelihood/piqa.jsonl"
    assert row["metrics"]["acc"] == {"value": 0.25, "error": 0.08}


@pytest.mark.parametrize("part", INGREDIENTS)
def test_every_ingredient_changes_the_fingerprint(part: str) -> None:
    changed = result(fingerprint_fields={**INGREDIENTS, part: "other"})
    assert changed.fingerprint != result().fingerprint
    assert len(changed.fingerprint) == 12


def test_what_was_scored_does_not_change_the_fingerprint() -> None:
    other = result(model="another", adapter="lora", dtype="bfloat16", seconds=9.0)
    assert other.fingerprint == result().fingerprint


def test_a_digest_is_of_the_value_alone() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


@pytest.mark.parametrize("text", ["[{", '[{"model": "tiny"}]', "{}"])
def test_damaged_results_are_told(tmp_path: Path, text: str) -> None:
    (tmp_path / RESULTS).write_text(text)
    with pytest.raises(UserError, match=r"results.json is damaged .* Remove it and score again: subspace evaluate"):
        read_results(tmp_path)


def test_an_edited_row_is_told(tmp_path: Path) -> None:
    write_results(tmp_path, [result()])
    file = tmp_path / RESULTS
    file.write_text(file.read_text().replace("ba9876543210", "000000000000"))
    with pytest.raises(UserError, match="is damaged.*fingerprint"):
        read_results(tmp_path)


def test_a_run_that_was_not_scored_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no results.json: it was not scored. Run: subspace evaluate"):
        read_results(tmp_path)


def test_items_are_read_back(tmp_path: Path) -> None:
    records: list[Any] = [
        {"id": "a", "text": "café\u2028\x85\n", "correct": {"acc": True}},
        {"id": "b", "correct": {"acc": False}},
    ]
    file = items_file(tmp_path, "likelihood", "piqa")
    write_items(file, records)
    assert read_items(file) == records
    assert read_correct(file, "acc") == [True, False]
    assert len(file.read_bytes().split(b"\n")) == 3


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "piqa.jsonl"
    file.write_text('{"id": 1}\n{"id": \n')
    with pytest.raises(UserError, match=r"piqa.jsonl, line 2 is damaged"):
        read_items(file)


def test_an_interrupted_write_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path, [result()])

    def full_disk(path: Path, *arguments: Any, **keywords: Any) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_results(tmp_path, [dataclasses.replace(result(), n=99)])
    monkeypatch.undo()
    assert read_results(tmp_path) == [result()]


def test_the_error_of_a_share_is_binomial() -> None:
    score = accuracy([True] * 30 + [False] * 70)
    assert score.value == 0.3
    # The spread of shares of 100 draws, from the definition.
    draws = torch.bernoulli(torch.full((20000, 100), 0.3), generator=torch.Generator().manual_seed(0)).mean(1)
    assert score.error == pytest.approx(float(draws.std()), rel=0.03)


def test_a_mean_weighs_tasks_alike() -> None:
    assert mean_score([Score(0.5, 0.03), Score(0.7, 0.04)]) == pytest.approx(Score(0.6, 0.025))


def test_a_record_is_written_in_the_order_that_files_have() -> None:
    (item,) = items("piqa", 1)
    given = {"scores": [0.5, 1.0], "characters": [3, 4]}, {"acc": 1}, 1, {"acc": True}
    record = make_record(item, "hash", *given)  # type: ignore[arg-type]
    assert list(record) == ["id", "prompt", "scores", "characters", "prediction", "label", "correct"]
    assert list(make_record(item, "hash", {"text": "a"}, "a", "a", {"acc": True})) == [
        "id",
        "prompt",
        "text",
        "prediction",
        "label",
        "correct",
    ]


def test_the_file_keeps_its_name_for_the_fields_of_the_fingerprint(tmp_path: Path) -> None:
    write_results(tmp_path, [result()])
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row["ingredients"] == INGREDIENTS
    assert list(row)[9:] == ["seconds", "ingredients", "items", "subject", "base", "fingerprint"]
