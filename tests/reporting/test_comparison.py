"""Comparisons: the tests are the statistics', the words say what they come to, and the flipped items are found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from subspace.cli.main import main
from subspace.errors import UserError
from subspace.reporting import statistics
from subspace.reporting.comparison import compare_runs
from tests.reporting.test_tables import run, trained

FIRST = "1" * 40 + "0" * 60
SAME = "0" + "1" * 40 + "0" * 59  # two items flipped
MORE = "1" * 75 + "0" * 25


def scored(folder: Path, right: str) -> Path:
    return run(folder, {"boolq": {"acc": right}, "piqa": {"acc": right[::-1], "acc_norm": right}})


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [scored(tmp_path / name, right) for name, right in [("first", FIRST), ("same", SAME), ("more", MORE)]]


def test_the_tests_are_paired_by_item(folders: list[Path]) -> None:
    (found,) = compare_runs([folders[0], folders[2]])
    before, after = (np.array([[float(mark) for mark in right]]) for right in (FIRST, MORE))
    boolq, piqa = found.tasks
    assert boolq.difference == statistics.difference([before], [after])
    assert (boolq.difference.lost, boolq.difference.gained, boolq.difference.value) == (0, 35, 0.35)
    assert boolq.difference.p == statistics.mcnemar(0, 35)
    assert (boolq.before, boolq.after, boolq.n) == (0.4, 0.75, 100)
    assert boolq.detectable == statistics.detectable_difference([100], 0.35)
    assert piqa.metric == "acc"
    (mean,) = found.means
    assert mean.difference == statistics.difference([before, before[:, ::-1]], [after, after[:, ::-1]])
    assert mean.n == 200


def test_holm_corrects_over_tasks_and_methods(folders: list[Path]) -> None:
    same, more = compare_runs(folders)
    raw = [line.difference.p for one in (same, more) for line in one.tasks]
    assert [line.corrected for one in (same, more) for line in one.tasks] == statistics.holm(raw)
    raw = [line.difference.p for one in (same, more) for line in one.means]
    assert [line.corrected for one in (same, more) for line in one.means] == statistics.holm(raw)


def test_the_verdict_is_in_words(folders: list[Path]) -> None:
    same, more = compare_runs(folders)
    assert more.verdict.startswith("mean of 2: more is better than first: +35.0 points [+27.9, +41.4], p ")
    assert same.verdict == (
        "mean of 2: same and first do not differ significantly on these items: +0.0 points [-2.4, +2.4], p = 1; "
        "the smallest detectable difference is 3.9 points"
    )
    (worse,) = compare_runs([folders[2], folders[0]])
    assert "first is worse than more: -35.0 points" in worse.verdict


def test_the_items_that_flipped(folders: list[Path]) -> None:
    (found,) = compare_runs(folders[:2])
    assert [(flip.task, flip.id, flip.gained) for flip in found.flips] == [
        ("boolq", "0", False),
        ("boolq", "40", True),
        ("piqa", "59", True),
        ("piqa", "99", False),
    ]
    assert found.flipped.rows[1][:3] == ("BoolQ", "40", "gained")
    assert found.flipped.title == "4 items flipped"


def seeded(tmp_path: Path, name: str, shift: int) -> list[Path]:
    method = {"name": name}
    rights = ["1" * (40 + shift + 6 * seed) + "0" * (60 - shift - 6 * seed) for seed in range(3)]
    return [trained(tmp_path / f"{name}-{i}", right, seed=i, method=method) for i, right in enumerate(rights)]


def test_seeds_are_compared_as_methods(tmp_path: Path) -> None:
    lora, dora = seeded(tmp_path, "lora", 0), seeded(tmp_path, "dora", 20)
    (found,) = compare_runs([*lora, *dora])
    assert (found.first.name, found.other.name) == ("lora ×3", "dora ×3")
    (mean,) = found.means
    assert mean.difference.value == pytest.approx(0.2)
    assert "Student's t, over seeds and items" in found.grid.notes[2]
    one = compare_runs([lora[0], dora[0]])[0].means[0]
    assert mean.difference.error > 1.5 * one.difference.error  # three seeds know that seeds differ; one does not
    assert {flip.id for flip in found.flips if flip.task == "boolq"} == {str(i) for i in range(46, 66)}


def test_one_method_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="there is no second method. They are seeds of one method. Name the run of another"
    ):
        compare_runs(seeded(tmp_path, "lora", 0))


def test_no_task_in_common_is_refused(tmp_path: Path) -> None:
    one, other = run(tmp_path / "one", {"boolq": {"acc": "10"}}), run(tmp_path / "two", {"piqa": {"acc": "10"}})
    with pytest.raises(UserError, match="one, two have no task in common"):
        compare_runs([one, other])


def test_unlike_runs_are_refused(folders: list[Path], tmp_path: Path) -> None:
    other = run(tmp_path / "other", {"boolq": {"acc": FIRST}}, ingredients={"template": "another"})
    with pytest.raises(UserError, match="first and other cannot be compared: in BoolQ they differ in template"):
        compare_runs([folders[0], other])


def test_the_command(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    names = list(map(str, folders))
    assert main(["compare", *names, "--items"]) == 0
    shown = capsys.readouterr().out
    assert "same minus first" in shown
    assert "more is better than first" in shown
    assert "4 items flipped" in shown

    assert main(["compare", *names, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert [(one["before"]["name"], one["after"]["name"]) for one in plain] == [("first", "same"), ("first", "more")]
    assert plain[1]["tasks"][0]["difference"]["gained"] == 35
    assert len(plain[0]["flips"]) == 4

    assert main(["compare", names[0]]) == 2
    assert "cannot be compared: there is no second method. Name the run of another" in capsys.readouterr().err


def test_the_table_command(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = list(map(str, folders))
    assert main(["table", *names, "--format", "latex", "--transpose", "--plot", str(tmp_path / "scores.svg")]) == 0
    assert "\\begin{tabular}{lrrrr}" in capsys.readouterr().out
    assert (tmp_path / "scores.svg").is_file()
    assert main(["table", *names, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("**likelihood: accuracy in %")
    assert main(["table", *names, "--format", "latx"]) == 2
    assert "Did you mean 'latex'" in capsys.readouterr().err
