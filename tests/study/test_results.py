"""What a study says of its finals: log-odds, differences from the reference, groups, and what it must be read with."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subspace.cli.main import main
from subspace.errors import UserError
from subspace.evaluation.records import ItemRecord
from subspace.evaluation.results import TaskResult, accuracy, items_file, write_items, write_results
from subspace.evaluation.retention import retention_file, write_retention
from subspace.study import execute, record
from subspace.study.config import read_study
from subspace.study.execute import Executor
from subspace.study.files import cell_rows, write_report
from subspace.study.grid import Grid
from subspace.study.report import report_grid, sentences
from subspace.study.results import StudyResult, log_odds, read_results, right_answers
from tests.helpers.studies import STUDY, made_up, make_study

ITEMS, PASSAGES = 60, 30
TEXT = STUDY.replace("outcome: {{primary: validation_loss}}\n", "").replace(
    "train.steps: 5,", "train.steps: 5, evaluate.protocol: answer-word, evaluate.tasks: openbookqa,"
)


@pytest.fixture(autouse=True)
def unsealed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "is_finished", lambda config: True)

    def unprepared(limit: int) -> None:
        raise UserError("boolq is not prepared")

    monkeypatch.setattr(execute, "select_passages", unprepared)


def item(scores: list[float], label: Any, prediction: Any) -> ItemRecord:
    return {"id": "x", "prompt": "", "scores": scores, "prediction": prediction, "label": label, "correct": {}}


def scored(
    gain: Callable[[str, int, np.random.Generator], np.ndarray[Any, Any]],
) -> Callable[[Sequence[str], Path], int]:
    """Return a runner whose finals answer items of the same hardness, with a method's gain in log-odds."""
    train = made_up(lambda label, rate, seed, step: 1.0 + abs(math.log10(rate) + 2) / 10 + (label == "ssb") / 100)

    def run(arguments: Sequence[str], output: Path) -> int:
        if arguments[0] == "train":
            return train(arguments, output)
        hard = np.random.default_rng(0).normal(0, 2, ITEMS)
        for folder in (Path(word) for word in arguments[1:] if "=" not in word):
            label, seed = folder.parent.parent.name, int(folder.name.partition("-")[2])
            draw = np.random.default_rng((len(label), ord(label[0]), seed))
            odds = hard + gain(label, seed, draw)
            records: list[Any] = []
            for number, value in enumerate(odds):
                right = number % 4
                scores = [-math.log(3)] * 4
                scores[right] = float(value)
                best = int(np.argmax(scores))
                told = {"prediction": f"answer{best + 1}", "label": f"answer{right + 1}"}
                records.append(
                    {"id": str(number), "prompt": "", "scores": scores, **told, "correct": {"acc": best == right}}
                )
            file = items_file(folder, "answer-word", "openbookqa")
            write_items(file, records)
            result = TaskResult(
                model="m", adapter=label, dtype="float32", protocol="answer-word", task="openbookqa",
                metrics={"acc": accuracy([record["correct"]["acc"] for record in records])}, n=ITEMS, majority=0.25,
                truncated=0, seconds=1.0, fingerprint_fields={"task version": "1"}, items=file,
            )  # fmt: skip
            write_results(folder, [result])
            if "evaluate.retention=wikipedia" in arguments:
                lost = 0.0 if label == "lora" else 0.05 + draw.normal(0, 0.01, PASSAGES)
                bits = [{"bits": float(b), "base_bits": 100.0} for b in 100 * (1 + lost * np.ones(PASSAGES))]
                passages: list[Any] = [{"id": str(n), "bytes": 100, "tokens": 20, **b} for n, b in enumerate(bits)]
                about = {"model": "m", "adapter": label, "dtype": "float32", "subject": "s", "ingredients": {}}
                write_retention(folder, about, passages)
        return 0

    return run


def study(
    root: Path, runs: Path, run: Callable[[Sequence[str], Path], int], methods: str, text: str = TEXT
) -> StudyResult:
    grid: Grid = record.open_grid(read_study(make_study(root, methods, text.replace("{runs}", str(runs)))), write=True)
    assert Executor(grid, run).execute()
    return read_results(grid)


def test_log_odds_are_those_of_the_right_answer_against_all_others() -> None:
    assert log_odds(item([-1.0, -2.0, -3.0], 1, ""), 1) == pytest.approx(-2 - math.log(math.exp(-1) + math.exp(-3)))
    assert log_odds(item([-1.0, -math.inf], 0, ""), 0) == pytest.approx(1e4 - 1)
    assert math.isfinite(log_odds(item([-800.0, -900.0], 1, ""), 1))


def test_the_place_of_a_right_answer_is_found_in_every_form() -> None:
    assert right_answers([item([0, 1], 1, {"acc": 1})], []) == [1]
    assert right_answers([item([0, 1, 2], "answer2", "answer3")], []) == [1]
    false_first = [item([0.0, 1.0], "true", "true"), item([0.0, 1.0], "false", "true")]
    assert right_answers(false_first, false_first) == [1, 0]  # as BoolQ's choices are, whatever a list of words says


def test_a_method_with_a_gain_is_better_and_equal_ones_share_a_letter(root: Path, tmp_path: Path) -> None:
    def gain(label: str, seed: int, draw: np.random.Generator) -> Any:
        return draw.normal(1.5 if label == "dora" else 0.0, 0.2, ITEMS)

    result = study(root, tmp_path, scored(gain), "[lora, ssb, dora]")
    dora, ssb, lora = (result.method(label) for label in ("dora", "ssb", "lora"))
    assert dora.verdict == "better"
    assert dora.against
    assert dora.against.low < 1.5 < dora.against.high
    assert ssb.verdict == ""
    assert lora.against is None
    assert (dora.group, {lora.group, ssb.group}) == ("a", {"b"})
    assert dora.accuracy
    assert lora.accuracy
    assert dora.accuracy.value > lora.accuracy.value
    text = report_grid(result).markdown()
    assert "◆" in text.split("| dora")[1].splitlines()[0]
    assert "smallest difference that these 6 runs could show against lora" in text
    assert "winner's curse" in text
    assert "Kendall's tau" in text


def test_equal_methods_are_seldom_told_apart(root: Path, tmp_path: Path) -> None:
    result = study(root, tmp_path, scored(lambda label, seed, draw: draw.normal(0, 0.5, ITEMS)), "[lora, ssb, dora]")
    assert {method.group for method in result.methods} == {"a"}
    assert {method.verdict for method in result.methods} == {""}


def test_accuracy_in_the_other_direction_forbids_better(root: Path, tmp_path: Path) -> None:
    """More confident where it is right anyway, and wrong on a few more."""

    def gain(label: str, seed: int, draw: np.random.Generator) -> Any:
        hard = np.random.default_rng(0).normal(0, 2, ITEMS)
        shift = np.where(hard > 0.5, 6.0, -1.0) if label == "ssb" else 0.0
        return shift + draw.normal(0, 0.05, ITEMS)

    ssb = study(root, tmp_path, scored(gain), "[lora, ssb]").method("ssb")
    assert ssb.corrected is not None
    assert ssb.corrected < 0.05
    assert ssb.against
    assert ssb.against.value > 0 > (ssb.accuracy_gain or 0)
    assert ssb.verdict == ""


def test_one_seed_is_said_to_be_one(root: Path, tmp_path: Path) -> None:
    run = scored(lambda label, seed, draw: draw.normal(0, 0.5, ITEMS))
    result = study(root, tmp_path, run, "[lora, ssb]", TEXT.replace("[0, 1]", "[0]"))
    assert any("one seed" in note for note in sentences(result))


def test_files_are_written_in_every_form(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = study(root, tmp_path, scored(lambda label, seed, draw: draw.normal(0, 0.5, ITEMS)), "[lora, ssb]")
    files = {file.name: file.read_text() for file in write_report(result)}
    assert set(files) == {"report.html", "table.md", "table.tex", "cells.csv", "curves.csv"}
    rows = list(csv.DictReader(files["cells.csv"].splitlines()))
    assert [row["phase"] for row in rows].count("final") == 4
    assert list(rows[0])[-3:] == ["seconds", "seconds_a_step", "peak_memory"]
    curves = list(csv.DictReader(files["curves.csv"].splitlines()))
    assert {row["step"] for row in curves} == {"1", "2", "3", "4", "5"}
    study_file = str(root / "toy.yaml")
    for form, start in (
        ("markdown", "**study toy"),
        ("latex", "% study toy"),
        ("csv", "method,phase"),
        ("html", "<!doctype html>"),
    ):
        assert main(["study", "report", study_file, "--format", form]) == 0
        assert capsys.readouterr().out.startswith(start)
    assert main(["study", "report", study_file, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert {method["method"] for method in content["methods"]} == {"lora", "ssb"}


def test_what_finals_keep_of_the_base_is_measured_and_told(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    run = scored(lambda label, seed, draw: draw.normal(0, 1, ITEMS))

    def noting(arguments: Sequence[str], output: Path) -> int:
        asked.append([word for word in arguments if word.startswith("evaluate.retention")])
        return run(arguments, output)

    text = TEXT + "outcome: {{passages: 30}}\n"
    assert read_study(make_study(root, "[lora, ssb]", TEXT.replace("{runs}", str(tmp_path)))).outcome.passages == 200
    without = study(root, tmp_path / "without", noting, "[lora, ssb]", text)
    assert not any(asked)
    assert "kept" not in report_grid(without).head
    monkeypatch.setattr(execute, "select_passages", lambda limit: None)
    result = study(root, tmp_path / "with", noting, "[lora, ssb]", text)
    assert asked[-1] == ["evaluate.retention=wikipedia", "evaluate.retention_limit=30"]
    grid = report_grid(result)
    (column,) = [number for number, name in enumerate(grid.head) if name == "kept"]
    told = {row[0]: row[column] for row in grid.rows}
    assert told["lora"] == "+0.000 [+0.000, +0.000]"
    assert told["ssb"].startswith("+0.0")
    assert float(told["ssb"].partition("[")[2].partition(",")[0]) > 0
    finals = [row for row in cell_rows(result) if row["phase"] == "final"]
    assert [row["kept"] for row in finals if row["method"] == "lora"] == [0, 0]
    assert np.mean([row["kept"] for row in finals if row["method"] == "ssb"]) == pytest.approx(
        float(told["ssb"].partition(" ")[0]), abs=1e-3
    )
    assert {row["kept"] for row in cell_rows(result) if row["phase"] == "search"} == {None}
    (note,) = [sentence for sentence in sentences(result) if sentence.startswith("kept")]
    assert "on 30 Wikipedia passages" in note
    retention_file(next((tmp_path / "with" / "toy" / "ssb").rglob("results.json")).parent).unlink()
    count = len(asked)
    assert Executor(result.grid, noting).execute()  # scored, but not measured: the scoring is asked for again
    assert len(asked) == count + 1
    assert Executor(result.grid, noting).execute()
    assert len(asked) == count + 1
