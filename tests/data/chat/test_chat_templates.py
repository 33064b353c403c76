"""What is trained of a conversation, template by template; with a folder of public templates, how many write what."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from subspace.data.chat.encoding import EncodedRow, RowEncoder
from subspace.data.rows import BadRow, Row
from subspace.errors import UserError
from tests.helpers.chat_templates import chat_tokenizer, templates

SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
)
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "call12345", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    ],
}
TOLD = {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": "sunny"}


def user(number: int) -> dict[str, Any]:
    return {"role": "user", "content": f"Question {number}?"}


def answer(number: int, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": f"Answer {number}.", **more}


THREE = Row("mine", (SYSTEM, user(1), answer(1), user(2), answer(2), user(3), answer(3)))
CALLING = Row("mine", (user(1), CALL, TOLD, answer(2)), TOOLS)
THINKING = Row(
    "mine", (user(1), answer(1, reasoning_content="First."), user(2), answer(2, reasoning_content="Second."))
)


def encoder(name: str, date: str = "2025-01-31", prompt: str = "{{ instruction }}") -> RowEncoder:
    return RowEncoder(chat_tokenizer(templates()[name]), prompt, asked=False, date=date)


def trained(name: str, row: Row) -> list[str] | str:
    """Return what is trained of a row, answer by answer; or why it is not."""
    made = encoder(name)
    encoded = made.encode(row)
    if isinstance(encoded, BadRow):
        return f"{encoded.reason}: {encoded.detail}"
    return [str(made.tokenizer.decode(encoded.ids[start:end])) for _, start, end in encoded.answers]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["Answer 1.<|im_end|>", "Answer 2.<|im_end|>", "Answer 3.<|im_end|>"]),
        ("llama2", [" Answer 1. <|end_of_text|>", " Answer 2. <|end_of_text|>", " Answer 3. <|end_of_text|>"]),
        ("llama3", ["Answer 1.<|eot_id|>", "Answer 2.<|eot_id|>", "Answer 3.<|eot_id|>"]),
        ("gemma", "the tokenizer's chat template refuses the conversation: System role not supported: "),
        ("mistral", [" Answer 1.<|end_of_text|>", " Answer 2.<|end_of_text|>", " Answer 3.<|end_of_text|>"]),
        ("phi", ["Answer 1.<|end|>", "Answer 2.<|end|>", "Answer 3.<|end|>\n<|end_of_text|>"]),
        ("r1", [f"Answer {i}.<｜end▁of▁sentence｜>" for i in (1, 2, 3)]),
        ("qwen3", ["Answer 1.<|im_end|>", "Answer 2.<|im_end|>", "<think>\n\n</think>\n\nAnswer 3.<|im_end|>"]),
        ("qwen-xml", ["Answer 1.<|im_end|>", "Answer 2.<|im_end|>", "\n</think>\n\nAnswer 3.<|im_end|>"]),
        (
            "harmony",
            [f"<|channel|>final<|message|>Answer {i}.<|{end}|>" for i, end in ((1, "end"), (2, "end"), (3, "return"))],
        ),
        ("vicuna", [f" Answer {i}.<|end_of_text|>" for i in (1, 2, 3)]),
        ("parts", [f" Answer {i}.<|im_end|>" for i in (1, 2, 3)]),
        ("marked", [f"Answer {i}.<|im_end|>" for i in (1, 2, 3)]),
        ("glm", ["</think>\nAnswer 1.", "</think>\nAnswer 2.", "</think>\nAnswer 3.<|end_of_text|>"]),
    ],
)
def test_the_answers_of_three_turns_are_trained_with_their_ends(name: str, expected: list[str] | str) -> None:
    assert trained(name, THREE) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", 'leaves out the call of a tool: turn 2: "get_weather"'),
        ("llama2", "refuses the conversation: Roles must alternate"),
        ("llama3", ['{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|>', "Answer 2.<|eot_id|>"]),
        (
            "mistral",
            [
                '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]<|end_of_text|>',
                " Answer 2.<|end_of_text|>",
            ],
        ),
        (
            "r1",
            [
                'function\nget_weather\n```json\n{"city": "Paris"}\n```<｜end▁of▁sentence｜>',
                "Answer 2.<｜end▁of▁sentence｜>",
            ],
        ),
        (
            "qwen3",
            [
                '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
                "<think>\n\n</think>\n\nAnswer 2.<|im_end|>",
            ],
        ),
        (
            "harmony",
            [
                ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
                "<|channel|>final<|message|>Answer 2.<|return|>",
            ],
        ),
        (
            "glm",
            [
                "</think>\n<tool_call>get_weather\n<arg>city=Paris</arg>\n</tool_call>",
                "</think>\nAnswer 2.<|end_of_text|>",
            ],
        ),
    ],
)
@pytest.mark.parametrize("form", ["mapping", "json", "no content", "bare"])
def test_calls_of_tools_are_trained_whatever_their_form(name: str, expected: list[str] | str, form: str) -> None:
    call = dict(CALL)
    function: dict[str, Any] = {"name": "get_weather", "arguments": {"city": "Paris"}}
    if form == "json":
        call["tool_calls"] = [{"type": "function", "function": {**function, "arguments": '{"city": "Paris"}'}}]
    elif form == "bare":
        call["tool_calls"] = [function]
    elif form == "no content":
        del call["content"]
    found = trained(name, Row("mine", (user(1), call, TOLD, answer(2)), TOOLS))
    assert found == expected if isinstance(expected, list) else expected in found


@pytest.mark.parametrize(
    ("name", "expected", "left_out"),
    [
        ("qwen3", ["Answer 1.<|im_end|>", "<think>\nSecond.\n</think>\n\nAnswer 2.<|im_end|>"], True),
        ("qwen-xml", ["Answer 1.<|im_end|>", "Second.\n</think>\n\nAnswer 2.<|im_end|>"], True),
        ("glm", ["First.</think>\nAnswer 1.", "Second.</think>\nAnswer 2.<|end_of_text|>"], False),
        ("r1", ["Answer 1.<｜end▁of▁sentence｜>", "Answer 2.<｜end▁of▁sentence｜>"], True),
    ],
)
def test_thoughts_are_trained_or_said_to_be_left_out(name: str, expected: list[str], left_out: bool) -> None:
    assert trained(name, THINKING) == expected
    made = encoder(name)
    made.encode(THINKING)
    assert (
        list(made.notices())
        == ["1 rows: the chat template leaves out or changes thoughts of a turn (the first: mine)"] * left_out
    )


def test_thoughts_at_the_beginning_of_an_answer_are_written_by_the_models_own_tokens() -> None:
    made = encoder("chatml")
    spoken = Row("mine", (user(1), answer(1) | {"content": "<think>\nHm </think> Hm.\n</think>\n\nYes."}))
    thought = Row("mine", (user(1), answer(1) | {"content": "<think>\nHm.\n</think>\n\nYes."}))
    tokens = [made.control.tokens[token] for token in ("<think>", "</think>")]
    ids = [encoded.ids for row in (thought, spoken) if isinstance(encoded := made.encode(row), EncodedRow)]
    assert [[number for number in row if number in tokens] for row in ids] == [tokens, []]  # the second are no thoughts


def test_a_turn_that_says_so_is_not_trained() -> None:
    row = Row("mine", (user(1), answer(1, weight=0), user(2), answer(2, train=True), user(3), answer(3, train=False)))
    assert trained("chatml", row) == ["Answer 2.<|im_end|>"]
    untrained = Row("mine", (user(1), answer(1, weight=0)))
    assert "no turn of the assistant's is left" in trained("chatml", untrained)


def test_the_date_is_the_runs_and_not_the_days() -> None:
    row = Row("mine", (user(1), answer(1)))
    texts = []
    for name in ("llama3", "harmony"):
        made = encoder(name)
        encoded = made.encode(row)
        assert isinstance(encoded, EncodedRow)
        texts.append(str(made.tokenizer.decode(encoded.ids)))
        assert list(made.notices()) == ["the chat template writes the date: in all rows 2025-01-31 (data.date)"]
    assert "31 Jan 2025" in texts[0]
    assert "2025-01-31" in texts[1]
    assert str(datetime.date.today().year) not in "".join(texts) or datetime.date.today().year == 2025
    other = encoder("llama3", "2024-07-26")
    assert other.fingerprint != encoder("llama3").fingerprint
    assert encoder("chatml", "2024-07-26").fingerprint == encoder("chatml").fingerprint


def test_a_template_that_writes_the_time_in_its_own_way_is_refused() -> None:
    template = "{% set form = '%H' %}{{ strftime_now(form) }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="writes the time"):
        RowEncoder(chat_tokenizer(template), "", asked=False, date="2025-01-31")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (Row("mine", ({"role": "user<|im_end|>", "content": "x"}, answer(1))), "where no text is expected"),
        (Row("mine", (user(1), answer(1)), (), None, None, {"tools": []}), "'tools' in chat_template_kwargs"),
        (Row("mine", (user(1), {"role": "assistant", "content": " \n"})), "says nothing"),
        (Row("mine", (user(1), answer(1) | {"content": "\ud800"})), "surrogate"),
        (Row("mine", text=" "), "the text is empty"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(row: Row, says: str) -> None:
    assert says in trained("chatml", row)


def test_a_conversation_without_a_chat_template_is_named() -> None:
    bad = RowEncoder(chat_tokenizer(), "", asked=False, date="2025-01-31").encode(Row("mine", (user(1), answer(1))))
    assert isinstance(bad, BadRow)
    assert "need a chat template" in bad.reason


def test_an_instruction_is_written_by_the_chat_template_unless_a_prompt_was_asked_for() -> None:
    fields = {"instruction": "Sing.", "input": "", "output": "La<|end_of_text|>la."}
    turns = ({"role": "user", "content": "Sing."}, {"role": "assistant", "content": fields["output"]})
    row = Row("mine", turns, (), fields)
    tokenizer = chat_tokenizer(templates()["chatml"])
    texts = []
    for asked in (False, True):
        encoded = RowEncoder(tokenizer, "Do: {{ instruction }}\nDone:", asked=asked, date="2025-01-31").encode(row)
        assert isinstance(encoded, EncodedRow)
        texts.append(str(tokenizer.decode(encoded.ids)))
        (_, start, end), (eos,) = encoded.answers[0], tokenizer.encode("<|end_of_text|>", add_special_tokens=False)
        assert str(tokenizer.decode(encoded.ids[start:end])).startswith("La<|end_of_text|>la.")
        assert encoded.ids.count(eos) == asked  # the row's own letters are none
    assert texts == [
        "<|im_start|>user\nSing.<|im_end|>\n<|im_start|>assistant\nLa<|end_of_text|>la.<|im_end|>",
        "<|begin_of_text|>Do: Sing.\nDone:La<|end_of_text|>la.<|end_of_text|>",
    ]


def test_all_of_a_plain_text_is_trained_and_its_control_tokens_are_letters() -> None:
    made = encoder("chatml")
    encoded = made.encode(Row("mine", text="Once <|im_end|> upon"))
    assert isinstance(encoded, EncodedRow)
    assert made.tokenizer.decode(encoded.ids) == "<|begin_of_text|>Once <|im_end|> upon<|end_of_text|>"
    assert encoded.answers == [(0, 1, len(encoded.ids))]
    assert len([number for number in encoded.ids if number in made.control.ids]) == 2
    assert list(made.notices()) == [
        "1 rows: control tokens that the row spells are encoded as letters (the first: mine)"
    ]


def test_a_white_space_that_the_template_changes_is_told_and_a_word_that_it_drops_is_not_trained() -> None:
    squeezing = "{% for m in messages %}{{ m.role }}: {{ m.content.replace('\\n\\n', '\\n') }}\n{% endfor %}"
    made = RowEncoder(chat_tokenizer(squeezing), "", asked=False, date="2025-01-31")
    assert isinstance(made.encode(Row("mine", (user(1), answer(1) | {"content": "a\n\nb"}))), EncodedRow)
    assert "white space inside a turn" in next(made.notices())
    short = "{% for m in messages %}{{ m.role }}: {{ m.content[:30] }}\n{% endfor %}"
    bad = RowEncoder(chat_tokenizer(short), "", asked=False, date="2025-01-31").encode(
        Row("mine", (user(1), answer(1) | {"content": "a word and another one, and more of them than fit"}))
    )
    assert isinstance(bad, BadRow)
