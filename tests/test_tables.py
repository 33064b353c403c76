"""Tables: golden Markdown and JSON, the paired difference, and what may not stand side by side."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from subspace.errors import UserError
from subspace.results import TaskResult, accuracy, items_file, paired_difference, write_items, write_results
from subspace.tables import show, tables

Marks = Mapping[str, Sequence[str]]  # by metric, for each item: "1" right, "0" wrong

BOOLQ, PIQA = {"acc": "1101"}, {"acc": "1001", "acc_norm": "1011"}
HELLASWAG = {"acc_norm": "0010", "acc": "0000"}


def run(folder: Path, tasks: Mapping[str, Marks], *, protocol: str = "likelihood", **changes: Any) -> Path:
    """Make a run's folder with these results."""
    ingredients = {"protocol": protocol, "task version": "1.0", "items": "4 items", "tokenizer": "t"}
    ingredients |= changes.pop("ingredients", {})
    results = []
    for task, marks in tasks.items():
        right = {metric: [mark == "1" for mark in several] for metric, several in marks.items()}
        n = len(next(iter(right.values())))
        file = items_file(folder, protocol, task)
        write_items(file, [{"id": i, "correct": {m: r[i] for m, r in right.items()}} for i in range(n)])
        values: dict[str, Any] = {"model": "tiny", "adapter": "", "dtype": "float32", "truncated": 0, "seconds": 1.0}
        results.append(
            TaskResult(
                **(values | changes),
                protocol=protocol,
                task=task,
                metrics={metric: accuracy(several) for metric, several in right.items()},
                n=n,
                majority=0.5,
                ingredients={**ingredients, "task": task},
                items=file,
            )
        )
    write_results(folder, results)
    return folder


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return run(tmp_path / "base", {"hellaswag": HELLASWAG, "boolq": BOOLQ, "piqa": PIQA})


@pytest.fixture
def after(tmp_path: Path) -> Path:
    better = {"boolq": {"acc": "1111"}, "piqa": PIQA, "hellaswag": {"acc_norm": "1110", "acc": "1000"}}
    return run(tmp_path / "tuned", better, adapter="lora")


def test_before_and_after(before: Path, after: Path) -> None:
    (table,) = tables([before, after])
    assert (
        table.markdown()
        == """\
**likelihood: accuracy in %, with its standard error**

| task | metric | items | majority | base | tuned | difference |
| :--- | :--- | ---: | ---: | ---: | ---: | ---: |
| BoolQ | acc | 4 | 50.0 | 75.0 ± 21.7 | 100.0 ± 0.0 | +25.0 ± 21.7 |
| PIQA | acc | 4 | 50.0 | 50.0 ± 25.0 | 50.0 ± 25.0 | +0.0 ± 0.0 |
| PIQA | (acc_norm) | 4 | 50.0 | 75.0 ± 21.7 | 75.0 ± 21.7 | +0.0 ± 0.0 |
| HellaSwag | acc_norm | 4 | 50.0 | 25.0 ± 21.7 | 75.0 ± 21.7 | +50.0 ± 25.0 |
| HellaSwag | (acc) | 4 | 50.0 | 0.0 ± 0.0 | 25.0 ± 21.7 | +25.0 ± 21.7 |
| mean of 3 |  | 12 | 50.0 | 50.0 ± 13.2 | 75.0 ± 11.0 | +25.0 ± 11.0 |

- base: tiny, float32
- tuned: tiny with lora, float32
- difference: tuned less base, over the same items
- rows in brackets are not in the mean"""
    )


def test_the_terminal_shows_the_same_numbers(before: Path, after: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    (table,) = tables([before, after])
    with redirect_stdout(io.StringIO()) as printed:
        show(table)
    lines = printed.getvalue().splitlines()
    rows = [line.split() for line in lines if "±" in line]
    assert rows == [" ".join(cells).split() for cells in table.cells[1:]]
    assert [line.strip() for line in lines[-4:]] == list(table.notes)


def test_json_holds_shares_and_fingerprints(before: Path, after: Path) -> None:
    (table,) = tables([before, after])
    plain = json.loads(json.dumps(table.as_dict()))
    assert plain["runs"] == {"base": "tiny, float32", "tuned": "tiny with lora, float32"}
    boolq = plain["rows"][0]
    assert (boolq["task"], boolq["metric"], boolq["n"], boolq["in_mean"]) == ("boolq", "acc", 4, True)
    assert boolq["scores"]["tuned"] == {"value": 1.0, "error": 0.0}
    assert boolq["difference"]["value"] == 0.25
    assert len(boolq["fingerprint"]) == 12
    assert plain["mean"]["scores"]["base"]["value"] == 0.5


def test_the_difference_is_paired_by_item(before: Path, after: Path) -> None:
    (table,) = tables([before, after])
    flips = paired_difference([False, False, True, False], [True, True, True, False])
    assert table.rows[3].difference == flips


def test_more_runs_have_no_difference(before: Path, after: Path, tmp_path: Path) -> None:
    third = run(tmp_path / "third", {"boolq": BOOLQ, "piqa": PIQA, "hellaswag": HELLASWAG}, adapter="dora")
    (table,) = tables([before, after, third])
    assert table.cells[0] == ["task", "metric", "items", "majority", "base", "tuned", "third"]
    assert {len(cells) for cells in table.cells} == {7}


def test_one_run_alone(before: Path) -> None:
    (table,) = tables([before, before])
    assert table.cells[1] == ["BoolQ", "acc", "4", "50.0", "75.0 ± 21.7"]


def test_the_mean_is_over_what_every_run_has(before: Path, tmp_path: Path) -> None:
    less = run(tmp_path / "less", {"piqa": {"acc": "0000", "acc_norm": "0000"}, "openbookqa": {"acc_norm": "1111"}})
    (table,) = tables([before, less])
    assert [cells[0] for cells in table.cells[1:]] == [
        "BoolQ",
        "PIQA",
        "PIQA",
        "HellaSwag",
        "HellaSwag",
        "OBQA",
        "mean of 1",
    ]
    assert table.cells[1][4:] == ["75.0 ± 21.7", "-", "-"]
    assert table.cells[-1][4:6] == ["50.0 ± 25.0", "0.0 ± 0.0"]


def test_nothing_in_common_has_no_mean(tmp_path: Path) -> None:
    one, two = run(tmp_path / "one", {"boolq": BOOLQ}), run(tmp_path / "two", {"piqa": PIQA})
    (table,) = tables([one, two])
    assert table.mean is None
    assert len(table.markdown().splitlines()) == 2 + 2 + 3 + 1 + 4


def test_each_protocol_has_its_table(before: Path, after: Path) -> None:
    run(before, {"boolq": BOOLQ}, protocol="llm-adapters")
    run(after, {"boolq": BOOLQ}, protocol="llm-adapters")
    assert [table.protocol for table in tables([before, after])] == ["likelihood", "llm-adapters"]
    assert [table.protocol for table in tables([before, after], "llm-adapters")] == ["llm-adapters"]


def test_a_protocol_that_not_every_run_has_is_left_out_unless_named(before: Path, after: Path) -> None:
    run(after, {"boolq": BOOLQ}, protocol="llm-adapters")
    assert [table.protocol for table in tables([before, after])] == ["likelihood"]
    with pytest.raises(UserError, match=r"base was not scored by llm-adapters. Run: subspace evaluate .*base evaluate"):
        tables([before, after], "llm-adapters")


def test_runs_without_a_protocol_in_common_are_refused(before: Path, tmp_path: Path) -> None:
    other = run(tmp_path / "other", {"boolq": BOOLQ}, protocol="llm-adapters")
    with pytest.raises(UserError, match=r"other was not scored by likelihood. Run: subspace evaluate .*other"):
        tables([before, other])


def test_an_unknown_protocol_names_the_nearest(before: Path) -> None:
    with pytest.raises(UserError, match="none of base was scored by 'likelyhood'. Did you mean 'likelihood'"):
        tables([before], "likelyhood")


@pytest.mark.parametrize(
    ("part", "remedy"),
    [
        ("items", "score both with the same evaluate.limit"),
        ("task version", "score both with the same version of subspace"),
        ("tokenizer", "use one base model"),
        ("template", "score both with the same evaluate.prompt"),
    ],
)
def test_unlike_numbers_are_refused(before: Path, tmp_path: Path, part: str, remedy: str) -> None:
    other = run(tmp_path / "other", {"boolq": BOOLQ}, ingredients={part: "another"})
    with pytest.raises(
        UserError, match=f"base and other cannot be put side by side: in BoolQ they differ in {part} .*{remedy}"
    ):
        tables([before, other])


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one, two = run(tmp_path / "a" / "lora", {"boolq": BOOLQ}), run(tmp_path / "b" / "lora", {"boolq": BOOLQ})
    (table,) = tables([one, two])
    assert table.cells[0][4:6] == [str(one), str(two)]


def test_truncated_items_are_told(tmp_path: Path) -> None:
    (table,) = tables([run(tmp_path / "base", {"boolq": BOOLQ, "piqa": PIQA}, truncated=3)])
    assert "base: 6 items were longer than the model reads and lost their beginning" in table.notes
