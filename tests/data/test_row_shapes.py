"""Shapes of rows: what a key says is used, refused by its name, or counted, whatever spelling people have for it."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from subspace.data.rows import BadRow, Row
from subspace.data.sources.bad_rows import BadRows
from subspace.data.sources.find import find_source
from subspace.data.sources.shapes import COLUMNS, PAIRS, REFUSED, WEIGHTS, Seen, check_columns, read_row
from subspace.errors import UserError

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object"}}
CALL = {"name": "f", "arguments": {"x": 1}}
CALLED = {"type": "function", "function": CALL}


def read(record: Mapping[str, Any], seen: Seen | None = None, **columns: str | None) -> Row | BadRow:
    return read_row("here", record, columns, seen or Seen())


def good(record: Mapping[str, Any], **columns: str | None) -> Row:
    """Return a record's row, all keys of which are used."""
    seen = Seen()
    row = read(record, seen, **columns)
    assert isinstance(row, Row), row
    assert not seen.unused
    return row


def turns(record: Mapping[str, Any], **columns: str | None) -> list[tuple[str, Any]]:
    return [(turn["role"], turn.get("content")) for turn in good(record, **columns).messages]


# Shapes.


@pytest.mark.parametrize(("question", "answer"), PAIRS)
def test_a_question_and_its_answer_are_a_turn_each(question: str, answer: str) -> None:
    assert turns({question: "q", answer: "a"}) == [("user", "q"), ("assistant", "a")]
    row = good({question: "q", answer: "a"})
    assert row.instruction == {"instruction": "q", "input": "", "output": "a"}


@pytest.mark.parametrize("more", ["input", "context"])
def test_an_input_stands_below_its_instruction(more: str) -> None:
    row = good({"instruction": "q", more: "i", "output": "a"})
    assert row.messages[0] == {"role": "user", "content": "q\n\ni"}
    assert row.instruction == {"instruction": "q", "input": "i", "output": "a"}
    for empty in ({more: ""}, {more: None}, {}):
        assert turns({"instruction": "q", "output": "a", **empty})[0] == ("user", "q")
    assert turns({"instruction": "", more: "i", "output": "a"})[0] == ("user", "i")


@pytest.mark.parametrize("system", ["system", "system_prompt"])
def test_a_system_prompt_and_the_history_come_before_an_instruction(system: str) -> None:
    row = {"instruction": "q", "output": "a", system: "s", "history": [["q1", "a1"], ["q2", "a2"]]}
    expected = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    assert turns(row) == [("system", "s"), *expected, ("user", "q"), ("assistant", "a")]
    assert good(row).instruction is None  # a prompt template has no place for them
    assert turns({**row, system: "", "history": json.dumps(row["history"])})[:4] == expected
    assert turns({**row, "history": [{"role": "user", "content": "q1"}]})[:2] == [("system", "s"), ("user", "q1")]


@pytest.mark.parametrize("name", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize(
    "conversation",
    [
        HI,
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}],
        [{"role": "human", "content": "hi"}, {"role": "model", "content": "hello"}],
        [{"human": "hi", "assistant": "hello"}],
        [{"role": "user", "content": [{"type": "text", "text": "h"}, {"text": "i"}]}, HI[1]],
        {"role": ["user", "assistant"], "content": ["hi", "hello"]},
        json.dumps(HI),
    ],
)
def test_a_conversation_is_read_in_every_spelling(conversation: Any, name: str) -> None:
    assert turns({name: conversation}) == [("user", "hi"), ("assistant", "hello")]
    system = [("system", "s"), ("user", "hi"), ("assistant", "hello")]
    assert turns({name: conversation, "system": "s"}) == system


def test_calls_of_tools_have_one_form() -> None:
    sharegpt = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "42"},
        {"from": "gpt", "value": "hello"},
    ]
    earlier = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "function_call": CALL},
        {"role": "function", "name": "f", "content": "42"},
        {"role": "assistant", "content": "hello"},
    ]
    for conversation in (sharegpt, earlier):
        for tools in ({"tools": json.dumps([TOOL])}, {"functions": [TOOL]}, {"tools": [json.dumps(TOOL)]}):
            row = good({"conversations": conversation, **tools})
            assert [turn["role"] for turn in row.messages] == ["user", "assistant", "tool", "assistant"]
            assert row.messages[1]["tool_calls"] == [CALLED]
            assert row.messages[2]["content"] == "42"
            assert row.tools == ({"type": "function", "function": TOOL},)
    several = [{"from": "human", "value": "hi"}, {"from": "function_call", "value": json.dumps([CALL, CALL])}]
    assert good({"conversations": several}).messages[1]["tool_calls"] == [CALLED, CALLED]


def test_a_turn_keeps_all_of_its_keys() -> None:
    turn = {"role": "assistant", "content": "", "reasoning_content": "think", "tool_calls": [{"id": "1", **CALLED}]}
    assert good({"messages": [HI[0], turn]}).messages[1] == turn


@pytest.mark.parametrize("switch", [{"weight": 0}, {"loss": False}, {"train": False}, {"training": False}])
def test_a_turn_that_is_left_out_of_the_loss_says_so_in_one_way(switch: dict[str, Any]) -> None:
    row = good({"messages": [HI[0], {**HI[1], **switch}, *HI]})
    assert [turn.get("weight") for turn in row.messages] == [None, 0, None, None]
    on = {key: 1 if key == "weight" else True for key in switch}
    assert good({"messages": [{**turn, **on} for turn in HI]}).messages == tuple(HI)
    bad = read({"messages": [HI[0], {**HI[1], **switch}]})
    assert isinstance(bad, BadRow)
    assert bad.reason.startswith("no turn of the assistant's says anything")


def test_the_prompt_s_own_turns_carry_no_loss() -> None:
    row = good({"prompt": [*HI, HI[0]], "completion": [HI[1]]})
    assert [(turn["role"], turn.get("weight")) for turn in row.messages] == [
        *(("user", None), ("assistant", 0)),
        *(("user", None), ("assistant", None)),
    ]
    assert turns({"prompt": [HI[0]], "completion": "hello"}) == [("user", "hi"), ("assistant", "hello")]


def test_plain_text_and_options_of_the_template() -> None:
    assert good({"text": "once upon a time"}).text == "once upon a time"
    row = good({"messages": HI, "chat_template_kwargs": {"enable_thinking": False}})
    assert row.template_options == {"enable_thinking": False}


# What is refused, and what is counted.


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_what_is_learnt_is_refused_by_name(name: str) -> None:
    for row in ({"messages": HI}, {"prompt": "q", "completion": "a"}):
        bad = read({**row, name: ["x"]})
        assert isinstance(bad, BadRow)
        assert bad.reason.startswith(f"'{name}' is not supported: ")
        assert f"data.columns={{{name}: null}}" in bad.reason
        assert isinstance(read({**row, name: ["x"]}, **{name: None}), Row)
        assert isinstance(read({**row, name: None}), Row)
        assert isinstance(read({**row, name: []}), Row)


@pytest.mark.parametrize(
    ("key", "value", "is_bad"),
    [
        *((name, value, True) for name in WEIGHTS for value in (0, 0.5, "0.5", 2)),
        *((name, value, False) for name in WEIGHTS for value in (1, 1.0, "1", None, "heavy")),
        *((name, value, True) for name in ("label", "kto_tag") for value in (False, "false", "False")),
        *((name, value, False) for name in ("label", "kto_tag") for value in (True, "true", "sports", 0, 3)),
    ],
)
def test_weights_and_labels_that_say_otherwise_are_refused(key: str, value: Any, is_bad: bool) -> None:
    row = read({"messages": HI, key: value})
    assert isinstance(row, BadRow) == is_bad
    assert not isinstance(row, BadRow) or f"'{key}'" in row.reason


@pytest.mark.parametrize("key", ["instruction", "input", "output", "system"])
@pytest.mark.parametrize("value", [0, False, 4, True, 1.5, ["a"], [], {"a": 1}, {}])
def test_a_text_of_another_type_is_refused_and_no_value_is_taken_for_absent(key: str, value: Any) -> None:
    bad = read({"instruction": "q", "output": "a", key: value})
    assert bad == BadRow("here", f"'{key}' is {type(value).__name__}, not text")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "no keys that rows are recognised by"),
        ({"foo": "q", "bar": "a"}, "no keys that rows are recognised by"),
        ({"instruction": "q"}, "no 'output'"),
        ({"question": "q"}, "no 'answer'"),
        ({"prompt": [HI[0]]}, "no 'completion'"),
        ({"instruction": "q", "output": " "}, "'output' is empty"),
        ({"instruction": " ", "output": "a"}, "'instruction' is empty"),
        ({"text": "\n"}, "'text' is empty"),
        ({"messages": []}, "'messages' should be a list of turns"),
        ({"messages": 5}, "'messages' should be a list of turns"),
        ({"messages": "hi"}, "'messages' is text that is no JSON"),
        ({"messages": ["hi"]}, "a turn should have role and content"),
        ({"messages": [{"content": "hi"}]}, "a turn has no 'role'"),
        ({"messages": [{"role": "user"}]}, "a turn has no 'content'"),
        ({"messages": [{"role": "user", "content": 5}]}, "a turn's 'content' is not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of a turn's 'content'"),
        ({"messages": [{**HI[0], "images": ["a.png"]}, HI[1]]}, "'images' in a turn is not supported"),
        ({"messages": [HI[0], {**HI[1], "weight": 0.5}]}, "a turn's 'weight' is neither 0 nor 1"),
        ({"messages": [HI[0], {**HI[1], "train": "no"}]}, "a turn's 'train' is neither true nor false"),
        ({"messages": [HI[0], {**HI[1], "train_detail": [1]}]}, "'train_detail' in a turn is not supported"),
        ({"messages": HI[:1]}, "no turn of the assistant's says anything"),
        ({"messages": [HI[0], {"role": "assistant", "content": " "}]}, "no turn of the assistant's says anything"),
        ({"messages": [{"role": "system", "content": "a"}, *HI], "system": "b"}, "'system' stands beside"),
        ({"messages": HI, "tools": "f"}, "'tools' is text that is no JSON"),
        ({"messages": HI, "tools": {"a": 1}}, "'tools' should be a list of declarations"),
        ({"messages": HI, "tools": [3]}, "'tools' should be a list of declarations"),
        ({"messages": HI, "chat_template_kwargs": 3}, "'chat_template_kwargs' should be a mapping"),
        ({"conversations": [{"from": "function_call", "value": "no"}]}, "'value' is text that is no JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "a call of a tool has no 'name'"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "'history' should be a list of pairs"),
        ({"messages": [{"role": "user", "content": "\ud800"}, HI[1]]}, "half of a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_read_says_why(record: dict[str, Any], reason: str) -> None:
    bad = read(record)
    assert isinstance(bad, BadRow)
    assert bad.reason.startswith(reason)


def strings(value: Any) -> Iterator[str]:
    """Yield the made-up texts in a value."""
    if isinstance(value, str):
        yield from [value] if value.startswith("<") else []
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from strings(inner)


@pytest.mark.parametrize("seed", range(30))
def test_every_text_of_a_record_is_in_its_row_or_its_key_is_counted(seed: int) -> None:
    """The property that holds all of it: nothing that a file says is gone without a word."""
    draw = random.Random(seed)
    names = [*COLUMNS, "id", "source", "category", "lang", "note", "label", "score"]
    for _ in range(200):
        serial = iter(range(100))
        record: dict[str, Any] = {}
        for key in draw.sample(names, draw.randint(1, 6)):
            text = f"<{key}-{next(serial)}>"
            if key in ("messages", "conversations", "conversation"):
                record[key] = [
                    {"role": "user", "content": text},
                    {"from": "gpt", "value": f"{text}!", "extra": text * 2},
                ]
            elif key == "history":
                record[key] = [[text, f"{text}!"]]
            elif key in ("tools", "functions"):
                record[key] = [{"name": text}]
            elif key == "chat_template_kwargs":
                record[key] = {"a": text}
            else:
                record[key] = text
        seen = Seen()
        row = read(record, seen)
        if isinstance(row, BadRow):
            assert row.reason
            continue
        used = [*strings(row.messages), *strings(row.tools), *strings(row.template_options), row.text or ""]
        for key, value in record.items():
            if key not in seen.unused:
                assert all(any(text in place for place in used) for text in strings(value)), (key, record)
        assert seen.unused.keys() <= {*record, "extra of turns"}


def test_keys_that_are_not_used_are_told_once_with_counts(tmp_path: Path) -> None:
    rows = [{"messages": HI, "id": number, "note": "" if number % 2 else "x"} for number in range(10)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    seen = Seen()
    assert len(list(find_source(str(tmp_path / "rows.json")).rows(seen))) == 10
    assert seen.unused == Counter(id=10, note=5)
    assert list(seen.notices("rows")) == ["rows: of 10 rows these keys are not used: id (10), note (5)"]


# Columns.


def test_columns_are_mapped() -> None:
    row = {"frage": "q", "antwort": "a", "instruction": "another"}
    assert turns(row, instruction="frage", output="antwort") == [("user", "q"), ("assistant", "a")]
    assert turns({"dialog": HI}, messages="dialog") == [("user", "hi"), ("assistant", "hello")]
    with pytest.raises(UserError, match="Did you mean 'instruction'"):
        check_columns({"instructions": "frage"})


def test_a_column_that_no_row_has_is_named_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"question": "q", "reply": "a"}]))
    with pytest.raises(UserError, match=r"data.columns: no row of .* has 'reply_'. Did you mean 'reply'"):
        list(find_source(str(tmp_path / "rows.json"), {"output": "reply_"}).rows())


# Bad rows together.


@pytest.mark.parametrize("count", [1, 2, 3, 300])
def test_bad_rows_are_counted_by_reason_and_the_first_three_shown(count: int) -> None:
    bad = BadRows()
    for number in range(count):
        bad.add(BadRow(f"rows.jsonl, line {number}", "not JSON" if number % 2 else "no 'output'", f"detail {number}"))
    again = BadRows.from_dict(json.loads(json.dumps(bad.as_dict())))
    assert again == bad
    with pytest.raises(UserError) as refused:
        bad.settle("rows.jsonl", 1000, "refuse")
    (told,) = bad.settle("rows.jsonl", 1000, "drop")
    for text in (str(refused.value), told):
        for number in range(min(count, 3)):
            assert f"line {number}: " in text
            assert f"detail {number}" in text
        assert "line 3:" not in text
        assert count == 1 or f"no 'output' ({(count + 1) // 2})" in text
    assert "data.bad_rows=drop" in str(refused.value)
    assert told.startswith(f"{count} of 1,000 rows of rows.jsonl are left out")
    with pytest.raises(UserError, match="line 0"):
        bad.settle("rows.jsonl", count, "drop")  # nothing would remain
