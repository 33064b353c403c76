"""Tables in every form: golden Markdown and JSON, seeds of one method, ties, and what may not stand side by side."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from subspace.common.tables import BEST, FORMATS, TIED, print_grid
from subspace.errors import UserError
from subspace.evaluation.results import TaskResult, accuracy, items_file, write_items, write_results
from subspace.reporting import statistics
from subspace.reporting.comparison import compare_runs
from subspace.reporting.plots import plot
from subspace.reporting.table_formats import write
from subspace.reporting.tables import build_tables

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
        records: list[Any] = [{"id": i, "correct": {m: r[i] for m, r in right.items()}} for i in range(n)]
        write_items(file, records)
        values: dict[str, Any] = {"model": "tiny", "adapter": "", "dtype": "float32", "truncated": 0, "seconds": 1.0}
        results.append(
            TaskResult(
                **(values | changes),
                protocol=protocol,
                task=task,
                metrics={metric: accuracy(several) for metric, several in right.items()},
                n=n,
                majority=0.5,
                fingerprint_fields={**ingredients, "task": task},
                items=file,
            )
        )
    write_results(folder, results)
    return folder


def trained(folder: Path, right: str, *, seed: int, scored: dict[str, Any] | None = None, **config: Any) -> Path:
    """Make a trained run's folder, scored on BoolQ and PIQA."""
    run(folder, {"boolq": {"acc": right}, "piqa": {"acc": right[::-1]}}, adapter="lora", **(scored or {}))
    about = {"name": folder.name, "method": {"name": "lora", "r": 8}, "train": {"seed": seed}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(about))
    return folder


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return run(tmp_path / "base", {"hellaswag": HELLASWAG, "boolq": BOOLQ, "piqa": PIQA})


@pytest.fixture
def after(tmp_path: Path) -> Path:
    better = {"boolq": {"acc": "1111"}, "piqa": PIQA, "hellaswag": {"acc_norm": "1110", "acc": "1000"}}
    return run(tmp_path / "tuned", better, adapter="lora")


def test_before_and_after(before: Path, after: Path) -> None:
    (table,) = build_tables([before, after])
    assert (
        table.markdown()
        == """\
**likelihood: accuracy in % [95 % interval]**

| task | metric | items | majority | base | tuned | difference |
| :--- | :--- | ---: | ---: | ---: | ---: | ---: |
| BoolQ | acc | 4 | 50.0 | 75.0 [24.2, 98.7] ◇ | 100.0 [47.3, 100.0] ◆ | +25.0 [-38.3, +71.7] |
| PIQA | acc | 4 | 50.0 | 50.0 [9.4, 90.6] ◆ | 50.0 [9.4, 90.6] ◆ | +0.0 [-46.2, +46.2] |
| PIQA | (acc_norm) | 4 | 50.0 | 75.0 [24.2, 98.7] ◆ | 75.0 [24.2, 98.7] ◆ | +0.0 [-46.2, +46.2] |
| HellaSwag | acc_norm | 4 | 50.0 | 25.0 [1.3, 75.8] ◇ | 75.0 [24.2, 98.7] ◆ | +50.0 [-26.3, +93.0] |
| HellaSwag | (acc) | 4 | 50.0 | 0.0 [0.0, 52.7] ◇ | 25.0 [1.3, 75.8] ◆ | +25.0 [-38.3, +71.7] |
| mean of 3 |  | 12 | 50.0 | 50.0 [23.0, 77.0] ◇ | 75.0 [44.1, 93.7] ◆ | +25.0 [-10.6, +53.5] |

- base: tiny, float32
- tuned: tiny with lora, float32
- ◆ best, ◇ not significantly different from the best (p ≥ 0.05 after Holm)
- difference: tuned minus base, over the same items
- rows in brackets are not in the mean"""
    )


def test_the_terminal_shows_the_same_numbers(before: Path, after: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    (table,) = build_tables([before, after])
    with redirect_stdout(io.StringIO()) as printed:
        print_grid(table.grid)
    lines = printed.getvalue().splitlines()
    rows = [line.split() for line in lines if "[" in line]
    assert rows[1:] == [" ".join(cells).split() for cells in table.grid.rows]
    assert [line.strip() for line in lines[-len(table.notes) :]] == list(table.notes)


def test_json_holds_shares_and_fingerprints(before: Path, after: Path) -> None:
    (table,) = build_tables([before, after])
    plain = json.loads(json.dumps(table.as_dict()))
    assert plain["methods"]["tuned"] == {"about": "tiny with lora, float32", "runs": [str(after)]}
    boolq = plain["rows"][0]
    assert (boolq["task"], boolq["metric"], boolq["n"], boolq["in_mean"]) == ("boolq", "acc", 4, True)
    score = boolq["scores"]["tuned"]
    assert (score["value"], score["error"], score["seeds"], score["best"]) == (1.0, 0.0, 1, True)
    assert (score["low"], score["high"]) == pytest.approx((0.4729, 1.0), abs=1e-4)
    assert boolq["difference"]["value"] == 0.25
    assert len(boolq["fingerprint"]) == 12
    assert plain["means"][0]["scores"]["base"]["value"] == 0.5


def test_the_difference_is_paired_by_item(before: Path, after: Path) -> None:
    (table,) = build_tables([before, after])
    one, other = ([[[0.0, 0, 1, 0]]], [[[1.0, 1, 1, 0]]])
    expected = statistics.difference([np.array(task) for task in one], [np.array(task) for task in other])
    assert table.rows[3].difference == expected
    assert (expected.value, expected.lost, expected.gained) == (0.5, 0, 2)


def test_more_runs_have_no_difference(before: Path, after: Path, tmp_path: Path) -> None:
    third = run(tmp_path / "third", {"boolq": BOOLQ, "piqa": PIQA, "hellaswag": HELLASWAG}, adapter="dora")
    (table,) = build_tables([before, after, third])
    assert table.grid.head == ("task", "metric", "items", "majority", "base", "tuned", "third")
    assert {len(cells) for cells in table.grid.rows} == {7}


def test_one_run_alone(before: Path) -> None:
    (table,) = build_tables([before, before])
    assert table.grid.rows[0] == ("BoolQ", "acc", "4", "50.0", "75.0 [24.2, 98.7]")


def test_the_mean_is_over_what_every_run_has(before: Path, tmp_path: Path) -> None:
    less = run(tmp_path / "less", {"piqa": {"acc": "0000", "acc_norm": "0000"}, "openbookqa": {"acc_norm": "1111"}})
    (table,) = build_tables([before, less])
    assert [cells[0] for cells in table.grid.rows] == [
        "BoolQ",
        "PIQA",
        "PIQA",
        "HellaSwag",
        "HellaSwag",
        "OBQA",
        "mean of 1",
    ]
    assert table.grid.rows[0][4:] == ("75.0 [24.2, 98.7]", "-", "-")
    assert [cell and cell.value for cell in table.means[0].cells] == [0.5, 0.0]


def test_nothing_in_common_has_no_mean(tmp_path: Path) -> None:
    one, two = run(tmp_path / "one", {"boolq": BOOLQ}), run(tmp_path / "two", {"piqa": PIQA})
    (table,) = build_tables([one, two])
    assert table.means == ()
    assert [cells[4:6].count("-") for cells in table.grid.rows] == [1, 1, 1]


def test_each_protocol_has_its_table(before: Path, after: Path) -> None:
    run(before, {"boolq": BOOLQ}, protocol="llm-adapters")
    run(after, {"boolq": BOOLQ}, protocol="llm-adapters")
    assert [table.protocol for table in build_tables([before, after])] == ["likelihood", "llm-adapters"]
    assert [table.protocol for table in build_tables([before, after], "llm-adapters")] == ["llm-adapters"]


def test_a_protocol_that_not_every_run_has_is_left_out_unless_named(before: Path, after: Path) -> None:
    run(after, {"boolq": BOOLQ}, protocol="llm-adapters")
    assert [table.protocol for table in build_tables([before, after])] == ["likelihood"]
    with pytest.raises(UserError, match=r"base was not scored by llm-adapters. Run: subspace evaluate .*base evaluate"):
        build_tables([before, after], "llm-adapters")


def test_runs_without_a_protocol_in_common_are_refused(before: Path, tmp_path: Path) -> None:
    other = run(tmp_path / "other", {"boolq": BOOLQ}, protocol="llm-adapters")
    with pytest.raises(UserError, match=r"other was not scored by likelihood. Run: subspace evaluate .*other"):
        build_tables([before, other])


def test_an_unknown_protocol_names_the_nearest(before: Path) -> None:
    with pytest.raises(UserError, match="none of base was scored by 'likelyhood'. Did you mean 'likelihood'"):
        build_tables([before], "likelyhood")


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
        UserError, match=f"base and other cannot be compared: in BoolQ they differ in {part} .*{remedy}"
    ):
        build_tables([before, other])


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one, two = run(tmp_path / "a" / "lora", {"boolq": BOOLQ}), run(tmp_path / "b" / "lora", {"boolq": BOOLQ})
    (table,) = build_tables([one, two])
    assert table.grid.head[4:6] == (str(one), str(two))


def test_truncated_items_are_told(tmp_path: Path) -> None:
    (table,) = build_tables([run(tmp_path / "base", {"boolq": BOOLQ, "piqa": PIQA}, truncated=3)])
    assert "base: 6 items exceeded the model's window and lost their beginning" in table.notes


# Seeds of one method.

RIGHT = ("1111111000", "1111110000", "1111111100")


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    return [trained(tmp_path / f"lora-seed{i}", right, seed=i, runs=f"r{i}") for i, right in enumerate(RIGHT)]


def test_runs_that_differ_in_their_seed_are_one_column(seeds: list[Path]) -> None:
    (table,) = build_tables(seeds)
    assert table.grid.head[4:] == ("lora ×3",)
    cell = table.rows[0].cells[0]
    assert cell
    assert (cell.value, cell.sd, cell.seeds) == pytest.approx((0.7, 0.1, 3))
    assert table.grid.rows[0][4].startswith("70.0 ± 10.0 [")
    assert "lora-seed1 (seed 1)" in table.notes[0]
    expected = statistics.estimate([np.array([[float(mark) for mark in right] for right in RIGHT])])
    assert (cell.low, cell.high) == (expected.low, expected.high)


@pytest.mark.parametrize("changes", [{"method": {"name": "lora", "r": 16}}, {"train": {"seed": 3, "steps": 7}}])
def test_another_setting_is_another_method(seeds: list[Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    other = trained(tmp_path / "lora-other", RIGHT[0], seed=3, **changes)
    assert [column.name for column in build_tables([*seeds, other])[0].columns] == ["lora ×3", "lora-other"]


def test_a_seed_twice_is_no_new_evidence(seeds: list[Path], tmp_path: Path) -> None:
    again = trained(tmp_path / "again", RIGHT[0], seed=0)
    assert [len(column.runs) for column in build_tables([*seeds, again])[0].columns] == [3, 1]


def test_one_seed_is_said_to_be_one(seeds: list[Path], before: Path) -> None:
    (table,) = build_tables([*seeds[:2], trained(seeds[0].parent / "dora", RIGHT[0], seed=0, method={"name": "dora"})])
    assert "one seed only: dora. These numbers hold for the runs, not for the methods" in table.notes


def test_a_task_that_one_seed_lacks_is_not_there(seeds: list[Path]) -> None:
    rows = [result for result in json.loads((seeds[1] / "results.json").read_text()) if result["task"] == "piqa"]
    (seeds[1] / "results.json").write_text(json.dumps(rows))
    (table,) = build_tables(seeds)
    assert [(row.task, row.in_mean) for row in table.rows] == [("piqa", True)]


# Ties.


def test_ties_with_the_best_are_marked(tmp_path: Path) -> None:
    marks = {"best": "1" * 60 + "0" * 40, "close": "1" * 56 + "0" * 44, "far": "1" * 20 + "0" * 80}
    folders = [run(tmp_path / name, {"boolq": {"acc": right}}) for name, right in marks.items()]
    (table,) = build_tables(folders)
    (row,) = table.rows
    assert [text[-1] for text in row.texts[4:7]] == [BEST, TIED, "]"]
    p_values = [statistics.mcnemar(0, 4), statistics.mcnemar(0, 40)]
    assert [cell.p for cell in row.cells if cell] == [None, *statistics.holm(p_values)]


def test_holm_corrects_over_the_methods_of_a_row(tmp_path: Path) -> None:
    """Six items of difference are p = 0.031: enough against one other method, not among three."""
    folders = [run(tmp_path / "best", {"boolq": {"acc": "1" * 26 + "0" * 4}})]
    folders += [run(tmp_path / f"m{i}", {"boolq": {"acc": "1" * 20 + "0" * 10}}) for i in range(3)]
    assert TIED not in build_tables(folders[:2])[0].markdown().split("-")[0]
    assert [text[-1] for text in build_tables(folders[:2])[0].grid.rows[0][4:6]] == [BEST, "]"]
    assert [text[-1] for text in build_tables(folders)[0].grid.rows[0][4:]] == [BEST, TIED, TIED, TIED]


def test_other_items_under_one_fingerprint_are_refused(before: Path, after: Path) -> None:
    file = items_file(after, "likelihood", "boolq")
    file.write_text(file.read_text().replace('"id": 3', '"id": 4'))
    with pytest.raises(UserError, match="the items of BoolQ in .* differ"):
        build_tables([before, after])


def test_equal_scores_are_all_best_in_any_order_of_the_columns(tmp_path: Path) -> None:
    marks = {"one": "1110", "two": "0111", "three": "1101", "less": "0001"}
    folders = {name: run(tmp_path / name, {"boolq": {"acc": right}}) for name, right in marks.items()}
    shown = []
    for order in (["one", "two", "three", "less"], ["less", "three", "one", "two"], ["two", "less", "one", "three"]):
        (table,) = build_tables([folders[name] for name in order])
        shown.append({name: str(cell) for name, cell in zip(order, table.rows[0].cells, strict=True)})
    assert shown[0] == shown[1] == shown[2]
    assert [text[-1] for text in shown[0].values()] == [BEST, BEST, BEST, TIED]


def test_of_several_best_ones_the_same_is_compared_with_in_any_order(tmp_path: Path) -> None:
    """Of a third one the p-value is 0.01 beside the one, and 0.08 beside the other."""
    marks = {"one": 16 * "1" + 4 * "0", "two": 4 * "0" + 16 * "1", "less": 8 * "1" + 12 * "0"}
    folders = {name: run(tmp_path / name, {"boolq": {"acc": right}}) for name, right in marks.items()}
    found = set()
    for order in (["one", "two", "less"], ["two", "one", "less"]):
        (table,) = build_tables([folders[name] for name in order])
        cell = table.rows[0].cells[2]
        assert cell
        found.add(cell.p)
    assert found == {0.0078125}


# One subject a column.


def subjects(folder: Path, **changes: dict[str, Any]) -> Path:
    """Make a folder whose tasks were scored with these changes, by task."""
    for task, changed in changes.items():
        run(folder, {task: {"acc": "1101"}}, **changed)
    return folder


@pytest.mark.parametrize(
    ("other", "names"),
    [
        ({"subject": "bbbb", "dtype": "bfloat16"}, ("run (float32)", "run (bfloat16)")),
        ({"subject": "bbbb"}, ("run (weights aaaa)", "run (weights bbbb)")),
        ({"subject": "bbbb", "base": {"weights": "x"}}, ("run (weights aaaa)", "run (weights bbbb)")),
        ({"subject": ""}, ("run (weights aaaa)", "run (weights tiny--fl)")),
    ],
)
def test_results_of_different_weights_in_one_folder_are_different_columns(
    tmp_path: Path, other: dict[str, Any], names: tuple[str, str]
) -> None:
    first = {"subject": "aaaa"}
    folder = subjects(tmp_path / "run", boolq=first, piqa=other, siqa=first)
    (table,) = build_tables([folder])
    assert table.grid.head[4:6] == names
    assert [(row.task, [cell is not None for cell in row.cells]) for row in table.rows] == [
        ("boolq", [True, False]),
        ("piqa", [False, True]),
        ("siqa", [True, False]),
    ]
    assert table.means == ()
    with pytest.raises(UserError, match=r"run cannot be compared: its results are of different weights or dtypes"):
        compare_runs([folder, run(tmp_path / "b", {"boolq": BOOLQ})])


def test_results_of_one_subject_are_one_column(tmp_path: Path) -> None:
    folder = subjects(tmp_path / "run", boolq={"subject": "aaaa"}, piqa={"subject": "aaaa"})
    (table,) = build_tables([folder])
    assert (table.grid.head[4:], len(table.means)) == (("run",), 1)


@pytest.mark.parametrize("scored", [{"dtype": "bfloat16"}, {"base": {"weights": "other"}}])
def test_seeds_that_were_scored_on_another_base_or_in_another_dtype_are_no_seeds_of_one_method(
    tmp_path: Path, scored: dict[str, Any]
) -> None:
    folders = [trained(tmp_path / f"lora-{i}", RIGHT[i], seed=i) for i in range(2)]
    folders.append(trained(tmp_path / "lora-2", RIGHT[2], seed=2, scored=scored))
    assert [len(column.runs) for column in build_tables(folders)[0].columns] == [2, 1]


# Suites of one's own.


def test_own_tasks_keep_their_titles_and_suites(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for task, about in {
        "planets": {"title": "The planets", "suite": "planets"},
        "moons": {"title": "Moons", "suite": "sky"},
        "stars": {"title": "Stars", "suite": "sky"},
        "older": {},
    }.items():
        run(folder, {task: {"acc": "1101" if task != "stars" else "1111"}}, **about)
    (table,) = build_tables([folder])
    assert [row[0] for row in table.grid.rows] == ["Moons", "older", "The planets", "Stars", "mean of 2 sky"]
    assert table.means[0].cells[0] is not None
    assert table.means[0].cells[0].value == 0.875
    (found,) = compare_runs([folder, shutil.copytree(folder, tmp_path / "again")])
    assert [line.title for line in found.tasks] == ["Moons", "older", "The planets", "Stars"]
    assert {line.title for line in found.means} == {"older", "The planets", "mean of 2 sky"}


# What training took.


def took(folder: Path, trained: Any, steps: Any, seconds: Any) -> None:
    about = {"adapters": {"trained": trained}, "outcome": {"steps": steps, "seconds": seconds}}
    (folder / "environment.json").write_text(json.dumps(about))


def test_what_training_took_is_below_the_scores(seeds: list[Path], tmp_path: Path) -> None:
    before = run(tmp_path / "base", {"boolq": {"acc": RIGHT[0]}, "piqa": {"acc": RIGHT[1]}})
    for number, folder in enumerate(seeds):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["train"]["learning_rate"] = 0.0002
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        took(folder, 1327104, 80, 100.0 + 10 * number)
    (table,) = build_tables([before, *seeds])
    assert table.grid.rows[-4:] == (
        ("trained numbers", "", "", "", "-", "1,327,104", ""),
        ("steps", "", "", "", "-", "80", ""),
        ("learning rate", "", "", "", "-", "0.0002", ""),
        ("training seconds", "", "", "", "-", "110", ""),
    )
    assert table.grid.transposed().head[-4:] == ("trained numbers", "steps", "learning rate", "training seconds")
    plain = table.as_dict()["methods"]
    assert plain["lora ×3"]["trained"] == 1327104
    assert "trained" not in plain["base"]
    (line, *_) = [line for line in csv.DictReader(io.StringIO(write([table], "csv"))) if line["method"] == "lora ×3"]
    assert [float(line[key]) for key in ("trained", "steps", "learning_rate", "seconds")] == [1327104, 80, 0.0002, 110]


@pytest.mark.parametrize("about", ["", "{", "5", "[1]", '{"adapters": 5, "outcome": {"steps": "many"}}', "[" * 100_000])
def test_what_training_took_may_be_unknown(seeds: list[Path], about: str) -> None:
    took(seeds[0], 7, 8, 9)
    (seeds[1] / "environment.json").write_text(about)
    (table,) = build_tables(seeds)
    assert len(table.grid.rows) == len(table.rows) + len(table.means)
    took(seeds[1], -1, True, float("inf"))
    (table,) = build_tables(seeds[:2])
    assert len(table.grid.rows) == len(table.rows) + len(table.means)


# Forms.


def test_csv_has_a_line_for_each_task_and_method(before: Path, after: Path) -> None:
    lines = list(csv.DictReader(io.StringIO(write(build_tables([before, after]), "csv"))))
    assert len(lines) == 2 * 6
    assert {line["method"] for line in lines} == {"base", "tuned"}
    (one,) = [line for line in lines if line["task"] == "boolq" and line["method"] == "base"]
    assert (one["value"], one["items"], one["best"]) == ("0.75", "4", "False")
    assert float(one["low"]) == pytest.approx(0.2423, abs=1e-4)


def test_latex_is_escaped_and_marks_the_best(before: Path, after: Path) -> None:
    text = write(build_tables([before, after]), "latex")
    assert "PIQA & (acc\\_norm) & 4 & 50.0 &" in text
    assert "\\textbf{100.0 [47.3, 100.0]} &" in text
    assert "\\underline{75.0 [24.2, 98.7]} &" in text
    rows = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert {line.count(" & ") for line in rows} == {6}
    assert text.count("\\midrule") == 2
    assert not any(symbol in text for symbol in (BEST, TIED))


def table_of(page: str) -> str:
    """Return a page's first table, without its charts."""
    return page[page.index('<section id="table-1"') : page.index('<section id="charts-1"')]


def test_html_is_a_page_with_every_cell(before: Path, after: Path) -> None:
    (table,) = build_tables([before, after])
    page = table_of(write([table], "html"))
    assert page.count("<td") + page.count('<th scope="row"') == sum(map(len, table.grid.rows))
    assert page.count("<tbody>") == 2
    assert f'<td class="best">100.0 [47.3, 100.0] {BEST}</td>' in page


def test_a_turned_table_has_methods_down(before: Path, after: Path) -> None:
    (table,) = build_tables([before, after])
    grid = table.grid.transposed()
    assert grid.head == ("task", "BoolQ", "PIQA", "PIQA", "HellaSwag", "HellaSwag", "mean of 3")
    assert [row[0] for row in grid.rows] == ["metric", "items", "majority", "base", "tuned", "difference"]
    assert grid.transposed().rows == table.grid.rows


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "terminal"])
def test_every_form_has_every_table(before: Path, after: Path, form: str) -> None:
    for folder in (before, after):
        run(folder, {"boolq": BOOLQ}, protocol="llm-adapters")
    text = write(build_tables([before, after]), form)
    assert "likelihood" in text
    assert "llm-adapters" in text


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_plot_is_drawn(seeds: list[Path], tmp_path: Path, suffix: str, begins: bytes) -> None:
    other = trained(tmp_path / "dora", RIGHT[0], seed=0, method={"name": "dora"})
    (file,) = plot(build_tables([*seeds, other]), tmp_path / "plots" / f"scores{suffix}")
    assert file.read_bytes().startswith(begins)


def test_a_plot_is_the_same_each_time(before: Path, after: Path, tmp_path: Path) -> None:
    drawn = [plot(build_tables([before, after]), tmp_path / f"{i}.svg")[0].read_bytes() for i in range(2)]
    assert drawn[0] == drawn[1]


def test_an_unknown_kind_of_plot_is_refused(before: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is one of: .png, .svg, .pdf"):
        plot(build_tables([before]), tmp_path / "scores.gif")


HOSTILE = [
    "[x] title",
    "*starred",
    "<script>alert(1)</script>",
    "a | b \\| c",
    "![i](javascript:x)",
    "[a]: http://x",
    "`code` _em_ *em* ~~gone~~ $x$",
    "two\nlines\r\nthree\u2028four",
    "\x1b[31mred\x07\u202egnitirw",
    "=HYPERLINK(1)",
    "+1+1",
    "-1+1",
    "@SUM(1)",
    " =1",
    "\t=1",
    "100% & #1 _x_ {y} ^z",
]


@pytest.fixture
def hostile(tmp_path: Path) -> list[Path]:
    """Make runs whose tasks have these titles."""
    for number, name in enumerate(HOSTILE):
        run(tmp_path / "run", {f"t{number:02}": {"acc": "1101"}}, title=name, suite=name)
    return [tmp_path / "run"]


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "terminal"])
def test_names_from_anybodys_files_are_text_in_every_form(hostile: list[Path], form: str) -> None:
    text = write(build_tables(hostile), form)
    if form != "json":
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e]", text)
    lines = text.splitlines()
    if form == "markdown":
        rows = [line for line in lines if line.startswith("|")]
        assert len(rows) == len(HOSTILE) + 2
        assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows} == {6}
        assert "<" not in text
        assert not re.search(r"(?<!\\)\][(:]", text)
        assert not re.search(r"(?<!\\)[`*~$](?!\*)", "\n".join(rows))
    elif form == "latex":
        cells = [line.split(" & ")[0] for line in lines if line.endswith("\\\\")]
        assert len(cells) == len(HOSTILE) + 1
        assert not any(cell.startswith(("[", "*")) for cell in cells)
        assert not re.search(r"(?<!\\)[&#_$](?![& ])", "\n".join(cells[1:]).replace("$\\", ""))
    elif form == "html":
        assert "<script" not in text
        assert table_of(text).count("<tr>") == len(HOSTILE) + 1
    elif form == "csv":
        assert len(lines) == len(HOSTILE) + 1


def test_a_cell_of_csv_is_no_formula(tmp_path: Path) -> None:
    folders = [run(tmp_path / name, {"boolq": BOOLQ}) for name in ("=1+1", "+x", "-y", "@z", "plain")]
    lines = list(csv.DictReader(io.StringIO(write(build_tables(folders), "csv"))))
    assert [line["method"] for line in lines] == ["'=1+1", "'+x", "'-y", "'@z", "plain"]


def test_a_plot_draws_names_that_look_like_formulas(tmp_path: Path) -> None:
    folder = run(tmp_path / "a$\\frac{$", {"own": {"acc": "1101"}}, title="$\\x$ \x07")
    (file,) = plot(build_tables([folder]), tmp_path / "scores.svg")
    assert file.is_file()
