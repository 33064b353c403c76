"""What a chat template writes of a row: the text, and where each part of the row stands in it.

Everything that the row says must be in the text once, in its order. What the template leaves out is told with counts
where it is meant to (thoughts of earlier turns, names of speakers), and makes a bad row otherwise.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from subspace.data.chat.marking import REASONING, Marked, Tier, all_texts, mark_row
from subspace.data.chat.marks import Marks, Part, Segment
from subspace.data.chat.template import RESERVED, ChatTemplate
from subspace.data.rows import BadRow, Row
from subspace.errors import UserError

Turn = dict[str, Any]
Form = tuple[list[Turn], list[Any]]

UNTRAINED = {"weight": 0, "loss": False, "train": False, "training": False}
"""Keys of a turn that leave it out of the loss, with the value that does; templates do not get them."""
ONCE = {"content", "reasoning", "arguments"}


@dataclass(frozen=True)
class Written:
    """A row as its template writes it.

    Attributes:
        text: all of it.
        segments: its pieces, of the parts and of the template.
        parts: the row's, by the numbers that the segments have.
        turns: as they were given to the template.
        tools: as they were given to the template.
        options: of the row.
        marked: the turns and tools with marks, to render beginnings of the conversation.
        marks: the marks.
        trained: for each turn, whether it may carry loss.
        told: what the template leaves out.
    """

    text: str
    segments: list[Segment]
    parts: list[Part]
    turns: list[Turn]
    tools: list[Any]
    options: Mapping[str, Any]
    marked: Marked
    marks: Marks
    trained: list[bool]
    told: list[str]


@dataclass(frozen=True)
class _Fault:
    """Why a form of a row cannot be written: ``rank`` is higher for what comes nearer to a right text."""

    rank: int
    reason: str
    detail: str = ""


def write(row: Row, template: ChatTemplate) -> Written | BadRow:
    """Return what the template writes of a row.

    A template may want arguments of tools as JSON or as mappings, or texts as lists of parts: what is given is tried
    first, and then the other forms.
    """
    if reserved := RESERVED & row.template_options.keys():
        return BadRow(row.where, f"'{min(reserved)}' in chat_template_kwargs is not a template's to know")
    turns = [{key: value for key, value in turn.items() if key not in UNTRAINED} for turn in row.messages]
    trained = [turn.get("role") == "assistant" and not is_untrained(turn) for turn in row.messages]
    fault: _Fault | None = None
    for form in _forms(turns, list(row.tools)):
        found = _write(form, template, row.template_options, trained)
        if isinstance(found, Written):
            return found
        if fault is None or found.rank > fault.rank:
            fault = found
    assert fault is not None
    return BadRow(row.where, fault.reason, fault.detail)


def is_untrained(turn: Mapping[str, Any]) -> bool:
    """Return True if a turn says that it carries no loss."""
    return any(key in turn and turn[key] is not None and turn[key] == value for key, value in UNTRAINED.items())


# Forms of a row.


def _forms(turns: list[Turn], tools: list[Any]) -> Iterator[Form]:
    """Yield the forms in which a row is tried, the usual one first."""
    turns = [_with_calls(turn, _call_mapping) for turn in turns]
    changes: list[Callable[[Form], Form]] = [
        lambda form: ([_with_calls(turn, _call_text) for turn in form[0]], form[1]),
        lambda form: ([{"content": "", **turn} if turn.get("content") is None else turn for turn in form[0]], form[1]),
        lambda form: ([_content_parts(turn) for turn in form[0]], form[1]),
        lambda form: ([_with_calls(turn, _call_bare) for turn in form[0]], form[1]),
        lambda form: (form[0], [_bare(tool) for tool in form[1]]),
    ]
    form: Form = (turns, tools)
    effective = [change for change in changes if change(form) != form]
    for count in range(min(len(effective), 3) + 1):
        for chosen in itertools.combinations(effective, count):
            changed = form
            for change in chosen:
                changed = change(changed)
            yield changed


def _with_calls(turn: Turn, change: Callable[[dict[str, Any]], Any]) -> Turn:
    calls = turn.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return turn
    return {**turn, "tool_calls": [change(dict(call)) if isinstance(call, Mapping) else call for call in calls]}


def _call_mapping(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call as ``{"type": "function", "function": {...}}`` with its arguments as a mapping, if they are one."""
    if "function" not in call and "name" in call:
        inner = {key: value for key, value in call.items() if key not in ("id", "type")}
        call = {key: value for key, value in call.items() if key in ("id", "type")} | {"function": inner}
    function = call.get("function")
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            loaded = json.loads(arguments)
        except ValueError:
            loaded = None
        # Not where the text says more than a mapping can, such as one key twice.
        if isinstance(loaded, dict) and _same_json(arguments, loaded):
            function = {**function, "arguments": loaded}
    return {"type": "function", **call, "function": dict(function)}


def _same_json(text: str, value: Any) -> bool:
    squeezed = "".join(text.split())
    return any("".join(json.dumps(value, ensure_ascii=ascii).split()) == squeezed for ascii in (False, True))


def _call_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), Mapping | list):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _call_bare(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping):
        return call
    return {key: value for key, value in call.items() if key != "function"} | dict(function)


def _content_parts(turn: Turn) -> Turn:
    content = turn.get("content")
    return {**turn, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn


def _bare(tool: Any) -> Any:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return dict(function) if isinstance(function, Mapping) else tool


# One form.


def _write(form: Form, template: ChatTemplate, options: Mapping[str, Any], trained: list[bool]) -> Written | _Fault:
    turns, tools = form
    try:
        text = template.render(turns, tools, options)
    except UserError:
        raise
    except Exception as error:  # a template may raise any exception
        meant = type(error).__name__ == "TemplateError"  # by raise_exception, and not for want of something
        return _Fault(int(meant), f"the tokenizer's chat template refuses the conversation: {_said(error)}")
    marks = Marks(itertools.chain(all_texts(turns), all_texts(tools), [template.source(tools=bool(tools))]))
    literals = template.literals(tools=bool(tools))
    tiers = (Tier(), Tier(literals), Tier(literals, tools=False), Tier(literals, tools=False, calls=False))
    for tier in tiers if marks.usable else ():
        marked = mark_row(turns, tools, marks, tier)
        try:
            segments = marks.split(template.render(marked.turns, marked.tools, options))
        except Exception:  # over the marks
            continue
        if segments is None or "".join(segment.text for segment in segments) != text:
            continue
        judge = _Judge(segments, marked, turns)
        found = judge.fault()
        if found is None and (printed := _python_printed(form, text)):
            found = _Fault(3, "the tokenizer's chat template prints values as Python does", printed)
        if found is None:
            return Written(text, segments, marked.parts, turns, tools, options, marked, marks, trained, judge.told)
        return found
    return _Fault(2, "the tokenizer's chat template writes the row in a way that cannot be followed")


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__


def _python_printed(form: Form, text: str) -> str:
    """Return a mapping or list of the row that the text has as Python prints it, and not as JSON; or nothing."""
    for value in _structures(form):
        printed = str(value)
        if len(printed) > 2 and printed != json.dumps(value, ensure_ascii=False) and printed in text:
            return printed[:80]
    return "None" if _absent_printed(form, text) else ""


def _absent_printed(form: Form, text: str) -> bool:
    absent = any("content" in turn and turn["content"] is None for turn in form[0])
    return absent and text.count("None") > sum(part.count("None") for part in all_texts(form))


def _structures(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping | list | tuple):
        if not isinstance(value, tuple):
            yield value
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _structures(inner)


class _Judge:
    """Comparison of a row with its rendered text. ``told`` are sentences on what the template leaves out by design."""

    def __init__(self, segments: Sequence[Segment], marked: Marked, turns: Sequence[Turn]) -> None:
        self.segments, self.marked, self.turns = segments, marked, turns
        self.told: list[str] = []
        self.order = [segment.part for segment in segments if segment.part is not None]

    def fault(self) -> _Fault | None:
        """Return the first thing that is wrong, or None."""
        return self._lost() or self._unordered() or self._changed() or self._unmarked_lost()

    def _lost(self) -> _Fault | None:
        for number, part in enumerate(self.marked.parts):
            count = self.order.count(number)
            if count == 0 and (fault := self._leaves_out(part)):
                return fault
            if count > 1 and part.kind in ONCE:
                return _Fault(3, f"the tokenizer's chat template writes {self._what(part)} twice", self._shown(part))
        return None

    def _leaves_out(self, part: Part) -> _Fault | None:
        if part.kind == "reasoning" or self._is_thought(part):
            self._tell("thoughts of a turn")
        elif part.kind == "tool":
            self._tell("the declaration of a tool")
        elif part.kind in ONCE or part.kind == "call":
            return _Fault(3, f"the tokenizer's chat template leaves out {self._what(part)}", self._shown(part))
        elif part.kind == "description":
            self._tell("words of a tool's declaration")
        elif not (part.kind == "name" and self.turns[part.turn].get("role") == "tool"):  # the call says it
            self._tell(f"'{part.kind}' of a turn")
        return None

    def _tell(self, what: str) -> None:
        if what not in self.told:
            self.told.append(what)

    def _is_thought(self, part: Part) -> bool:
        """Return True for a part of an answer before the end of its thoughts."""
        if part.kind != "content" or self.turns[part.turn].get("role") != "assistant":
            return False
        content = self.turns[part.turn].get("content")
        if not isinstance(content, str) or "</think>" not in content:
            return False
        thoughts, _, said = content.partition("</think>")
        last = max(i for i, other in enumerate(self.marked.parts) if other.leaf == part.leaf)
        return part.text in thoughts and (part is not self.marked.parts[last] or not said.strip())

    def _unordered(self) -> _Fault | None:
        last = -1
        for number in self.order:
            part = self.marked.parts[number]
            if part.kind not in ONCE or self.turns[part.turn].get("role") in ("system", "developer"):
                continue
            if part.turn < last:
                return _Fault(2, "the tokenizer's chat template changes the order of the turns", self._shown(part))
            last = part.turn
        return None

    def _changed(self) -> _Fault | None:
        for segment in self.segments:
            if segment.part is None:
                continue
            part = self.marked.parts[segment.part]
            if segment.text in _written_forms(part.text):
                continue
            if "".join(segment.text.split()) != "".join(part.text.split()):
                return _Fault(3, f"the tokenizer's chat template changes {self._what(part)}", self._shown(part))
            self._tell("white space inside a turn")
        return None

    def _unmarked_lost(self) -> _Fault | None:
        written = "\0".join(segment.text for segment in self.segments if segment.part is None)
        for turn, kind, spellings in self.marked.unmarked:
            if any(spelling in written for spelling in spellings):
                continue
            if kind == "tool":
                self._tell("the declaration of a tool")
            else:
                part = Part(turn, kind, spellings[0], -1)
                return _Fault(3, f"the tokenizer's chat template leaves out {self._what(part)}", self._shown(part))
        return None

    def _what(self, part: Part) -> str:
        if part.kind in ("call", "arguments"):
            return "the call of a tool"
        role = self.turns[part.turn].get("role")
        return "the system prompt" if role == "system" else f"a turn of the role '{role}'"

    def _shown(self, part: Part) -> str:
        shown = part.text if len(part.text) <= 40 else f"{part.text[:40]}..."
        place = f"turn {part.turn + 1}: " if part.turn >= 0 else ""
        return f"{place}{json.dumps(shown, ensure_ascii=False)}"


def _written_forms(text: str) -> set[str]:
    """Return a text as it is, and as it stands within JSON."""
    return {text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]}


def says_nothing(turn: Mapping[str, Any]) -> bool:
    """Return True if a turn has neither content nor thoughts nor calls."""
    keys = ("content", "tool_calls", *REASONING)
    return not any(value.strip() if isinstance(value := turn.get(key), str) else value for key in keys)
