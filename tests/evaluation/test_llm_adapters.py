"""Protocol ``llm-adapters``: answers are the model's own whatever the batch, and the first answer word counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from subspace.adapters.inject import inject, trained_parameters
from subspace.adapters.registry import list_methods
from subspace.data import tasks as tasks_module
from subspace.data.tokenization import common_prefix_length, encode_rows
from subspace.errors import UserError
from subspace.evaluation.answer_extraction import AnswerWords
from subspace.evaluation.greedy_decoding import decode_greedily, prefill_shared_prefix
from subspace.evaluation.protocols.llm_adapters import LLMAdapters
from tests.helpers.items import items
from tests.helpers.tiny_models import ARCHITECTURES, VOCABULARY, bpe_tokenizer, tiny, tiny_llama

Finished = Callable[[list[int]], bool]


def never(tokens: list[int]) -> bool:
    return False


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def prompts(count: int = 6) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 40, (count,), generator=generator)
    return [torch.randint(VOCABULARY, (int(n),), generator=generator).tolist() for n in lengths]


def plain(model: PreTrainedModel, prompt: list[int], finished: Finished, count: int) -> list[int]:
    """Read everything again for each token: no cache, no padding, no batch."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if finished(ids[len(prompt) :]):
            break
    return ids[len(prompt) :]


def perturb(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in trained_parameters(model).values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_is_decoded_as_its_rows_are(architecture: str) -> None:
    model = tiny(architecture, attn_implementation="eager" if architecture == "gemma2" else "sdpa")
    written = decode_greedily(model, prompts(), never, max_new_tokens=8)
    assert written == [plain(model, prompt, never, 8) for prompt in prompts()]


@pytest.mark.parametrize("method", list_methods())
def test_adapters_decode_alike(method: str) -> None:
    model = tiny_llama()
    without = decode_greedily(model, prompts(), never, max_new_tokens=8)
    inject(model, method)
    perturb(model)
    written = decode_greedily(model, prompts(), never, max_new_tokens=8)
    assert written == [plain(model, prompt, never, 8) for prompt in prompts()]
    assert written != without


def shapes_read(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return a list to which the shape of what the model reads in a pass is added from now on."""
    read: list[tuple[int, ...]] = []
    forward = model.forward

    def counting(**given: Any) -> Any:
        read.append(tuple(given["input_ids"].shape))
        return forward(**given)

    monkeypatch.setattr(model, "forward", counting)
    return read


def beginning_alike() -> list[list[int]]:
    return [[7, 3, 99, 12, 250, 41, *prompt] for prompt in prompts()]


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt", "houlsby"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_prompts_share_is_read_once(architecture: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(architecture, attn_implementation="eager" if architecture == "gemma2" else "sdpa")
    inject(model, method)
    perturb(model)
    expected = [plain(model, prompt, never, 4) for prompt in beginning_alike()]
    read = shapes_read(model, monkeypatch)
    beginning = prefill_shared_prefix(model, beginning_alike())
    for several in (range(6), range(2)):
        asked = [beginning_alike()[number] for number in several]
        written = decode_greedily(model, asked, never, max_new_tokens=4, prefix=beginning)
        assert written == [expected[number] for number in several]
    longest = max(map(len, prompts())), max(map(len, prompts()[:2]))
    assert read == [(1, 6), (6, longest[0]), *[(6, 1)] * 3, (2, longest[1]), *[(2, 1)] * 3]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 3, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_draft_is_kept_as_far_as_the_model_agrees(architecture: str, kept: int, fixed: bool) -> None:
    model = tiny(architecture, attn_implementation="eager" if architecture == "gemma2" else "sdpa")
    expected = [plain(model, prompt, never, 8) for prompt in beginning_alike()]
    beginning = None if fixed else prefill_shared_prefix(model, beginning_alike())
    for text in expected:
        draft = [*text[:kept], *((token + 1) % VOCABULARY for token in text[kept:5])]
        how: Any = {"prefix": beginning, "draft": draft, "fixed": fixed}
        assert decode_greedily(model, beginning_alike(), never, 8, **how) == expected


def test_a_draft_that_is_right_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    (prompt,) = prompts(1)
    expected = plain(model, prompt, never, 6)
    draft = expected[:5]
    read = shapes_read(model, monkeypatch)
    assert decode_greedily(model, [prompt], never, 6, draft=draft) == [expected]
    assert read == [(1, len(prompt) + 5)]
    # A row may end within the draft.
    assert decode_greedily(model, [prompt], never, 3, draft=draft) == [expected[:3]]
    assert decode_greedily(model, [prompt], lambda tokens: len(tokens) == 3, 6, draft=draft) == [expected[:3]]


@pytest.mark.parametrize("name", tasks_module.list_tasks())
def test_every_answer_that_is_trained_begins_with_the_draft(name: str) -> None:
    task, made = tasks_module.find_task(name), items(name, 8)
    scorer = LLMAdapters(tiny_llama(), bpe_tokenizer(), task, made, "alpaca-indented")
    assert "the correct answer is" in str(bpe_tokenizer().decode(scorer.draft))
    texts = [scorer.prompting.text(task.instruction(item)) for item in made]
    for ids, num_prompt in encode_rows(bpe_tokenizer(), list(zip(texts, map(task.output, made), strict=True))):
        assert ids[num_prompt:][: len(scorer.draft)] == scorer.draft


def test_rows_that_end_leave_the_others_as_they_are() -> None:
    """Rows end after different numbers of tokens, the longest prompt first among them."""
    model = tiny_llama()

    def sum_is_high(tokens: list[int]) -> bool:
        return sum(tokens) > 600

    written = decode_greedily(model, prompts(12), sum_is_high, max_new_tokens=20)
    assert written == [plain(model, prompt, sum_is_high, 20) for prompt in prompts(12)]
    assert len({len(tokens) for tokens in written}) > 2


@pytest.mark.parametrize("name", tasks_module.list_tasks())
def test_stopping_early_changes_no_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny_llama(), items(name, 12)
    # Single letters stand for answer words, so that a random model says some.
    task = tasks_module.find_task(name)
    scorer = LLMAdapters(model, bpe_tokenizer(), task, made, "alpaca-indented")
    scorer.extractor = AnswerWords(["e", "A", "on", "7"])
    early = scorer.score(model, range(12))
    monkeypatch.setattr(scorer, "_finished", lambda tokens: tokens[-1] in scorer.ends)
    late = scorer.score(model, range(12))
    assert [record["prediction"] for record in early] == [record["prediction"] for record in late]
    assert sum(len(record["text"]) for record in early) < sum(len(record["text"]) for record in late)
    assert any(record["prediction"] for record in early)


@pytest.mark.parametrize("name", tasks_module.list_tasks())
def test_answers_do_not_depend_on_the_batch(name: str) -> None:
    model, made = tiny_llama(), items(name, 8)
    scorer = LLMAdapters(model, bpe_tokenizer(), tasks_module.find_task(name), made, "alpaca-indented")
    together = scorer.score(model, range(8))
    assert together == [record for number in range(8) for record in scorer.score(model, [number])]
    assert len({record["text"] for record in together}) > 4


def test_the_beginning_is_read_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny_llama(), items("piqa", 6)
    scorer = LLMAdapters(model, bpe_tokenizer(), tasks_module.find_task("piqa"), made, "alpaca-indented")
    expected = scorer.score(model, range(6))
    read = shapes_read(model, monkeypatch)
    with scorer.shared_prefix(model):
        assert [record for number in range(6) for record in scorer.score(model, [number])] == expected
    (first, *others) = [width for _, width in read]
    assert first == common_prefix_length(scorer.prompts) > 20
    assert max(others) == max(map(len, scorer.prompts)) - first + len(scorer.draft)
    assert scorer.prefix is None


# What models write, good and bad, and what LLM-Adapters' evaluator takes for the answer.
@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("boolq", "\n                the correct answer is true", "true"),
        ("boolq", "True. It is untrue, not false", "true"),
        ("boolq", "falsetrue", "false"),
        ("boolq", "yes", ""),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("piqa", "solution 1", ""),
        ("siqa", "answer3\nanswer1", "answer3"),
        ("hellaswag", "ending4ending1", "ending4"),
        ("hellaswag", "Ending1: he swims", ""),
        ("winogrande", "the correct answer is option2.", "option2"),
        ("winogrande", "option3", ""),
        ("arc_easy", "answer12", "answer1"),
        ("arc_challenge", "the answer is answer5", "answer5"),
        ("openbookqa", "", ""),
    ],
)
def test_the_first_answer_word_counts(name: str, text: str, word: str) -> None:
    assert AnswerWords(tasks_module.find_task(name).answer_words).find(text) == word


@pytest.mark.parametrize(
    ("words", "text", "settled"),
    [
        (["answer1", "answer2"], "the answer2", True),
        (["answer1", "answer2"], "the answer", False),
        (["answer1", "answer10"], "the answer1", False),
        (["true", "untrue"], "it is true", False),
    ],
)
def test_an_answer_word_is_settled_when_nothing_can_change_it(words: list[str], text: str, settled: bool) -> None:
    assert AnswerWords(words).is_final(text) is settled


def test_a_record_says_what_was_asked_and_answered() -> None:
    model, (item,) = tiny_llama(), items("siqa", 1)
    scorer = LLMAdapters(model, bpe_tokenizer(), tasks_module.find_task("siqa"), [item], "alpaca-indented")
    scorer.extractor = AnswerWords(["e"])
    (record,) = scorer.score(model, [0])
    assert record["label"] == f"answer{item['label'] + 1}"
    assert record["correct"] == {"acc": False}
    assert record["prediction"] in record["text"]
    assert scorer.truncated == 0


def test_a_prompt_that_is_too_long_keeps_its_end() -> None:
    model = tiny_llama(max_position_embeddings=100)
    scorer = LLMAdapters(model, bpe_tokenizer(), tasks_module.find_task("piqa"), items("piqa", 4), "alpaca-indented")
    assert scorer.truncated == 4
    assert [len(prompt) for prompt in scorer.prompts] == [100 - 32] * 4
    assert str(bpe_tokenizer().decode(scorer.prompts[0])).endswith("### Response:")


@pytest.mark.parametrize("new", [100, 101])
def test_an_answer_as_long_as_the_window_is_refused(new: int) -> None:
    """Nothing of the prompt would be left; a slice from its end would leave all of it."""
    task = dataclasses.replace(tasks_module.find_task("piqa"), max_new_tokens=new)
    model = tiny_llama(max_position_embeddings=100)
    with pytest.raises(UserError, match=f"asks for answers of up to {new} tokens, but the model reads only 100"):
        LLMAdapters(model, bpe_tokenizer(), task, items("piqa", 4), "alpaca-indented")
