"""Turns of conversations in the spellings that people use, brought to role and content and OpenAI's calls of tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subspace.data.sources.json_records import parse_json

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function": "tool",
}
CALLS = ("function_call", "tool_call")  # roles of turns that call tools
SWITCHES = ("loss", "train", "training")
"""Keys of a turn by which people leave it out of the loss, with false; ``weight`` does it with 0."""

KNOWN_KEYS = {
    *("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking"),
    *("function_call", "refusal", "audio", "annotations", "weight"),
}
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class Bad(Exception):
    """A row that cannot be trained on: the reason, the same for all rows of the kind, and what it is in this one."""


def read_turns(name: str, value: Any) -> list[dict[str, Any]]:
    """Return the turns of a conversation.

    Args:
        name: its key in the row.
        value: a list of turns; or JSON of one, as a cell of a CSV file holds it.

    Raises:
        Bad: it is none, or holds what cannot be trained on.
    """
    value = from_json(name, value) if isinstance(value, str) else value
    if isinstance(value, Mapping):  # a table's column of lists in place of a list of turns
        value = _transposed(value)
    if not isinstance(value, list):
        raise Bad(f"'{name}' should be a list of turns, each with role and content", f"not {type(value).__name__}")
    if not value:
        raise Bad(f"'{name}' should be a list of turns, each with role and content", "empty")
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping):
            raise Bad("a turn should have role and content", f"turn {number} is {type(turn).__name__}")
        turns += _turn(f"turn {number}", dict(turn))
    return turns


def from_json(name: str, text: str) -> Any:
    """Return the value of a key whose text should be JSON."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise Bad(f"'{name}' is text that is no JSON", str(error)[:80]) from None


def _transposed(columns: Mapping[str, Any]) -> Any:
    lengths = {len(values) if isinstance(values, list) else -1 for values in columns.values()}
    if len(lengths) != 1 or lengths == {-1}:
        return dict(columns)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _turn(place: str, turn: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a turn with role and content, its other keys as they are; or both turns of a pair."""
    for user in ("human", "user"):
        if {user, "assistant"} <= turn.keys() and "role" not in turn:
            pair = (("user", turn.pop(user)), ("assistant", turn.pop("assistant")))
            return [{"role": role, "content": _content(place, {"content": content})} for role, content in pair]
    for ours, theirs in (("role", "from"), ("content", "value")):
        if ours not in turn and theirs in turn:
            turn = {ours: turn.pop(theirs), **turn}
    role = turn.get("role")
    if not isinstance(role, str) or not role.strip():
        raise Bad("a turn has no 'role'", _named(place, turn))
    for key in (*MEDIA, "train_detail"):
        if turn.get(key):
            raise Bad(f"'{key}' in a turn is not supported", place)
    known = role.strip().casefold()
    turn = _weighed(place, turn, answers=known in CALLS or ROLES.get(known) == "assistant")
    if known in CALLS:
        return [{**turn, "role": "assistant", "content": "", "tool_calls": _calls(place, turn.get("content"))}]
    return [_answered(place, {**turn, "role": ROLES.get(known, role)})]


def _answered(place: str, turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn with its calls of tools in their present form, and its content as text."""
    if isinstance(turn.get("function_call"), Mapping):  # OpenAI's earlier form
        turn["tool_calls"] = [_call(place, turn.pop("function_call"))]
    if isinstance(turn.get("tool_calls"), str):
        turn["tool_calls"] = from_json("tool_calls", turn["tool_calls"])
    says = any(turn.get(key) for key in ("tool_calls", "reasoning_content", "reasoning", "thinking"))
    if turn.get("content") is not None or turn["role"] != "assistant" or not says:
        turn["content"] = _content(place, turn)
    return turn


def _named(place: str, turn: Mapping[str, Any]) -> str:
    return f"{place} has {', '.join(map(str, turn)) or 'nothing'}"


def _weighed(place: str, turn: dict[str, Any], *, answers: bool) -> dict[str, Any]:
    """Return the turn, with ``weight: 0`` if it is an answer that is left out of the loss."""
    weight = turn.pop("weight", None)
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise Bad("a turn's 'weight' is neither 0 nor 1", f"{place}: {weight}")
    off = weight == 0
    for key in SWITCHES:
        value = turn.pop(key, None)
        if value is not None and not isinstance(value, bool):
            raise Bad(f"a turn's '{key}' is neither true nor false", f"{place}: {value}")
        off |= value is False
    return {**turn, "weight": 0} if off and answers else turn


def _content(place: str, turn: Mapping[str, Any]) -> str:
    """Return a turn's text; that of its parts where they are text only."""
    content = turn.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        raise Bad("a turn has no 'content'", _named(place, turn))
    if not isinstance(content, list):
        raise Bad("a turn's 'content' is not text", f"{place}: {type(content).__name__}")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            kind = part.get("type", "a mapping") if isinstance(part, Mapping) else type(part).__name__
            raise Bad("a part of a turn's 'content' is not text", f"{place}: {kind}")
        texts.append(text)
    return "".join(texts)


def _calls(place: str, value: Any) -> list[dict[str, Any]]:
    """Return the calls that a turn of ShareGPT's function_call says, in JSON: one or several."""
    value = from_json("value", value) if isinstance(value, str) else value
    calls = value if isinstance(value, list) else [value]
    return [_call(place, call) for call in calls]


def _call(place: str, call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise Bad("a call of a tool has no 'name'", place)
    return {"type": "function", "function": dict(call)}


def read_tools(value: Any) -> tuple[Any, ...]:
    """Return a row's declarations of tools, each as ``{"type": "function", "function": ...}``; also from JSON text."""
    value = from_json("tools", value) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise Bad("'tools' should be a list of declarations", f"not {type(value).__name__}")
    tools = []
    for tool in value:
        tool = from_json("tools", tool) if isinstance(tool, str) else tool
        if not isinstance(tool, Mapping):
            raise Bad("'tools' should be a list of declarations", f"with {type(tool).__name__} in it")
        bare = "name" in tool and "function" not in tool and "type" not in tool
        tools.append({"type": "function", "function": dict(tool)} if bare else dict(tool))
    return tuple(tools)


def read_history(value: Any) -> list[dict[str, Any]]:
    """Return the earlier turns of an instruction: pairs of question and answer, or turns."""
    value = from_json("history", value) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise Bad("'history' should be a list of pairs of question and answer", f"not {type(value).__name__}")
    turns: list[dict[str, Any]] = []
    for number, pair in enumerate(value, start=1):
        if isinstance(pair, Mapping):
            turns += _turn(f"turn {number} of 'history'", dict(pair))
        elif isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair):
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        else:
            raise Bad("'history' should be a list of pairs of question and answer", f"entry {number}")
    return turns
