"""The declared tasks, mixtures and prompts: their texts to the byte, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from subspace.common import download as download_module
from subspace.common.declarations import build
from subspace.common.foreign.templates import render
from subspace.data.items import Item, make_item
from subspace.data.tasks import MixturePart, find_mixture, find_task, list_tasks, prompt_template
from subspace.errors import UserError

NAMES = ["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]

ITEMS: dict[str, dict[str, Any]] = {
    "boolq": {
        "topic": "Ice",
        "context": "Ice is cold.",
        "question": "is ice warm",
        "choices": ["false", "true"],
        "label": 0,
    },
    "piqa": {"question": "dry a cup", "choices": ["a towel ", "a saw"], "label": 0},
    "siqa": {"context": "Al ran.", "question": "Why?", "choices": ["fun", "fear", "fame"], "label": 2},
    "hellaswag": {
        "topic": "Cooking",
        "context": "[header] How to cook [title] Boil it. the cook",
        "question": "the cook",
        "choices": [" [step] stirs  it.", "sings [x] now.", "flees.", "sleeps."],
        "label": 1,
    },
    "winogrande": {"question": "Al fed Bo as _ was hungry. ", "choices": ["Al", "Bo"], "label": 1},
    "arc_easy": {"question": "What floats?", "choices": ["iron", "cork", "lead"], "label": 1},
    "arc_challenge": {"question": "What floats?", "choices": ["iron", "cork", "lead", "gold", "tin"], "label": 1},
    "openbookqa": {"question": "The sun is", "choices": ["hot", "cold", "wet", "small"], "label": 0},
}

INSTRUCTIONS = {
    "boolq": "Please answer the following question with true or false, question: is ice warm?\n\n"
    "Answer format: true/false",
    "piqa": "Please choose the correct solution to the question: dry a cup\n\n"
    "Solution1: a towel \n\nSolution2: a saw\n\nAnswer format: solution1/solution2",
    "siqa": "Please choose the correct answer to the question: Al ran. Why?\n\n"
    "Answer1: fun Answer2: fear Answer3: fame\n\nAnswer format: answer1/answer2/answer3",
    "hellaswag": "Please choose the correct ending to complete the given sentence: Cooking: "
    "[header] How to cook [title] Boil it. the cook\n\n"
    "Ending1:  [step] stirs  it. Ending2: sings [x] now. Ending3: flees. Ending4: sleeps.\n\n"
    "Answer format: ending1/ending2/ending3/ending4",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence: "
    "Al fed Bo as _ was hungry. \n\nOption1: Al Option2: Bo Answer format: option1/option2",
    "arc_easy": "Please choose the correct answer to the question: What floats?\n\n"
    "Answer1: iron Answer2: cork Answer3: lead\n\nAnswer format: answer1/answer2/answer3",
    "arc_challenge": "Please choose the correct answer to the question: What floats?\n\n"
    "Answer1: iron Answer2: cork Answer3: lead Answer4: gold Answer5: tin\n\n"
    "Answer format: answer1/answer2/answer3/answer4/answer5",
    "openbookqa": "Please choose the correct answer to the question: The sun is\n\n"
    "Answer1: hot Answer2: cold Answer3: wet Answer4: small\n\nAnswer format: answer1/answer2/answer3/answer4",
}

ANSWERS = {
    "boolq": "false",
    "piqa": "solution1",
    "siqa": "answer3",
    "hellaswag": "ending2",
    "winogrande": "option2",
    "arc_easy": "answer2",
    "arc_challenge": "answer2",
    "openbookqa": "answer1",
}

# The first request, the last, and the characters that acc_norm divides by, by lm-evaluation-harness's definitions.
REQUESTS: dict[str, tuple[tuple[str, str], tuple[str, str], list[int]]] = {
    "boolq": (
        ("Ice -- Ice is cold.\nQuestion: is ice warm?\nAnswer:", " no"),
        ("Ice -- Ice is cold.\nQuestion: is ice warm?\nAnswer:", " yes"),
        [2, 3],
    ),
    "piqa": (("Question: dry a cup\nAnswer:", " a towel "), ("Question: dry a cup\nAnswer:", " a saw"), [8, 5]),
    "siqa": (("Q: Al ran. Why?\nA:", " fun"), ("Q: Al ran. Why?\nA:", " fame"), [3, 4, 4]),
    "hellaswag": (
        ("Cooking: How to cook. Boil it. The cook", "  stirs it."),
        ("Cooking: How to cook. Boil it. The cook", " sleeps."),
        [10, 10, 6, 7],
    ),
    "winogrande": (("Al fed Bo as Al", " was hungry."), ("Al fed Bo as Bo", " was hungry."), [11, 11]),
    "arc_easy": (("Question: What floats?\nAnswer:", " iron"), ("Question: What floats?\nAnswer:", " lead"), [4, 4, 4]),
    "arc_challenge": (
        ("Question: What floats?\nAnswer:", " iron"),
        ("Question: What floats?\nAnswer:", " tin"),
        [4, 4, 4, 4, 3],
    ),
    "openbookqa": (("The sun is", " hot"), ("The sun is", " small"), [3, 4, 3, 5]),
}


def item(name: str) -> Item:
    return make_item(ITEMS[name])


def test_the_eight_tasks_are_declared_in_the_tables_order() -> None:
    assert list(list_tasks()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_instruction_is_llm_adapters(name: str) -> None:
    assert find_task(name).instruction(item(name)) == INSTRUCTIONS[name]


@pytest.mark.parametrize("name", NAMES)
def test_answer_is_one_of_the_words_looked_for(name: str) -> None:
    assert find_task(name).answer(item(name)) == ANSWERS[name]
    assert find_task(name).output(item(name)) == f"the correct answer is {ANSWERS[name]}"
    assert ANSWERS[name] in find_task(name).answer_words


@pytest.mark.parametrize("name", NAMES)
def test_likelihood_requests_are_the_harness_s(name: str) -> None:
    requests = find_task(name).likelihood.requests(item(name))
    first, last, characters = REQUESTS[name]
    assert (requests[0], requests[-1], len(requests)) == (first, last, len(ITEMS[name]["choices"]))
    assert find_task(name).likelihood.normalizers(item(name)) == characters


@pytest.mark.parametrize("name", NAMES)
def test_labels_of_the_test_split_add_up(name: str) -> None:
    test = find_task(name).splits["test"]
    assert sum(test.labels) == test.rows
    assert find_task(name).majority == max(test.labels) / test.rows


@pytest.mark.parametrize("name", ["ARC-Easy", "arc_easy", "ARC-e", "arc easy"])
def test_a_task_is_found_by_its_aliases(name: str) -> None:
    assert find_task(name).name == "arc_easy"


def test_an_unknown_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"no task is called 'bolq'\. Did you mean 'boolq'\? There are 19, the nearest boolq, "
    ):
        find_task("bolq")


@pytest.mark.parametrize("name", ["commonsense"])
def test_a_mixture_s_parts_add_up_to_its_rows(name: str) -> None:
    parts = find_mixture(name).parts
    assert (
        sum(part.first or find_task(part.task).splits[part.split].rows for part in parts)
        == find_mixture(name).rows
        == 170420
    )


def test_the_training_prompt_is_the_published_one() -> None:
    spaces = " " * 16
    assert render(prompt_template("alpaca-indented"), {"instruction": "Sing.", "input": ""}) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.  \n\n"
        f"{spaces}### Instruction:\n{spaces}Sing.\n{spaces}\n{spaces}### Response:\n{spaces}"
    )


@pytest.mark.parametrize("name", ["alpaca-indented", "alpaca", "none"])
def test_a_prompt_shows_the_input_where_there_is_one(name: str) -> None:
    with_input = render(prompt_template(name), {"instruction": "Sing this.", "input": "la la"})
    without = render(prompt_template(name), {"instruction": "Sing this.", "input": ""})
    assert with_input.index("Sing this.") < with_input.index("la la")
    assert "Input" not in without


def test_an_unknown_prompt_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'alpaca'"):
        prompt_template("alpacca")


@pytest.mark.parametrize(
    ("wanted", "parts"),
    [
        ("boolq", [MixturePart("boolq")]),
        ("ARC-e", [MixturePart("arc_easy")]),
        (
            "boolq, piqa:500,siqa*0.5",
            [MixturePart("boolq"), MixturePart("piqa", rows=500), MixturePart("siqa", weight=0.5)],
        ),
    ],
)
def test_a_mixture_by_tasks(wanted: str, parts: list[MixturePart]) -> None:
    assert find_mixture(wanted).parts == tuple(parts)


@pytest.mark.parametrize("wanted", ["comonsense", "boolq,pikwa", "boolq:many", "boolq*1.2.3", ""])
def test_an_unknown_mixture_is_refused(wanted: str) -> None:
    with pytest.raises(UserError, match=r"no mixture, task, file or folder is called .* There are: .*commonsense"):
        find_mixture(wanted)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("parts: [{task: boolq, weigth: 2}]", "part has no setting 'weigth'. Did you mean 'weight'"),
        ("title: nothing", "mixture lacks parts"),
        ("parts: [{task: boolq, split: trein}]", "Did you mean 'train'"),
        ("parts: [{task: boolq, rows: -1}]", "negative"),
        ("parts: [", "is not YAML"),
        ("- boolq", "should be a mapping"),
    ],
)
def test_a_broken_mixture_file_is_named(content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match="mine") as refused:
        find_mixture(str(file))
    assert says in str(refused.value)


def test_a_mixture_file_of_one_s_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("parts: [{task: ARC-c, weight: 2.5}, {task: winogrande, first: 640}]")
    assert find_mixture(str(file)).parts == (
        MixturePart("arc_challenge", weight=2.5),
        MixturePart("winogrande", first=640),
    )


def test_a_record_that_does_not_fit_is_named() -> None:
    with pytest.raises(UserError, match=r"piqa/test, record 7: 'question' was to be goal.*the record has aim, sol1"):
        find_task("piqa").make_item({"aim": "x", "sol1": "a", "sol2": "b", "label": 0}, 7, "test")


@pytest.mark.parametrize("name", NAMES)
def test_the_digest_follows_what_decides_the_rows(name: str) -> None:
    import dataclasses

    changed = dataclasses.replace(find_task(name), item={**find_task(name).item, "question": "'x'"})
    assert changed.digest != find_task(name).digest
    assert dataclasses.replace(find_task(name), title="other").digest == find_task(name).digest


def test_what_a_declaration_lacks_is_named() -> None:
    with pytest.raises(UserError, match="there: hub lacks split"):
        build(download_module.Hub, {"repo": "a/b"}, "there")
