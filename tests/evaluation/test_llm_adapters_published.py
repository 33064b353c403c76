"""Protocol ``llm-adapters-published`` against the published evaluator's own steps, defect by defect."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from subspace.adapters.inject import inject
from subspace.data import tasks as tasks_module
from subspace.evaluation.config import DEFAULT_DEFECTS, PUBLISHED_DEFECTS
from subspace.evaluation.protocols.llm_adapters_published import LLMAdaptersPublished
from tests.helpers.items import items
from tests.helpers.tiny_models import bpe_tokenizer, tiny_llama

S = " " * 16
SCORING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
    f"{S}### Instruction:\n{S}%s\n\n{S}### Response:\n{S}"
)
TRAINING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
    f"{S}### Instruction:\n{S}%s\n{S}\n{S}### Response:\n{S}"
)
# Single letters stand for answer words, so that a random model says some.
WORDS = ("e", "A", "on", "7")


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def scorer(
    model: PreTrainedModel, name: str = "siqa", count: int = 6, defects: Sequence[str] = DEFAULT_DEFECTS, batch: int = 1
) -> LLMAdaptersPublished:
    made = LLMAdaptersPublished(
        model, bpe_tokenizer(), tasks_module.find_task(name), items(name, count), defects, batch=batch
    )
    made.extractor = type(made.extractor)(WORDS)  # type: ignore[call-arg]
    return made


def as_published(model: Any, name: str, count: int, prompt: str = SCORING) -> list[tuple[str, str]]:
    """Answer one prompt at a time, by the published evaluator's steps."""
    tokenizer: Any = bpe_tokenizer()
    answers = []
    for item in items(name, count):
        inputs = tokenizer(prompt % tasks_module.find_task(name).instruction(item), return_tensors="pt")
        written = model.generate(
            inputs["input_ids"],
            attention_mask=torch.ones_like(inputs["input_ids"]),
            num_beams=4,
            do_sample=False,
            max_new_tokens=32,
            pad_token_id=0,
        )
        (text,) = tokenizer.batch_decode(written, skip_special_tokens=True)
        output = text.split("### Response:")[1].strip()
        answers.append((output, (re.findall("|".join(WORDS), output) or [""])[0]))
    return answers


def answers(made: LLMAdaptersPublished, model: Any, batch: Sequence[int]) -> list[tuple[str, str]]:
    return [(record["text"], record["prediction"]) for record in made.score(model, batch)]


@pytest.mark.parametrize("name", tasks_module.list_tasks())
def test_it_answers_as_the_published_evaluator(name: str) -> None:
    model = tiny_llama()
    found = answers(scorer(model, name, 4), model, range(4))
    assert found == as_published(model, name, 4)
    assert len({text for text, _ in found}) > 1
    assert any(word for _, word in found)


def test_the_prompts_are_the_published_ones_to_the_byte() -> None:
    for name in tasks_module.list_tasks():
        instruction = tasks_module.find_task(name).instruction(items(name, 1)[0])
        assert scorer(tiny_llama(), name, 1).texts == [SCORING % instruction]
        assert scorer(tiny_llama(), name, 1, []).texts == [TRAINING % instruction]


def test_the_published_prompt_is_encoded_with_its_last_spaces() -> None:
    (unequal,), (equal,) = (scorer(tiny_llama(), count=1, defects=d).prompts for d in (DEFAULT_DEFECTS, ()))
    assert str(bpe_tokenizer().decode(unequal)).endswith(f"### Response:\n{S}")
    assert str(bpe_tokenizer().decode(equal)).endswith("### Response:")


@pytest.mark.parametrize("defects", [(), DEFAULT_DEFECTS, ("pad_is_zero",), ("last_response",)])
def test_what_else_is_in_the_batch_changes_nothing(defects: Sequence[str]) -> None:
    model = tiny_llama()
    made = scorer(model, defects=defects)
    assert answers(made, model, range(6)) == [answers(made, model, [n])[0] for n in range(6)]


def test_without_a_mask_padding_is_read() -> None:
    """A published batch of three, by the published evaluator's steps: no mask, so that generate takes all for text."""
    model, tokenizer = tiny_llama(), bpe_tokenizer(pad_token="<|reserved_special_token_0|>", padding_side="left")
    task, made = tasks_module.find_task("siqa"), items("siqa", 6)
    read = ("unequal_prompts", "no_attention_mask")
    alone = [
        record["text"] for record in LLMAdaptersPublished(model, tokenizer, task, made, read).score(model, range(6))
    ]
    assert alone == [text for text, _ in as_published(model, "siqa", 6)]
    for defects, pad in ((read, tokenizer.pad_token_id), ((*read, "pad_is_zero"), 0)):
        expected = []
        for first in (0, 3):
            tokenizer.pad_token_id = pad
            prompts = [SCORING % task.instruction(item) for item in made[first : first + 3]]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True)["input_ids"]
            settings: dict[str, Any] = {"num_beams": 4, "do_sample": False, "max_new_tokens": 32, "pad_token_id": pad}
            written = model.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)  # type: ignore[operator]
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            expected += [text.split("### Response:")[1].strip() for text in texts]
        scored = LLMAdaptersPublished(model, tokenizer, task, made, defects, batch=3)
        assert [record["text"] for record in scored.score(model, range(6))] == expected
        assert [scored.score(model, [n])[0]["text"] for n in range(6)] == expected
        assert expected != alone


def test_dropout_changes_answers_the_same_way_each_time() -> None:
    model = tiny_llama()
    inject(model, "lora", {"dropout": 0.5, "alpha": 200})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    still, dropped = (scorer(model, defects=d) for d in ((), ("dropout_active",)))
    first = answers(dropped, model, range(6))
    assert first == answers(dropped, model, range(6)) != answers(still, model, range(6))
    assert not model.training


def test_a_marker_that_is_written_ends_the_answer_or_begins_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    first, last = (scorer(model, count=1, defects=d) for d in ((), ("last_response",)))
    written = bpe_tokenizer()("e ### Response: A", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(model, "generate", lambda inputs, **_: torch.cat([inputs, torch.tensor([written])], dim=1))
    assert answers(first, model, [0]) == [("e", "e")]
    assert answers(last, model, [0]) == [("A", "A")]


def test_the_published_batch_matters_only_without_a_mask() -> None:
    model = tiny_llama()
    one, six = (scorer(model, batch=batch) for batch in (1, 6))
    assert (one.prompts, one.fingerprint_fields) == (six.prompts, six.fingerprint_fields)
    one, six = (scorer(model, defects=["no_attention_mask"], batch=batch) for batch in (1, 6))
    assert one.fingerprint_fields != six.fingerprint_fields


@pytest.mark.parametrize("defect", PUBLISHED_DEFECTS)
def test_every_defect_is_in_the_fingerprint(defect: str) -> None:
    model = tiny_llama()
    one, none = (scorer(model, count=1, defects=defects) for defects in ([defect], []))
    assert one.fingerprint_fields != none.fingerprint_fields
