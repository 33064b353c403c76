"""Protocol ``answer-word``: each answer by its log-probability after the prompt, and how often generation agrees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from subspace.common.foreign.templates import render
from subspace.data import samples as samples_module
from subspace.data import tasks as tasks_module
from subspace.data.items import Item, make_item, relabel
from subspace.data.tokenization import encode_prompt, encode_rows
from subspace.errors import UserError
from subspace.evaluation import evaluate as evaluate_module
from subspace.evaluation.answer_extraction import AnswerWords
from subspace.evaluation.config import EvaluateConfig
from subspace.evaluation.protocols.answer_word import AnswerWord
from subspace.evaluation.protocols.llm_adapters import LLMAdapters
from subspace.evaluation.results import read_items, write_items
from subspace.reporting.agreement import agreement
from tests.helpers.items import items
from tests.helpers.tiny_models import bpe_tokenizer, tiny_llama
from tests.workers.score_tasks import score


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def plain_scores(name: str, item: Item) -> list[float]:
    """Score each answer alone after the prompt that ``llm-adapters`` asks, from the definition."""
    model, tokenizer, task = tiny_llama(), bpe_tokenizer(), tasks_module.find_task(name)
    template = tasks_module.prompt_template("alpaca-indented")
    prompt = render(template, {"instruction": task.instruction(item), "input": ""})
    context = encode_prompt(tokenizer, prompt)
    line = " " * 16  # the prompt's last line, whose spaces go to the answer
    scores = []
    for label in range(len(item["choices"])):
        answer = tokenizer(f"\n{line}{task.output(relabel(item, label))}", add_special_tokens=False)["input_ids"]
        log_probabilities = model(torch.tensor([context + answer])).logits[0].double().log_softmax(-1)
        scores.append(sum(float(log_probabilities[len(context) + i - 1, token]) for i, token in enumerate(answer)))
    return scores


@pytest.mark.parametrize("name", tasks_module.list_tasks())
def test_scores_are_those_of_the_answers_after_the_prompt(name: str) -> None:
    made = items(name, 6)
    records = AnswerWord(tiny_llama(), bpe_tokenizer(), tasks_module.find_task(name), made, "alpaca-indented").score(
        tiny_llama(), range(6)
    )
    for item, record in zip(made, records, strict=True):
        plain = plain_scores(name, item)
        assert record["scores"] == pytest.approx(plain, abs=1e-4)
        words = [tasks_module.find_task(name).answer(relabel(item, label)) for label in range(len(plain))]
        assert record["prediction"] == words[plain.index(max(plain))]
        assert record["label"] == tasks_module.find_task(name).answer(item)
        assert record["correct"] == {"acc": record["prediction"] == record["label"]}


def test_an_item_is_one_row() -> None:
    scorer = AnswerWord(
        tiny_llama(), bpe_tokenizer(), tasks_module.find_task("arc_easy"), items("arc_easy", 5), "alpaca"
    )
    assert [rows for rows, _ in scorer.sizes] == [1] * 5


def test_the_prompt_is_generation_s() -> None:
    given = tiny_llama(), bpe_tokenizer(), tasks_module.find_task("piqa"), items("piqa", 5), "alpaca-indented"
    assert AnswerWord(*given).hashes == LLMAdapters(*given).hashes


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Score by both protocols, a random model's text made to say the first word of an item's answers."""
    find = AnswerWords.find
    monkeypatch.setattr(AnswerWords, "find", lambda self, text: find(self, text) or self.words[len(text) % 2])
    score(tmp_path, "answer-word,llm-adapters", stage=0)
    return tmp_path


def test_agreement_is_the_share_of_equal_answers(both: Path) -> None:
    found = agreement(both)
    assert list(found) == ["hellaswag", "piqa"]
    for task, share in found.items():
        a, b = (
            [r["prediction"] for r in read_items(both / "evaluation" / protocol / f"{task}.jsonl")]
            for protocol in ("answer-word", "llm-adapters")
        )
        assert share.value == sum(x == y for x, y in zip(a, b, strict=True)) / 9
    assert 0 < found["piqa"].value < 1


def test_only_the_same_items_of_the_same_weights_are_compared(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = both / "evaluation" / "llm-adapters" / "piqa.jsonl"
    whole = read_items(file)
    write_items(file, whole[:-1])
    with pytest.raises(UserError, match=r"piqa.jsonl and results.json do not agree: it has 8 items, and its row 9"):
        agreement(both)
    write_items(file, whole)
    assert list(agreement(both)) == ["hellaswag", "piqa"]
    other = tiny_llama(seed=1)
    monkeypatch.setattr(samples_module, "task_items", lambda name, split: datasets.Dataset.from_list(items(name, 21)))
    config = EvaluateConfig(protocol="answer-word", tasks="hellaswag", limit=17)
    evaluate_module.evaluate(other, bpe_tokenizer(), config, both)
    assert list(agreement(both)) == ["piqa"]


ELEVEN = make_item({"id": "x", "question": "which", "choices": [f"c{i}" for i in range(11)], "label": 9})


def test_an_answer_that_another_one_begins_with_can_win() -> None:
    """Of eleven choices "answer1" begins "answer10" and "answer11": where their ends count, each may be the best."""
    task = replace(tasks_module.find_task("arc_easy"), answer_words=tuple(f"answer{i}" for i in range(1, 12)))
    model, tokenizer = tiny_llama(), bpe_tokenizer()
    scorer = AnswerWord(model, tokenizer, task, [ELEVEN, relabel(ELEVEN, 0)], "alpaca-indented")
    assert "with their ends" in scorer.decoding
    prompt = encode_prompt(tokenizer, scorer.prompting.text(task.instruction(ELEVEN)))
    with torch.no_grad():
        record, _ = scorer.score(model, range(2))
        expected = []
        for label in range(11):
            output = task.output(relabel(ELEVEN, label))
            ids = encode_rows(tokenizer, [(scorer.prompting.text(task.instruction(ELEVEN)), output)])[0][0]
            ids = [*ids, tokenizer.eos_token_id]
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            expected.append(sum(float(logs[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
    assert record["scores"] == pytest.approx(expected, abs=1e-4)
    plain = AnswerWord(model, tokenizer, tasks_module.find_task("arc_easy"), items("arc_easy", 3), "alpaca-indented")
    assert plain.decoding == "none: log-probabilities of the answers"
    assert not any(plain.ended)
