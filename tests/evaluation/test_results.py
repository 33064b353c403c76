"""Results on disk, their fingerprints, and their errors."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
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
    find_result,
    items_checksum,
    items_file,
    read_items,
    read_results,
    read_verified_items,
    save_result,
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


def spoiled(row: dict[str, Any], key: str, value: Any) -> str:
    changed = dict(row)
    *above, last = key.split(".")
    inner = changed
    for name in above:
        inner[name] = inner = dict(inner[name])
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps([changed])


WRONG: list[tuple[str, Any]] = [
    *[(key, None) for key in ("model", "protocol", "task", "metrics", "n", "ingredients", "items", "fingerprint")],
    *[("n", 0), ("n", -1), ("n", "9"), ("n", 1.5), ("n", True), ("n", [])],
    *[("metrics", {}), ("metrics", []), ("metrics", {"acc": 0.5}), ("metrics", {"acc": {"value": 0.5}})],
    ("metrics", {"": {"value": 1, "error": 0}}),
    *[("metrics.acc.value", value) for value in (math.nan, math.inf, 1.01, -0.1, "0.5", False)],
    *[("majority", 2.0), ("seconds", math.nan), ("truncated", -1), ("task", ""), ("dtype", 16), ("base", ["x"])],
    *[
        ("ingredients", {"task": 5}),
        ("ingredients", "x"),
        ("items", 5),
        ("items", "/etc/passwd"),
        ("items", "../x.jsonl"),
    ],
    *[("title", 5), ("suite", {}), ("items_sha256", 0), ("subject", 1), ("fingerprint", "000000000000")],
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_row_with_a_key_missing_or_of_another_kind_is_told(tmp_path: Path, key: str, value: Any) -> None:
    write_results(tmp_path, [result(tmp_path)])
    (row,) = json.loads((tmp_path / RESULTS).read_text())
    (tmp_path / RESULTS).write_text(spoiled(row, key, value))
    with pytest.raises(UserError, match=r"results.json is damaged .* Remove it and score again"):
        read_results(tmp_path)


def test_a_row_of_a_newer_version_is_not_called_damaged(tmp_path: Path) -> None:
    write_results(tmp_path, [result(tmp_path)])
    (row,) = json.loads((tmp_path / RESULTS).read_text())
    (tmp_path / RESULTS).write_text(spoiled(row, "calibration", 0.1))
    with pytest.raises(UserError, match="of a newer version of subspace .* 'calibration'") as told:
        read_results(tmp_path)
    assert "Remove" not in str(told.value)


def test_a_row_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    write_results(tmp_path, [result(tmp_path)])
    (row,) = json.loads((tmp_path / RESULTS).read_text())
    for key in ("subject", "base", "title", "suite", "items_sha256"):
        del row[key]
    (tmp_path / RESULTS).write_text(json.dumps([row]))
    assert read_results(tmp_path) == [result(tmp_path)]


@pytest.mark.parametrize("text", ["[{", '[{"model": "tiny"}]', "{}", "5", "null", "[5]", "[" * 100_000, "\xff"])
def test_damaged_results_are_told(tmp_path: Path, text: str) -> None:
    (tmp_path / RESULTS).write_text(text, encoding="latin-1")
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
    assert list(row)[9:] == [
        *("seconds", "ingredients", "items", "subject", "base"),
        *("title", "suite", "items_sha256", "fingerprint"),
    ]


# Items and their row


def scored(folder: Path, right: str = "1101", **changes: Any) -> tuple[TaskResult, list[Any]]:
    """Return a result and its items, one for each sign of ``right``."""
    marks = [sign == "1" for sign in right]
    records: list[Any] = [
        {"id": str(i), "prompt": "hash", "prediction": "a", "label": "a", "correct": {"acc": mark}}
        for i, mark in enumerate(marks)
    ]
    metrics = {"acc": accuracy(marks)}
    made = result(folder, n=len(marks), metrics=metrics, items_sha256=items_checksum(records), **changes)
    return made, records


def test_items_that_are_those_of_their_row_are_read(tmp_path: Path) -> None:
    made, records = scored(tmp_path)
    save_result(tmp_path, made, records)
    assert made.items
    assert [path.name for path in made.items.parent.iterdir() if path.is_file()] == ["piqa.jsonl"]
    (found,) = read_results(tmp_path)
    assert (found, found.items_sha256) == (made, made.items_sha256)
    assert read_verified_items(found) == records == read_items(made.items)
    assert find_result(tmp_path, "likelihood", "piqa") == made
    assert find_result(tmp_path, "likelihood", "boolq") is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text[: len(text) // 2], "is damaged|it has"),
        (lambda text: "".join(text.splitlines(keepends=True)[:2]), "it has 2 items, and its row 4"),
        (lambda text: text.replace("true", "false", 1), "other items than its row was written with"),
        (lambda text: text.replace("hash", "hush", 1), "other items than its row was written with"),
        (lambda text: text.replace('"id": "0"', '"id": [0]'), "line 1 is damaged: id"),
        (lambda text: text.replace('{"acc": true}', "true"), "line 1 is damaged: correct: "),
        (lambda text: text.replace('"correct"', '"wrong"', 1), "line 1 is damaged: correct: field required"),
        (lambda text: text.replace('"acc"', '"acc_norm"'), "other items than its row was written with"),
        (lambda text: text.replace("true", "1"), "line 1 is damaged: correct.acc"),
        (lambda text: "5\n" * 4, "line 1 is damaged"),
        (lambda text: "[" * 100_000, "line 1 is damaged"),
        (lambda text: "", "line 1 is damaged"),
    ],
)
def test_other_items_than_those_of_the_row_are_told(tmp_path: Path, change: Any, complaint: str) -> None:
    made, records = scored(tmp_path)
    save_result(tmp_path, made, records)
    assert made.items
    made.items.write_text(change(made.items.read_text()))
    with pytest.raises(UserError, match=complaint) as told:
        read_verified_items(read_results(tmp_path)[0])
    assert "Score the run again: subspace evaluate" in str(told.value)
    assert find_result(tmp_path, "likelihood", "piqa") is None


@pytest.mark.parametrize(("right", "complaint"), [("1111", "its items give another acc"), ("110", "it has 3 items")])
def test_items_of_a_row_without_checksum_are_compared_by_number_and_accuracy(
    tmp_path: Path, right: str, complaint: str
) -> None:
    made, _ = scored(tmp_path)
    write_results(tmp_path, [dataclasses.replace(made, items_sha256="")])
    assert made.items
    write_items(made.items, scored(tmp_path, right)[1])
    with pytest.raises(UserError, match=complaint):
        read_verified_items(read_results(tmp_path)[0])


class Died(BaseException):
    """Stands for the death of the process."""


def test_a_death_at_any_operation_leaves_the_old_pair_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes the file system is the last one in turn."""
    old, new = scored(tmp_path / "run", "1101"), scored(tmp_path / "run", "0001")
    seen = set()
    for last in range(1000):
        save_result(tmp_path / "run", *old)
        calls = 0

        def dying(change: Any) -> Any:
            def changed(*arguments: Any, **keywords: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > last:  # noqa: B023
                    raise Died
                return change(*arguments, **keywords)

            return changed

        with monkeypatch.context() as patched:
            for holder, name in [(os, "replace"), (os, "fsync"), (Path, "write_bytes"), (Path, "replace")]:
                patched.setattr(holder, name, dying(getattr(holder, name)))
            try:
                save_result(tmp_path / "run", *new)
                finished = True
            except Died:
                finished = False
        (found,) = read_results(tmp_path / "run")
        expected = old if found == old[0] else new
        assert (found, read_verified_items(found)) == expected
        seen.add(found.metrics["acc"].value)
        if finished:
            break
    assert last > 5
    assert seen == {0.75, 0.25}


def _save(folder: Path, tasks: list[str]) -> None:
    for task in tasks:
        save_result(folder, *scored(folder, task=task))


@pytest.mark.processes
def test_two_scorings_of_one_folder_keep_each_others_rows(tmp_path: Path) -> None:
    shares = [[f"task{half}-{i}" for i in range(25)] for half in range(2)]
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=_save, args=(tmp_path, share)) for share in shares]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0]
    assert {found.task for found in read_results(tmp_path)} == {task for share in shares for task in share}
    for found in read_results(tmp_path):
        read_verified_items(found)


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    """The last of several barriers: what is scored, and what is read, is looked at before."""
    record: Any = {"id": "a", "prompt": "p", "scores": [math.nan], "prediction": {}, "label": 0, "correct": {}}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_items(tmp_path / "items.jsonl", [record])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(tmp_path, [result(tmp_path, metrics={"acc": Score(math.nan, 0.0)})])
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl")]
