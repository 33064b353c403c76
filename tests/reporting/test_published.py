"""A run beside the scores that its configuration quotes from the literature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from subspace.cli.main import main
from subspace.errors import UserError
from subspace.reporting.published import compare_with_published
from subspace.reporting.statistics import mid_p
from tests.reporting.test_tables import run

MARKS = {"boolq": {"acc": "1" * 70 + "0" * 30}, "piqa": {"acc": "1" * 50 + "0" * 50}}
PUBLISHED = {"boolq": 69.7, "piqa": 83.4, "average": 76.6, "source": "a paper"}


def published_run(folder: Path, published: dict[str, Any] | None = PUBLISHED, marks: Any = MARKS) -> Path:
    run(folder, marks)
    config = {"name": folder.name, **({"published": published} if published else {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_a_published_score_is_inside_the_interval_of_ours_or_not(tmp_path: Path) -> None:
    (found,) = compare_with_published([published_run(tmp_path / "own")])
    boolq, piqa = found.tasks
    assert boolq.ours is not None
    assert (boolq.ours.low, boolq.ours.high) == mid_p(70, 100)
    assert (boolq.inside, piqa.inside) == (True, False)
    assert found.average is not None
    assert found.average.ours is not None
    assert found.average.ours.value == pytest.approx(0.6)
    assert found.average.inside is False
    assert found.grid.rows[0][3:] == ("69.7", "+0.3", "yes")
    assert "published: a paper" in found.grid.notes


def test_rounding_decides_nothing(tmp_path: Path) -> None:
    low = 100 * mid_p(70, 100)[0]
    inside = []
    for name, score in (("rounded", low - 0.04), ("below", low - 0.06)):
        (found,) = compare_with_published([published_run(tmp_path / name, {"boolq": score, "source": "a paper"})])
        inside.append(found.tasks[0].inside)
    assert inside == [True, False]


def test_a_task_that_was_not_scored_has_no_verdict_and_no_average(tmp_path: Path) -> None:
    (found,) = compare_with_published([published_run(tmp_path / "own", marks={"boolq": MARKS["boolq"]})])
    assert [row.inside for row in found.rows] == [True, None, None]


@pytest.mark.parametrize(
    ("published", "says"),
    [
        (None, "its configuration has none.*published: {boolq"),
        ({"siqa": 1.0, "source": "a"}, "none of the tasks.*siqa"),
    ],
)
def test_a_run_without_published_scores_is_refused(published: dict[str, Any] | None, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        compare_with_published([published_run(tmp_path / "own", published)])


def test_the_command_prints_the_comparison_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(published_run(tmp_path / "own")), "--published", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert [row["inside"] for row in found["tasks"]] == [True, False]
    assert (found["source"], found["average"]["published"]) == ("a paper", pytest.approx(0.766))
