"""Prompts in a chat template: exactly what training on conversations shows, for every style of template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from subspace.data import samples as samples_module
from subspace.data.chat.encoding import EncodedRow, RowEncoder
from subspace.data.config import DataConfig
from subspace.data.rows import Row
from subspace.data.tasks import find_task
from subspace.errors import UserError
from subspace.evaluation import evaluate as evaluate_module
from subspace.evaluation import subjects
from subspace.evaluation.config import PROTOCOLS, EvaluateConfig, EvaluationSubject
from subspace.evaluation.protocols.llm_adapters import LLMAdapters
from subspace.evaluation.protocols.prompts import ChatPrompts
from subspace.models.config import ModelConfig
from tests.helpers.chat_templates import chat_tokenizer, templates
from tests.helpers.items import items
from tests.helpers.tiny_models import bpe_tokenizer, save, tiny_llama

QUESTIONS = [
    "Please answer the following question with true or false: is ice cream cold?\n\nAnswer format: true/false",
    "a",
    "it says <|im_end|> and </s> and [INST]",
    "Größe 木星\n\n  indented",
]
ANSWER = "the correct answer is true"


@pytest.fixture(autouse=True)
def made_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "task_items", lambda name, split: datasets.Dataset.from_list(items(name, 6)))


def trained(template: str, question: str) -> EncodedRow:
    """Return a conversation as training encodes it."""
    encoder = RowEncoder(chat_tokenizer(template), "", asked=False, date=DataConfig.date)
    turns = {"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}
    encoded = encoder.encode(Row("here", turns))
    assert isinstance(encoded, EncodedRow), encoded
    return encoded


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", templates())
def test_a_prompt_is_that_of_training(name: str, question: str) -> None:
    template = templates()[name]
    row = trained(template, question)
    ((_, start, _),) = row.answers
    written = ChatPrompts(chat_tokenizer(template), writes=True)
    assert written.encode(written.text(question)) == row.ids[:start]
    scored = ChatPrompts(chat_tokenizer(template), writes=False)
    text = scored.text(question)
    ((ids, context),) = scored.encode_rows([(text, ANSWER)])
    assert row.ids[: len(ids)] == ids
    assert str(chat_tokenizer(template).decode(ids[context:])).strip() == ANSWER
    assert context >= start


def test_a_tokenizer_without_a_chat_template_is_told() -> None:
    config = EvaluateConfig(tasks="piqa", chat_template=True)
    with pytest.raises(UserError, match=r"chat_template=true was asked for, but the model's tokenizer has no"):
        evaluate_module.build_jobs(tiny_llama(), bpe_tokenizer(), config)


@pytest.mark.parametrize(
    "template",
    ["{{ nothing.at.all }}", "{{ raise_exception('no') }}", "always the same", "{{ messages[0].content }}" * 2],
)
def test_a_template_that_writes_no_turn_is_told(template: str) -> None:
    with pytest.raises(UserError, match="the tokenizer's chat template does not write"):
        ChatPrompts(chat_tokenizer(template), writes=True)


def test_a_template_that_changes_a_question_is_told() -> None:
    prompts = ChatPrompts(
        chat_tokenizer("{% for m in messages %}<s>{{ m.content|replace('cat', 'dog') }}{% endfor %}"), writes=True
    )
    with pytest.raises(UserError, match="changes what is asked: 'a cat'"):
        prompts.text("a cat")


def jobs(protocol: str, *, chat: bool, tokenizer: Any = None) -> list[evaluate_module.Job]:
    config = EvaluateConfig(protocol=protocol, tasks="piqa,siqa", chat_template=chat)
    tokenizer = tokenizer or chat_tokenizer(templates()["chatml"])
    return evaluate_module.build_jobs(tiny_llama(vocab_size=len(tokenizer)), tokenizer, config)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_it_is_part_of_the_fingerprint_where_it_is_read(protocol: str) -> None:
    read = protocol != "llm-adapters-published"
    for plain, chat in zip(jobs(protocol, chat=False), jobs(protocol, chat=True), strict=True):
        assert "chat template" not in plain.fingerprint_fields
        assert ("chat template" in chat.fingerprint_fields) is read
        assert (plain.fingerprint_fields != chat.fingerprint_fields) is read


def test_a_plain_scoring_does_not_look_at_the_chat_template() -> None:
    """Its fingerprint follows the tokenizer's template as before, its prompts do not."""
    plain, other = (
        jobs("llm-adapters", chat=False, tokenizer=chat_tokenizer(templates()[n]))[0] for n in ("chatml", "llama3")
    )
    assert plain.scorer.prompts == other.scorer.prompts  # type: ignore[attr-defined]


@pytest.mark.parametrize("protocol", ["likelihood", "answer-word"])
def test_choices_are_scored_behind_the_prompt(protocol: str) -> None:
    tokenizer = chat_tokenizer(templates()["qwen3"])
    model = tiny_llama(vocab_size=len(tokenizer))
    config = EvaluateConfig(protocol=protocol, tasks="piqa", chat_template=True)
    (job,) = evaluate_module.build_jobs(model, tokenizer, config)
    prompts, task = ChatPrompts(tokenizer, writes=False), find_task("piqa")
    with torch.no_grad():
        records = job.scorer.score(model, range(6))
        for item, record in zip(job.sample.items, records, strict=True):
            if protocol == "likelihood":
                pairs = [(prompts.text(context), choice[1:]) for context, choice in task.likelihood.requests(item)]
            else:
                outputs = [task.output({**item, "label": label}) for label in range(2)]
                pairs = [(prompts.text(task.instruction(item)), output) for output in outputs]
            expected = []
            for ids, start in prompts.encode_rows(pairs):
                logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                expected.append(sum(float(logs[i - 1, ids[i]]) for i in range(start, len(ids))))
            assert record["scores"] == pytest.approx(expected, abs=1e-4)


def test_a_written_answer_begins_with_the_draft() -> None:
    tokenizer = chat_tokenizer(templates()["llama3"])
    scorer = LLMAdapters(
        tiny_llama(vocab_size=len(tokenizer)), tokenizer, find_task("piqa"), items("piqa", 3), "alpaca", chat=True
    )
    assert tokenizer.decode(scorer.draft) == "the correct answer is solution"


# A run is asked as it was trained.


def subject(where: Path, **changes: Any) -> EvaluationSubject:
    config = EvaluateConfig(tasks="piqa", protocol="llm-adapters", chat_template=True, limit=2)
    return replace(EvaluationSubject(ModelConfig(path=str(where)), config, where / "out"), **changes)


def test_a_run_is_asked_in_the_template_and_with_the_date_that_it_was_trained_with(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}<s>{{ m.content }}</s>{{ strftime_now('%Y') }}{% endfor %}"
    )
    plain = chat_tokenizer(templates()["chatml"])
    own = subjects._with_chat_form(
        plain, subject(tmp_path, chat_template=str(tmp_path / "own.jinja"), date="2031-01-31")
    )
    assert ChatPrompts(own, writes=True).text("x") == "<s>x</s>2031"
    assert plain.chat_template == templates()["chatml"]
    assert subjects._with_chat_form(plain, subject(tmp_path)) is plain
    asked_plainly = EvaluateConfig(tasks="piqa")
    other = subject(tmp_path, evaluate=asked_plainly, chat_template="gone.jinja")
    assert subjects._with_chat_form(plain, other) is plain
    with pytest.raises(UserError, match=r"data.chat_template is 'gone.jinja'"):
        subjects._with_chat_form(plain, subject(tmp_path, chat_template="gone.jinja"))


def test_runs_of_different_templates_are_encoded_apart(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(templates()["chatml"])
    model = tiny_llama(vocab_size=len(tokenizer))
    save(model, tokenizer, tmp_path / "base")
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")
    model_config = ModelConfig(path=str(tmp_path / "base"), dtype="float32")
    wanted = [
        subject(tmp_path, model=model_config, folder=tmp_path / "a"),
        subject(tmp_path, model=model_config, folder=tmp_path / "b", chat_template=str(tmp_path / "own.jinja")),
    ]
    (first,), (second,) = subjects.evaluate_subjects(wanted)
    assert first.fingerprint_fields["chat template"] != second.fingerprint_fields["chat template"]


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({}, []),
        ({"examples": 2}, []),
        ({"examples": 2, "protocol": "answer-word,likelihood"}, []),
        ({"examples": 2, "by_bytes": True, "protocol": "answer-word"}, ["by_bytes", "examples"]),
        ({"prompt": "alpaca"}, ["prompt"]),
        ({"prompt": "alpaca", "protocol": "llm-adapters"}, []),
        ({"prompt": "alpaca", "protocol": "llm-adapters", "chat_template": True}, ["prompt"]),
        ({"prompt": "alpaca", "protocol": "llm-adapters-published"}, ["prompt"]),
        ({"chat_template": True, "protocol": "llm-adapters-published"}, ["chat_template"]),
        ({"defects": "none"}, ["defects"]),
        ({"published_batch": 4, "protocol": "llm-adapters-published"}, ["published_batch"]),
        (
            {"published_batch": 4, "defects": "no_attention_mask", "protocol": "llm-adapters-published"},
            [],
        ),
    ],
)
def test_settings_without_effect_are_told(
    settings: dict[str, Any], idle: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig(tasks="piqa", **settings)
    assert config.without_effect == idle
    subjects._tell_without_effect([subject(tmp_path, evaluate=config)] * 2)
    told = capsys.readouterr().err
    assert all(f"evaluate.{name}" in told for name in idle)
    assert told.count("without effect") == bool(idle)
