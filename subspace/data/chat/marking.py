"""Which texts of a row are marked, so that they are found in the rendered text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from subspace.data.chat.marks import Marks, Part

REASONING = ("reasoning_content", "reasoning", "thinking")
UNMARKED = {"role", "type", "id", "tool_call_id"}
"""Keys of a turn that a template compares, and whose absence from the text loses nothing."""
SPOKEN = {"name", "description", "enum", "const", "default", "title", "pattern", "format", "examples"}
"""Keys of a declaration whose texts are marked; templates compare the others, as ``type`` and ``required``."""

_THOUGHT = re.compile(r"(\s*<think>)?(?:(?!</?think>).)*(</think>)(?:(?!</?think>).)*", re.DOTALL)


@dataclass(frozen=True)
class Tier:
    """How much of a row is marked. ``literals`` are texts that the template looks for, which are then left unmarked."""

    literals: Sequence[str] = ()
    calls: bool = True
    tools: bool = True


@dataclass(frozen=True)
class Marked:
    """A row with its texts marked.

    Attributes:
        turns: with marks.
        tools: with marks.
        parts: the marked texts, by their numbers.
        texts: those of the row that have marks.
        unmarked: for texts that are not marked, each with its turn: spellings, one of which must be in the text.
    """

    turns: list[dict[str, Any]]
    tools: list[Any]
    parts: list[Part]
    texts: set[str]
    unmarked: list[tuple[int, str, tuple[str, ...]]]


def all_texts(value: Any) -> Iterator[str]:
    """Yield every text in a value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from all_texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from all_texts(inner)


def mark_row(turns: Sequence[Mapping[str, Any]], tools: Sequence[Any], marks: Marks, tier: Tier) -> Marked:
    """Return a row with its texts marked."""
    marker = _Marker(marks, tier)
    marked_turns = [marker.turn(number, turn) for number, turn in enumerate(turns)]
    marked_tools = [marker.tool(tool) for tool in tools]
    return Marked(marked_turns, marked_tools, marker.parts, marker.texts, marker.unmarked)


class _Marker:
    def __init__(self, marks: Marks, tier: Tier) -> None:
        self.marks, self.tier = marks, tier
        self.parts: list[Part] = []
        self.texts: set[str] = set()
        self.unmarked: list[tuple[int, str, tuple[str, ...]]] = []
        self.leaves = 0

    def turn(self, number: int, turn: Mapping[str, Any]) -> dict[str, Any]:
        assistant = turn.get("role") == "assistant"
        marked = dict(turn)
        for key, value in turn.items():
            if key == "tool_calls" and isinstance(value, list | tuple):
                marked[key] = [self.call(number, call) for call in value]
            elif key == "content":
                marked[key] = self.values(number, key, value, thought=assistant)
            elif key in REASONING:
                marked[key] = self.values(number, "reasoning", value)
            elif key not in UNMARKED and self.tier.calls:
                marked[key] = self.values(number, key, value)
        return marked

    def call(self, number: int, call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self.call(number, call["function"])}
        marked = dict(call)
        if isinstance(call.get("name"), str):
            marked["name"] = self.name(number, "call", call["name"], marked=self.tier.calls)
        if "arguments" in call:
            marked["arguments"] = self.argument(number, call["arguments"])
        return marked

    def argument(self, number: int, value: Any) -> Any:
        """Return arguments with their texts marked; keys, numbers and the like must be in the text as they are."""
        if isinstance(value, str):
            if self.tier.calls:
                return self.text(number, "arguments", value)
            self.unmarked.append((number, "arguments", _spellings(value)))
            return value
        if isinstance(value, Mapping):
            self.unmarked += [(number, "arguments", _spellings(str(key))) for key in value]
            return {key: self.argument(number, inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.argument(number, inner) for inner in value]
        if value is not None:
            self.unmarked.append((number, "arguments", (json.dumps(value), str(value))))
        return value

    def tool(self, tool: Any) -> Any:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping):
            return {**tool, "function": self.tool(function)}
        if not isinstance(tool, Mapping):
            return tool
        marked = dict(tool)
        if isinstance(tool.get("name"), str):
            marked["name"] = self.name(-1, "tool", tool["name"], marked=self.tier.tools)
        if self.tier.tools:
            rest = {key: value for key, value in tool.items() if key != "name"}
            marked |= self.declaration(rest)
        return marked

    def declaration(self, value: Any, *, spoken: bool = False) -> Any:
        if isinstance(value, str):
            return self.text(-1, "description", value) if spoken else value
        if isinstance(value, Mapping):
            return {key: self.declaration(inner, spoken=key in SPOKEN) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.declaration(inner, spoken=spoken) for inner in value]
        return value

    def name(self, number: int, kind: str, name: str, *, marked: bool) -> str:
        if marked:
            return self.text(number, kind, name)
        self.unmarked.append((number, kind, _spellings(name)))
        return name

    def values(self, number: int, kind: str, value: Any, *, thought: bool = False) -> Any:
        if isinstance(value, str):
            return self.text(number, kind, value, thought=thought)
        if isinstance(value, Mapping):
            return {
                key: inner if key in UNMARKED else self.values(number, kind, inner, thought=thought)
                for key, inner in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.values(number, kind, inner, thought=thought) for inner in value]
        return value

    def text(self, number: int, kind: str, text: str, *, thought: bool = False) -> str:
        """Return a text with marks; with ``thought``, the words around the thoughts that it begins with have none."""
        written, lead, last = "", "", None
        for piece, role in self.pieces(text, thought=thought):
            if role != "marked" or not piece.strip():
                written += piece
                lead = "" if role == "tag" else lead + piece
                continue
            core = piece.strip()
            start = piece.index(core)
            last = len(self.parts)
            self.parts.append(Part(number, kind, core, self.leaves, lead + piece[:start]))
            written += self.marks.around(last, piece)
            lead = piece[start + len(core) :]
        if last is not None:
            self.parts[last] = replace(self.parts[last], trail=lead)
            self.texts.add(text)
        self.leaves += 1
        return written

    def pieces(self, text: str, *, thought: bool) -> Iterator[tuple[str, str]]:
        """Yield the pieces of a text: ``marked`` ones, ``literal`` ones and the ``tag``s around thoughts.

        An answer that begins with ``<think>`` is to say so by the model's own tokens, not by their letters.
        """
        found = _THOUGHT.fullmatch(text) if thought else None
        if found is None:
            yield from self.at_literals(text)
            return
        opening, closing = found.span(1), found.span(2)
        begin = max(opening[1], 0)
        yield text[:begin], "tag"
        yield from self.at_literals(text[begin : closing[0]])
        yield text[slice(*closing)], "tag"
        yield from self.at_literals(text[closing[1] :])

    def at_literals(self, text: str) -> Iterator[tuple[str, str]]:
        literals = [literal for literal in self.tier.literals if literal in text]
        if not literals:
            yield text, "marked"
            return
        for i, piece in enumerate(re.split(f"({'|'.join(map(re.escape, literals))})", text)):
            yield piece, "literal" if i % 2 else "marked"


def _spellings(text: str) -> tuple[str, ...]:
    return (text.strip(), json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
