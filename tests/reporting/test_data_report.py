"""The data report: every kind of match is found where it is and nowhere else, and what is counted is what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from subspace.cli.main import main
from subspace.data import tasks as tasks_module
from subspace.data.contamination import KINDS, Matcher, Text, count_duplicates, question_text, text_keys
from subspace.data.items import make_item

LONG = "the quick brown fox jumps over the lazy dog and then runs back home again tonight"  # 16 words


def matched(test: Text, *rows: Text, ngram: int = 13) -> set[str]:
    """Return by what kinds of match an item is found in training rows."""
    matcher = Matcher([Text("something else entirely", ("x", "y")), test], ngram)
    matcher.read(rows, [f"row {n}" for n in range(len(rows))])
    assert not any(0 in matcher.found[kind] for kind in KINDS)
    return {kind for kind in KINDS if 1 in matcher.found[kind]}


ITEM = Text("Why is the sky blue?", ("Because of Rayleigh.", "It is paint."))


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        (ITEM, {"exact", "normalised", "question"}),
        (ITEM._replace(choices=ITEM.choices[::-1]), {"normalised", "question"}),
        (Text("why is the  sky BLUE", ("because of rayleigh", "[title] It is paint")), {"normalised", "question"}),
        (ITEM._replace(choices=("Because.", "It is paint.")), {"question"}),
        (Text("Why is the sky not blue?", ITEM.choices), set()),
        (Text("Why is the sky blue? Because of Rayleigh. It is paint."), set()),
    ],
)
def test_a_match_is_by_its_definition(row: Text, kinds: set[str]) -> None:
    assert matched(ITEM, Text("another row"), row) == kinds


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (" ".join(LONG.split()[:13]), True),
        (" ".join(LONG.split()[:12]), False),
        ("before it, " + ", ".join(LONG.upper().split()[3:]) + "! and after", True),
        (" ".join([*LONG.split()[:7], "really", *LONG.split()[7:]]), False),
    ],
)
def test_an_ngram_is_words_in_a_row(row: str, found: bool) -> None:
    assert ("n-gram" in matched(Text(LONG), Text("a row before"), Text(row))) == found


def test_an_ngram_does_not_cross_rows() -> None:
    words = LONG.split()
    assert matched(Text(LONG), Text(" ".join(words[:8])), Text(" ".join(words[8:]))) == set()
    assert matched(Text(LONG), Text(" ".join(words[:8]), (" ".join(words[8:]),))) == {"n-gram"}


def test_short_items_are_counted_and_every_owner_of_an_ngram_is_found() -> None:
    matcher = Matcher([Text("short"), Text(LONG), Text(f"well, {LONG}")])
    matcher.read([Text("x"), Text(LONG)], ["one", "two"])
    assert matcher.too_short == {0}
    assert matcher.found["n-gram"] == {1: "two", 2: "two"}


def test_no_text_at_all() -> None:
    matcher = Matcher([Text("")])
    assert matcher.read([], []) == []
    assert matcher.too_short == {0}


def test_duplicates_are_those_that_are_there_again() -> None:
    texts = [ITEM, ITEM._replace(choices=ITEM.choices[::-1]), Text("other"), ITEM]
    assert count_duplicates(text_keys(text).normalised for text in texts) == 2
    assert count_duplicates(text_keys(text).exact for text in texts) == 1


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("boolq", Text("q")),  # its prompt shows no passage, and its choices are always the same
        ("siqa", Text("c\nq", ("a", "b", "c"))),
        ("hellaswag", Text("t\nc", ("a", "b", "c"))),
        ("gsm8k", Text("q")),
    ],
)
def test_what_is_compared_is_what_training_shows(task: str, expected: Text) -> None:
    item = make_item({"id": "1", "topic": "t", "context": "c", "question": "q", "choices": ["a", "b", "c"], "label": 0})
    assert question_text(tasks_module.find_task(task))(item) == expected


# On the real data: slow only where its token ids are not in the cache.


def reported(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["data", *arguments, "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


@pytest.mark.model
def test_the_tasks_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    report = reported(capsys, "openbookqa,arc_easy", "evaluate.tasks=openbookqa,arc_easy", "data.validation=0")
    easy, book = report["suites"]
    assert (easy["items"], book["items"]) == (2376, 500)
    assert book["majority"] == pytest.approx(138 / 500)
    assert book["answers"] == {"1": 138, "2": 126, "3": 132, "4": 104}
    # Counted independently, by other code, before this was written.
    assert {kind: len(book["found"][kind]) for kind in KINDS[:3]} == {"exact": 0, "normalised": 14, "question": 23}
    assert (len(easy["found"]["exact"]), len(easy["found"]["normalised"])) == (2, 3)
    parts = {part["name"]: part for part in report["parts"]}
    assert sum(part["rows"] for part in report["parts"]) == 4957 + 2251
    assert parts["openbookqa/train"]["repeats"] + parts["openbookqa/train"]["alike"] == 43


@pytest.mark.model
def test_repeats_in_a_mixture_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    report = reported(capsys, "openbookqa*2", "evaluate.tasks=openbookqa", "data.validation=0", "data.max_length=100")
    (part,) = report["parts"]
    assert part["rows"] == 2 * 4957
    assert part["repeats"] >= 4957
    assert sum(part["answers"].values()) == 2 * 4957
    assert 0 < part["cut"] < part["rows"]
    assert 0 < report["suites"][0]["cut"] < 500


@pytest.mark.model
def test_a_file_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row is a test item as LLM-Adapters asks it, another has its words in other ones; the rest is harmless."""
    from subspace.data.prepare import task_items

    task, items = tasks_module.find_task("openbookqa"), list(task_items("openbookqa", "test"))
    long = next(i for i, item in enumerate(items) if len(item["question"].split()) > 20)
    rows = [
        {"instruction": task.instruction(items[3]), "output": "the correct answer is answer1"},
        {"instruction": f"A riddle. {items[long]['question']} What then?", "output": "no"},
        {"instruction": "What is two and two?", "output": "four"},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = reported(capsys, str(file), "evaluate.tasks=openbookqa", "data.validation=0")
    found = report["suites"][0]["found"]
    assert found["exact"] == {items[3]["id"]: f"{file}, line 1"}
    assert found["n-gram"][items[long]["id"]] == f"{file}, line 2"
    assert len(found["n-gram"]) <= 2  # the words of the template are nobody's

    assert main(["data", str(file), "evaluate.tasks=openbookqa", "data.validation=0", "--items"]) == 0
    shown = capsys.readouterr().out
    assert "tags as [title] left out" in " ".join(shown.split())
    assert f"{items[3]['id']}" in shown.partition("test items in the training text")[2]


# Rows of one's own.

BAD = [{"instruction": "a", "output": 5}, {"instruction": "a", "output": "b", "chosen": "c"}, {"instruction": "a"}]


def test_a_file_is_shown_without_suites_model_or_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows are refused, nothing else is looked at."""
    monkeypatch.setattr("subspace.models.loading.open_tokenizer", None)
    monkeypatch.setenv("COLUMNS", "300")  # as wide as the table
    good = [{"instruction": "q", "output": "a", "id": n} for n in range(5)]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([*good, *BAD]))
    assert main(["data", str(file), "--json"]) == 2
    (source,) = json.loads(capsys.readouterr().out)["sources"]
    assert (source["rows"], source["shapes"], source["unused"]) == (8, {"instruction": 5}, {"id": 5})
    assert list(source["bad"].values()) == [1, 1, 1]
    assert source["first_bad"][0] == f"{file}, row 6: 'output' is int, not text"
    assert main(["data", str(file)]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("of the shape: instruction", "with the key id, which is not used", "refused", "data.bad_rows=drop"):
        assert text in shown


@pytest.mark.model
def test_a_file_s_rows_and_tokens_are_counted_without_suites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("no suite is looked at")

    monkeypatch.setattr("subspace.reporting.data_report.find_tasks", never)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([{"instruction": f"q{n % 3}", "output": "a"} for n in range(6)] + BAD))
    report = reported(capsys, str(file), "data.validation=0", "data.bad_rows=drop")
    assert report["suites"] == []
    assert report["example"].startswith(f"one of the rows ({file}, row 1), ")
    assert "\u27e6" in report["example"]
    (part,), (source,) = report["parts"], report["sources"]
    assert (part["rows"], part["repeats"], part["alike"]) == (6, 3, 0)
    assert (source["rows"], sum(source["bad"].values())) == (9, 3)
