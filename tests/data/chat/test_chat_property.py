"""Any row, any template: each part is in the text once and the answers alone carry loss, or the row is named."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from subspace.data.chat.control import control_tokens
from subspace.data.chat.encoding import EncodedRow, RowEncoder
from subspace.data.rows import BadRow, Row
from tests.helpers.chat_templates import ADDED, CONTROL, chat_tokenizer, templates

ROWS = 25  # of each template
PLACE = "rows.jsonl, line 7"
PIECES = (
    *(
        "a word",
        "two\nlines",
        "\n\n",
        "  ",
        "\t",
        '"quoted"',
        "back\\slash",
        "{{ messages }}",
        "{% generation %}",
        "{#",
    ),
    *("été", "日本語", "שלום", "👩‍👩‍👧", "e\u0301", "\u200b", "\u2028", "\x00", "\x1b[31m", "\u0130", "ﬁ"),
    *("\U00010600\U00010602", "\U000f0001", "\U00100001", "None", "user", "assistant", "USER: ", "[TOOL_CALLS]"),
    *("<|im_", "end|>", "<|", "|>", "</s", "<|begin_of_text|>", "<|end_of_text|>", *CONTROL, *ADDED),
)


@dataclass
class Made:
    """A row, and its texts by the words that only they hold: their turns, and what they are."""

    row: Row
    words: dict[str, tuple[int, str, str]] = field(default_factory=dict)


class Maker:
    """Maker of random rows."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.words: dict[str, tuple[int, str, str]] = {}

    def text(self, turn: int, kind: str, *, spelt: bool = True, empty: float = 0.05) -> str:
        if self.draw.random() < empty:
            return self.draw.choice(["", " ", "\n"])
        word = f"zq{len(self.words)}qz"
        pieces = [*PIECES] if spelt else [piece for piece in PIECES if "think>" not in piece]
        parts = self.draw.choices(pieces, k=self.draw.choice([0, 1, 2, 4, 8]))
        if self.draw.random() < 0.03:
            parts.append("long " * 1000)
        parts.insert(self.draw.randrange(len(parts) + 1), f" {word} ")
        text = "".join(parts)
        self.words[word] = turn, kind, text
        return text

    def row(self) -> Made:
        turns: list[dict[str, Any]] = []
        if self.draw.random() < 0.4:
            turns.append({"role": "system", "content": self.text(0, "content")})
        tools: tuple[Any, ...] = ()
        with_tools, thinking = self.draw.random() < 0.3, self.draw.random() < 0.3
        for _ in range(self.draw.choice([1, 1, 2, 3, 5])):
            turns.append({"role": "user", "content": self.text(len(turns), "content")})
            if with_tools and self.draw.random() < 0.7:
                tools = tools or (self.tool(),)
                turns.append(self.call(len(turns)))
                turns.append({"role": "tool", "tool_call_id": "call00001", "content": self.text(len(turns), "content")})
            answer: dict[str, Any] = {"role": "assistant", "content": self.text(len(turns), "content", spelt=False)}
            if thinking and self.draw.random() < 0.7:
                answer["reasoning_content"] = self.text(len(turns), "thoughts", spelt=False)
            if self.draw.random() < 0.1:
                answer["weight"] = 0
            turns.append(answer)
        return Made(Row(PLACE, tuple(turns), tools), self.words)

    def tool(self) -> dict[str, Any]:
        properties = {"city": {"type": "string", "description": self.text(-1, "declaration", empty=0)}}
        function = {
            "name": "look_up",
            "description": "Look it up.",
            "parameters": {"type": "object", "properties": properties},
        }
        return {"type": "function", "function": function}

    def call(self, turn: int) -> dict[str, Any]:
        arguments: dict[str, Any] = {"city": self.text(turn, "arguments", empty=0), "days": self.draw.randrange(9)}
        given: Any = arguments if self.draw.random() < 0.5 else json.dumps(arguments, ensure_ascii=False)
        call = {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": given}}
        said = {"content": ""} if self.draw.random() < 0.5 else {}
        return {"role": "assistant", **said, "tool_calls": [call]}


def forms(text: str) -> Iterator[str]:
    """Yield how a text may stand in another: as it is, in JSON, or its white space changed (which is told)."""
    yield text.strip()
    yield json.dumps(text.strip(), ensure_ascii=False)[1:-1]
    yield json.dumps(text.strip())[1:-1]


def check(made: Made, encoded: EncodedRow, encoder: RowEncoder) -> int:
    """Assert that a row is written and trained on as it should be; return the number of its parts in the text."""
    tokenizer = encoder.tokenizer
    whole = str(tokenizer.decode(encoded.ids))
    trained = [str(tokenizer.decode(encoded.ids[start:end])) for _, start, end in encoded.answers]
    told, places = " ".join(encoder.told), []
    for word, (turn, kind, text) in made.words.items():
        role = made.row.messages[turn]["role"] if turn >= 0 else "tools"
        count = whole.count(word)
        left_out = {"thoughts": "thoughts of a turn", "declaration": "words of a tool's declaration"}.get(kind)
        assert count == 1 or (count == 0 and left_out and left_out in told), (kind, count)
        if not count:
            continue
        assert any(form in whole for form in forms(text)) or "white space" in told
        if role not in ("system", "tools"):
            places.append((whole.index(word), turn))
        learnt = sum(answer.count(word) for answer in trained)
        own = role == "assistant" and made.row.messages[turn].get("weight") != 0
        assert learnt == own, (kind, role, learnt)
    turns = [turn for _, turn in sorted(places)]
    assert turns == sorted(turns)
    return len(places)


def without_control_tokens(row: Row, tokens: list[str]) -> Row:
    def plain(value: Any) -> Any:
        if isinstance(value, str):
            for token in tokens:
                value = value.replace(token, "ctl")
            return value
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    return replace(row, messages=tuple(plain(turn) for turn in row.messages), tools=tuple(map(plain, row.tools)))


@pytest.mark.parametrize("name", templates())
def test_any_row_is_written_right_or_named(name: str) -> None:
    encoder = RowEncoder(chat_tokenizer(templates()[name]), "{{ instruction }}", asked=False, date="2025-01-31")
    tokens = sorted(control_tokens(encoder.tokenizer), key=len, reverse=True)
    found = checked = 0
    for seed in range(ROWS):
        made = Maker(seed).row()
        encoder.told.clear()
        encoded = encoder.encode(made.row)
        if isinstance(encoded, BadRow):
            assert encoded.where == PLACE
            assert encoded.reason
            continue
        assert encoded.where == PLACE
        assert all(where == PLACE and count == 1 for count, where in encoder.told.values())
        checked += check(made, encoded, encoder)
        found += 1
        # No letters of the row's became a control token: there are as many as without those letters.
        plain = encoder.encode(without_control_tokens(made.row, tokens))
        if isinstance(plain, EncodedRow):
            of = encoder.control.ids
            assert [i for i in encoded.ids if i in of] == [i for i in plain.ids if i in of]
    if "/" not in name:
        assert found >= ROWS // 5, f"only {found} of {ROWS} rows were written"
        assert checked
