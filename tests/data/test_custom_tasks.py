"""Suites from files: one's own in a few lines of YAML, and the math suites as published; and what was trained on."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from subspace.data import leakage as unseen
from subspace.data import samples as samples_module
from subspace.data.custom_tasks import custom_task, read_local_items
from subspace.data.samples import find_tasks, take_sample
from subspace.data.tasks import find_task, list_tasks
from subspace.errors import UserError
from subspace.evaluation import config as config_module
from subspace.evaluation import evaluate as evaluate_module
from subspace.evaluation import subjects
from subspace.evaluation.answer_extraction import LastNumber
from subspace.evaluation.config import EvaluateConfig, EvaluationSubject
from subspace.evaluation.protocols.likelihood import Likelihood
from subspace.evaluation.protocols.llm_adapters import LLMAdapters
from subspace.evaluation.results import read_items
from subspace.models.config import ModelConfig
from tests.helpers.tiny_models import bpe_tokenizer, tiny_llama

PLANETS = [
    {"question": "Which planet has rings?", "options": ["Mars", "Saturn", "Venus"], "answer": "B"},
    {"question": "Which planet is red?", "options": ["Mars", "Saturn"], "answer": "A"},
    {"question": "Which planet is hot?", "options": ["Mars", "Saturn", "Venus", "Earth"], "answer": "C"},
]
YAML = """file: planets.jsonl
item: {choices: options, label: "'ABCD'.index(answer)"}
"""
MATH = ["multiarith", "gsm8k", "addsub", "aqua", "singleeq", "svamp", "mawps"]


@pytest.fixture
def planets(tmp_path: Path) -> Path:
    (tmp_path / "planets.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in PLANETS))
    (tmp_path / "planets.yaml").write_text(YAML)
    return tmp_path / "planets.yaml"


@pytest.mark.parametrize("protocol", config_module.PROTOCOLS)
def test_a_suite_of_one_s_own_is_scored_by_every_protocol(planets: Path, tmp_path: Path, protocol: str) -> None:
    config = EvaluateConfig(protocol=protocol, tasks=str(planets))
    (result,) = evaluate_module.evaluate(tiny_llama(), bpe_tokenizer(), config, tmp_path)
    assert (result.task, result.n) == ("planets", 3)
    assert result.majority == pytest.approx(1 / 3)
    assert result.items
    records = read_items(result.items)
    assert [record["id"] for record in records] == ["test-0", "test-1", "test-2"]
    words = ["answer2", "answer1", "answer3"]
    assert [record["label"] for record in records] == ([1, 0, 2] if protocol == "likelihood" else words)


def test_it_is_asked_as_arc_is(planets: Path) -> None:
    own, items = custom_task(planets), take_sample(custom_task(planets), "test", None).items
    assert [own.instruction(item) for item in items] == [find_task("arc_easy").instruction(item) for item in items]
    arc = find_task("arc_easy").likelihood
    assert [own.likelihood.requests(item) for item in items] == [arc.requests(item) for item in items]
    assert own.output(items[0]) == "the correct answer is answer2"


def test_its_texts_may_be_one_s_own(planets: Path) -> None:
    planets.write_text(YAML + 'instruction: "Q {{ question }}"\nanswer_words: [x]\nlikelihood: {context: "C:"}\n')
    own, (item, *_) = custom_task(planets), read_local_items(custom_task(planets), "test", None)
    assert own.instruction(item) == "Q Which planet has rings?"
    assert own.likelihood.requests(item)[1] == ("C:", " Saturn")


def test_it_stands_beside_the_declared_ones(planets: Path) -> None:
    assert [one.name for one in find_tasks(f"{planets},obqa,boolq")] == ["boolq", "openbookqa", "planets"]


@pytest.mark.parametrize(
    ("yaml", "complaint"),
    [
        ("title: x\n", "names no file of rows. Add a line 'file: NAME.jsonl'"),
        ("file: gone.jsonl\n", "planets/test was to be read from .*gone.jsonl, which does not exist"),
        ("file: planets.jsonl\n", "planets/test, record 0: 'choices' was to be choices, but .*has question, options"),
        ("file: planets.jsonl\nitem: {choices: options, label: answer}\n", "label 'B' of the choices.*counts the"),
        ("file: planets.jsonl\nitem: {choices: options, label: '7'}\n", "label 7 of the choices"),
        ("file: planets.jsonl\ninstuction: x\n", "has no setting 'instuction'. Did you mean 'instruction"),
    ],
)
def test_what_a_file_lacks_is_told(planets: Path, yaml: str, complaint: str) -> None:
    planets.write_text(yaml)
    with pytest.raises(UserError, match=complaint):
        take_sample(custom_task(planets), "test", None)


def test_a_declared_task_s_name_is_not_taken(planets: Path) -> None:
    with pytest.raises(UserError, match="boolq.yaml has the name of a task that exists already"):
        custom_task(planets.rename(planets.with_name("boolq.yaml")))


# The math suites


def test_the_math_suites_are_declared_in_their_table_s_order() -> None:
    assert [one.name for one in find_tasks("math")] == MATH
    assert not set(MATH) & set(list_tasks())


def published(folder: Path, name: str, rows: list[tuple[str, Any]]) -> Path:
    """Write a suite's file as it is published, as often as its rows are declared."""
    declared = find_task(name).splits["test"]
    assert declared.file
    file = folder / declared.file.path
    file.parent.mkdir(parents=True)
    records = [{"instruction": q, "input": "", "output": "...", "answer": a} for q, a in rows]
    file.write_text(json.dumps((records * declared.rows)[: declared.rows], indent=4))
    return folder


@pytest.mark.parametrize("name", MATH)
def test_a_math_suite_is_read_as_it_is_published(name: str, tmp_path: Path) -> None:
    answers = ["B", "E"] if name == "aqua" else ["576.0", "9.8"]
    folder = published(tmp_path, name, [("How many tiles?", answers[0]), ("How many gallons?", answers[1])])
    sample = take_sample(find_task(name), "test", 40, str(folder))
    assert len({item["id"] for item in sample.items}) == 40
    assert {(item["question"], find_task(name).answer(item)) for item in sample.items} == {
        ("How many tiles?", answers[0]),
        ("How many gallons?", answers[1]),
    }
    assert sample.majority == pytest.approx(0.5, abs=0.01)
    assert find_task(name).instruction(sample.items[0]) == sample.items[0]["question"]


def test_a_file_of_another_length_is_refused(tmp_path: Path) -> None:
    folder = published(tmp_path, "svamp", [("How many?", "1")])
    (folder / "SVAMP" / "test.json").write_text('[{"instruction": "How many?", "answer": "1"}]')
    with pytest.raises(UserError, match="has 1 rows where svamp/test has 1,000"):
        take_sample(find_task("svamp"), "test", None, str(folder))


@pytest.mark.parametrize(
    ("name", "record", "question", "answer"),
    [
        ("gsm8k", {"question": "How many?", "answer": "9 + 9 <<9+9=18>>\n#### 1,018"}, "How many?", "1018"),
        ("svamp", {"Body": "Al has 3 cats", "Question": "How many?", "Answer": "3"}, "Al has 3 cats. How many?", "3"),
        ("multiarith", {"question": "How many?", "final_ans": "8"}, "How many?", "8"),
        (
            "aqua",
            {"question": "How many?", "options": ["A)21", "B)2 m", "C)x)", "D)1", "E)0"], "correct": "C"},
            "How many? Answer Choices: (A) 21 (B) 2 m (C) x) (D) 1 (E) 0",
            "C",
        ),
    ],
)
def test_a_math_suite_from_the_hub_is_asked_alike(name: str, record: Any, question: str, answer: str) -> None:
    item = find_task(name).make_item(record, 0, "test")
    assert (find_task(name).instruction(item), find_task(name).answer(item)) == (question, answer)


@pytest.mark.parametrize(
    ("text", "number", "label", "right"),
    [
        ("He has 24 * 24 = 576 tiles. The answer is 576.", "576.", "576.0", True),
        ("that is $1,018", "1018", "1018", True),
        ("so -3 in all", "-3", "3", False),
        ("about 3.1666", "3.1666", "3.1667", True),
        ("about 3.16", "3.16", "3.1667", False),
        ("none", "", "0", False),
    ],
)
def test_the_last_number_counts(text: str, number: str, label: str, right: bool) -> None:
    extractor = LastNumber()
    assert extractor.find(text) == number
    assert extractor.same(extractor.find(text), label) is right
    assert not extractor.is_final(text)


def test_an_explanation_is_written_first(tmp_path: Path) -> None:
    folder = published(tmp_path, "gsm8k", [("How many?", "1"), ("How much?", "2")])
    items = take_sample(find_task("gsm8k"), "test", 3, str(folder)).items
    scorer = LLMAdapters(tiny_llama(), bpe_tokenizer(), find_task("gsm8k"), items, "alpaca-indented")
    records = scorer.score(tiny_llama(), range(3))
    assert all(len(bpe_tokenizer()(record["text"])["input_ids"]) > 32 for record in records)


def test_likelihood_is_refused_for_what_is_not_declared_for_it() -> None:
    with pytest.raises(UserError, match="likelihood was asked for gsm8k, which is not declared for it.*llm-adapters"):
        Likelihood(tiny_llama(), bpe_tokenizer(), find_task("gsm8k"), [])


# What was trained on


def trained_on(tmp_path: Path, rows: list[str], **settings: Any) -> EvaluationSubject:
    (tmp_path / "own.json").write_text(json.dumps([{"instruction": text, "output": "x"} for text in rows]))
    config = EvaluateConfig(tasks="gsm8k", **settings)
    return EvaluationSubject(ModelConfig(), config, tmp_path / "run", mixture=str(tmp_path / "own.json"))


def sample(count: int = 200) -> samples_module.Sample:
    items: list[Any] = [
        {"id": str(n), "question": f"How many are {n} and {n} ?", "context": "", "choices": [str(2 * n)], "label": 0}
        for n in range(count)
    ]
    return samples_module.Sample(find_task("gsm8k"), items, 0.1)


def test_a_run_that_was_trained_on_the_test_items_is_refused(tmp_path: Path) -> None:
    rows = [f"how many are {n} and {n}?" for n in range(3)]
    with pytest.raises(UserError, match=r"run was trained on .*own.json, which holds 3 of 200 items of gsm8k.*=warn"):
        subjects.check_contamination(trained_on(tmp_path, rows), [sample()])


@pytest.mark.parametrize(("rows", "settings"), [(1, {}), (3, {"on_contamination": "warn"})])
def test_a_few_are_told(rows: int, settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = [f"how many are {n} and {n}?" for n in range(rows)]
    subjects.check_contamination(trained_on(tmp_path, trained, **settings), [sample()])
    assert f"which holds {rows} of 200 items of gsm8k" in capsys.readouterr().err


def test_rows_that_are_gone_are_told_and_need_not_stop_a_scoring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = trained_on(tmp_path, ["how many"])
    Path(subject.mixture).unlink()
    with pytest.raises(UserError, match=r"whether it saw the items is unknown: .*own.json is not there.*=warn"):
        subjects.check_contamination(subject, [sample()])
    warned = trained_on(tmp_path, ["how many"], on_contamination="warn")
    Path(subject.mixture).unlink()
    subjects.check_contamination(warned, [sample()])
    assert "whether it saw the items is unknown" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["own.jsonl.gz", "own.csv", "folder", "own.json*1"])
def test_items_are_found_in_data_of_every_kind(name: str, tmp_path: Path) -> None:
    rows = [{"frage": f"how many are {n} and {n}?", "antwort": "b"} for n in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "own.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "own.csv").write_text("frage,antwort\n" + "".join(f"{row['frage']},b\n" for row in rows))
    (tmp_path / "own.json").write_text(json.dumps(rows))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.jsonl").write_text(lines)
    columns = {"question": "frage", "answer": "antwort"}
    assert unseen.find_overlap(str(tmp_path / name), [sample()], columns) == {"gsm8k": (3, 200)}


def test_other_questions_are_not_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subjects.check_contamination(trained_on(tmp_path, ["how many are 1 and 2?"]), [sample()])
    assert capsys.readouterr().err == ""


def test_a_named_mixture_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"question": item["question"]} for item in sample().items])
    monkeypatch.setattr(unseen, "task_items", lambda name, split: rows)
    subject = EvaluationSubject(ModelConfig(), EvaluateConfig(tasks="gsm8k"), tmp_path, mixture="boolq")
    with pytest.raises(UserError, match="trained on boolq, which holds 200 of 200 items of gsm8k"):
        subjects.check_contamination(subject, [sample()])


def test_a_run_is_told_before_it_is_trained(tmp_path: Path) -> None:
    folder = published(tmp_path, "gsm8k", [("How many?", "1"), ("How much?", "2"), ("How far?", "3")])
    subject = trained_on(tmp_path, ["how many", "other"], data=str(folder))
    (told,) = unseen.overlap_notices(subject.mixture, subject.evaluate.selection)
    assert re.search(r"own.json holds 440 of 1319 items of gsm8k, too many.*refused", told)
    assert not unseen.overlap_notices(
        trained_on(tmp_path, ["other"], data=str(folder)).mixture, subject.evaluate.selection
    )


def test_a_suite_that_is_not_there_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(name: str, split: str) -> datasets.Dataset:
        raise UserError(f"{name} is not on this machine")

    monkeypatch.setattr(samples_module, "task_items", lacking)
    assert not unseen.overlap_notices(
        trained_on(tmp_path, ["x"]).mixture, EvaluateConfig(tasks="gsm8k,boolq").selection
    )
