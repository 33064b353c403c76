"""Which characters of a rendered conversation carry loss: what the model itself has to write of each answer.

An answer begins where the template's generation prompt ends, and its end includes the token that ends a turn. Where the
template marks its answers, by ``{% generation %}``, its marks are taken. Else both bounds are found by rendering the
conversation up to the answer, with and without it, and comparing what stands between the texts of the row: templates
write other generation prompts than once answered, leave out thoughts of earlier turns, and put the system prompt or the
tools into the last turn, so that the beginning of a conversation is mostly no beginning of the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from subspace.data.chat.marks import Segment
from subspace.data.chat.template import ChatTemplate
from subspace.data.chat.writing import ONCE, Written
from subspace.data.tokenization import common_prefix_length

Place = tuple[int, int]
"""A segment's number, and a character in it."""


@dataclass(frozen=True)
class Answer:
    """An answer's turn, and its first character and the one behind it."""

    turn: int
    start: int
    end: int


class UnknownBounds(Exception):
    """It is not known where an answer begins or ends; the argument says which."""


class AnswerFinder:
    """Finder of the answers in texts of one template. Rows that differ in the users' texts only are looked at once.

    Args:
        template: the tokenizer's.
        control: pattern of the tokenizer's control tokens.
    """

    def __init__(self, template: ChatTemplate, control: re.Pattern[str]) -> None:
        self.template, self.control = template, control
        self._known: dict[Any, list[tuple[int, Place, Place]]] = {}
        self._prompts: dict[Any, str] = {}

    def answers(self, written: Written) -> list[Answer]:
        """Return the answers in their order, also those that are not to be trained.

        Raises:
            UnknownBounds: one's beginning or end cannot be told.
        """
        if found := self._by_template(written):
            return found
        skeleton = (
            tuple(s.text if s.part is None else (written.parts[s.part].turn, s.part) for s in written.segments),
            tuple(turn.get("role") for turn in written.turns),
            repr(sorted(written.options.items())),
        )
        if skeleton not in self._known:
            self._known[skeleton] = self._by_comparison(written)
        begins = [0]
        for segment in written.segments:
            begins.append(begins[-1] + len(segment.text))
        return [
            Answer(turn, begins[first] + start, begins[last] + end)
            for turn, (first, start), (last, end) in self._known[skeleton]
        ]

    def _by_template(self, written: Written) -> list[Answer] | None:
        """Return the answers by the template's marks; None if it has none, or they do not fit the row's parts."""
        try:
            spans = self.template.generated(written.turns, written.tools, written.options)
        except Exception:  # a template may raise any exception
            return None
        if not spans:
            return None
        answers: list[Answer] = []
        at, inside = 0, [set[int]() for _ in spans]
        for segment in written.segments:
            if segment.part is not None:
                part = written.parts[segment.part]
                found = [i for i, (start, end) in enumerate(spans) if start <= at and at + len(segment.text) <= end]
                own = part.turn >= 0 and written.turns[part.turn].get("role") == "assistant"
                if bool(found) != own and (part.kind in ONCE or found):
                    return None
                for i in found:
                    inside[i].add(part.turn)
            at += len(segment.text)
        turn = next((min(turns) for turns in inside if turns), None)
        for (start, end), turns in zip(spans, inside, strict=True):
            turn = min(turns) if turns else turn
            if turn is None or len(turns) > 1:
                return None
            if start < end:
                answers.append(Answer(turn, start, end))
        return answers

    def _by_comparison(self, written: Written) -> list[tuple[int, Place, Place]]:
        answers = []
        for turn, (first, last) in sorted(_answered(written).items()):
            gap = written.segments[first - 1].text if first and written.segments[first - 1].part is None else ""
            start = self._start(written, turn, gap)
            if start is None:
                raise UnknownBounds(f"begins, turn {turn + 1}")
            begin = (first - 1, start) if gap else (first, 0)
            following = written.segments[last + 1] if last + 1 < len(written.segments) else Segment("")
            behind = following.text if following.part is None else ""
            is_last = turn == len(written.turns) - 1
            end = self._end(written, turn, behind, is_last=is_last)
            if end is None:
                raise UnknownBounds(f"ends, turn {turn + 1}")
            answers.append((turn, begin, (last + 1, end) if behind else (last, len(written.segments[last].text))))
        return answers

    # Beginnings.

    def _start(self, written: Written, turn: int, gap: str) -> int | None:
        """Return where an answer begins in the text between the turn before and its own texts."""
        prompt = self._generation_prompt(written)
        tail = self._tail(written, turn, prompt=True)
        if tail is None:  # the template refuses this beginning of the conversation: what is left is its usual prompt
            return _found_behind(prompt, gap, self.control)
        common = common_prefix_length([gap, tail])
        if common in (len(gap), len(tail)):
            return common
        # They differ in the midst: back to the last token or line that both have, within the generation prompt; or the
        # same words stand there between other white space.
        found = _found_behind(prompt.lstrip(), gap, self.control)
        opening = len(tail) - len(prompt) if prompt and tail.endswith(prompt) else len(tail)
        if common < opening:
            return found
        return max(_last_bound(gap, common, self.control), opening, found or 0)

    def _tail(self, written: Written, turns: int, *, prompt: bool) -> str | None:
        """Return what follows the row's texts where only its first turns are rendered; None if that is refused."""
        marked = written.marked
        try:
            text = self.template.render(marked.turns[:turns], marked.tools, written.options, prompt=prompt)
        except Exception:  # a template may raise any exception
            return None
        return written.marks.after(text)[1]

    def _generation_prompt(self, written: Written) -> str:
        """Return what the template writes to begin an answer to a question, beyond what ends the question."""
        key = (bool(written.tools), repr(sorted(written.options.items())))
        if key not in self._prompts:
            self._prompts[key] = ""
            question: Any = [{"role": "user", "content": "?"}]
            for content in ("?", [{"type": "text", "text": "?"}]):
                question[0]["content"] = content
                try:
                    plain, asked = (
                        self.template.render(question, written.tools, written.options, prompt=prompt)
                        for prompt in (False, True)
                    )
                except Exception:  # a template may raise any exception
                    continue
                if asked.startswith(plain):
                    self._prompts[key] = asked[len(plain) :]
                    break
        return self._prompts[key]

    # Ends.

    def _end(self, written: Written, turn: int, behind: str, *, is_last: bool) -> int | None:
        """Return where an answer ends in the text between its own texts and the next turn's."""
        if is_last:
            return self._closed(behind)
        prompt = self._generation_prompt(written)
        candidates = [self._behind_answer(written, turn, prompt=False)]
        asked = self._behind_answer(written, turn, prompt=True)
        if asked is not None and prompt and asked.endswith(prompt):
            candidates.append(asked.removesuffix(prompt))
        known = [tail for tail in candidates if tail is not None]
        if not known:
            found = self.control.match(behind.lstrip())
            return len(behind) - len(behind.lstrip()) + found.end() if found else 0
        # Where the template ends the last turn in another way, what both begin with is cut at a token.
        common = [(common_prefix_length([behind, tail]), len(tail)) for tail in known]
        best = max(length if length == whole else _last_bound(behind, length, self.control) for length, whole in common)
        return self._closed(behind[:best])

    def _behind_answer(self, written: Written, turn: int, *, prompt: bool) -> str | None:
        """Return what follows an answer that is the last turn; None if that is refused, or its texts are left out."""
        try:
            text = self.template.render(
                written.marked.turns[: turn + 1], written.marked.tools, written.options, prompt=prompt
            )
        except Exception:  # a template may raise any exception
            return None
        part, tail = written.marks.after(text)
        return tail if part is not None and written.parts[part].turn == turn else None

    def _closed(self, behind: str) -> int:
        """Return the end of the last control token of what closes a turn; without one, of what is no white space."""
        ends = [found.end() for found in self.control.finditer(behind)]
        return ends[-1] if ends else len(behind.rstrip())


def _answered(written: Written) -> dict[int, tuple[int, int]]:
    """Return the numbers of the first and the last segment of each answer; a name that stands elsewhere too once."""
    found: dict[int, tuple[int, int]] = {}
    seen: set[int] = set()
    for number, segment in enumerate(written.segments):
        if segment.part is None or segment.part in seen:
            continue
        seen.add(segment.part)
        part = written.parts[segment.part]
        if part.turn >= 0 and written.turns[part.turn].get("role") == "assistant":
            first, last = found.get(part.turn, (number, number))
            found[part.turn] = min(first, number), max(last, number)
    return found


def _bounds(text: str, control: re.Pattern[str]) -> list[int]:
    """Return the places behind control tokens and line breaks."""
    return [found.end() for found in control.finditer(text)] + [
        i + 1 for i, letter in enumerate(text) if letter == "\n"
    ]


def _last_bound(text: str, end: int, control: re.Pattern[str]) -> int:
    """Return the last place, up to ``end``, behind a control token or a line break; 0 if there is none."""
    return max((bound for bound in _bounds(text, control) if bound <= end), default=0)


def _found_behind(prompt: str, gap: str, control: re.Pattern[str]) -> int | None:
    """Return the end of the last occurrence of the prompt in the gap, or of a beginning of the prompt that is whole."""
    for end in sorted({len(prompt), *_bounds(prompt, control)}, reverse=True):
        if end and (at := gap.rfind(prompt[:end])) >= 0:
            return at + end
    return None
