"""From a row to token ids, with the spans that carry loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from subspace.common.foreign.templates import render
from subspace.common.hashing import hash_texts
from subspace.data import tokenization
from subspace.data.chat.control import ControlTokens, Span, SpeltControlToken
from subspace.data.chat.marking import all_texts
from subspace.data.chat.marks import Marks
from subspace.data.chat.spans import Answer, AnswerFinder, UnknownBounds
from subspace.data.chat.template import ChatTemplate
from subspace.data.chat.writing import Written, is_untrained, says_nothing, write
from subspace.data.rows import BadRow, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1  # of what is made of a row; rows of another version are encoded again


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of a row.

    Attributes:
        where: its place.
        ids: with the end token.
        answers: what is trained on: for each span the number of its turn, its first token, and the one behind it.
        key: equal for equal texts.
    """

    where: str
    ids: list[int]
    answers: list[tuple[int, int, int]]
    key: int


class RowEncoder:
    """Encoder of rows of people's own data.

    A conversation or an instruction is written by the tokenizer's chat template. An instruction is put into the prompt
    template where that was asked for or the tokenizer has none.

    Args:
        tokenizer: the model's.
        prompt: the prompt template's text.
        asked: whether the prompt template was asked for.
        date: what a chat template writes as today's.
        template: the text of a chat template to take in place of the tokenizer's.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, *, asked: bool, date: str, template: str | None = None
    ) -> None:
        self.tokenizer, self.prompt = tokenizer, prompt
        self.control = ControlTokens(tokenizer)
        has_template = template is not None or getattr(tokenizer, "chat_template", None)
        self.template = ChatTemplate(tokenizer, date, template) if has_template else None
        self.by_prompt = asked or self.template is None
        self.finder = AnswerFinder(self.template, self.control.pattern) if self.template else None
        self.told: dict[str, tuple[int, str]] = {}  # by kind, the number of rows and the first one's place
        self._bos = tokenization.bos_prefix(tokenizer)
        written = [f"date {date}"] if self.template and self.template.writes_date else []
        written += [f"template {template}"] if template is not None else []
        self.fingerprint = "\0".join([*written, f"prompt {prompt}" if self.by_prompt else ""])
        self._date = date if self.template and self.template.writes_date else ""

    def notices(self) -> Iterator[str]:
        """Yield what is to be told about the rows that were encoded: each kind with its number and the first row."""
        for kind, (count, first) in self.told.items():
            yield f"{count:,} rows: {kind} (the first: {first})"
        if self._date:
            yield f"the chat template writes the date: in all rows {self._date} (data.date)"

    def encode(self, row: Row) -> EncodedRow | BadRow:
        """Return the row's token ids, or why it cannot be trained on."""
        try:
            for text in all_texts([row.messages, row.tools, row.text, row.instruction]):
                text.encode()
        except UnicodeEncodeError:
            return BadRow(row.where, "half of a surrogate pair, which is no character")
        try:
            if row.text is not None:
                return self._text(row, row.text)
            if row.instruction is not None and self.by_prompt:
                return self._instruction(row, row.instruction)
            return self._conversation(row)
        except SpeltControlToken as error:
            return BadRow(
                row.where, "it spells a control token, which this tokenizer cannot write as letters", str(error)
            )

    def _text(self, row: Row, text: str) -> EncodedRow | BadRow:
        if not text.strip():
            return BadRow(row.where, "the text is empty")
        whole = (0, len(text))
        ids = [*self._bos, *self.control.encode(text, [whole], []).ids, self._end]
        self._tell_letters(row, [text], ids)
        # A row's first token has none before it to be predicted from.
        return EncodedRow(row.where, ids, [(0, max(len(self._bos), 1), len(ids))], hash_texts(text))

    def _instruction(self, row: Row, fields: Mapping[str, str]) -> EncodedRow | BadRow:
        answer = fields["output"]
        prompt = render(self.prompt, fields)
        if self.control.spelt(fields.values()) is None:
            ((ids, start),) = tokenization.encode_rows(self.tokenizer, [(prompt, answer)])
        else:
            users = self._users_of_prompt(fields, prompt)
            if users is None:
                return BadRow(row.where, "it spells a control token, and data.prompt changes the row's text")
            kept = prompt.rstrip()
            answered = (len(kept), len(prompt) + len(answer))
            users = [*users, (len(prompt), len(prompt) + len(answer))]
            encoded = self.control.encode(prompt + answer, users, [answered])
            ids, start = [*self._bos, *encoded.ids], len(self._bos) + encoded.spans[0][0]
        ids = [*ids, self._end]
        self._tell_letters(row, fields.values(), ids)
        return EncodedRow(row.where, ids, [(1, start, len(ids))], hash_texts(prompt, answer))

    def _users_of_prompt(self, fields: Mapping[str, str], prompt: str) -> list[Span] | None:
        """Return where the fields stand in a filled prompt template; None if it changes them."""
        marks = Marks([*fields.values(), self.prompt])
        marked = {name: marks.around(number, text) for number, (name, text) in enumerate(fields.items())}
        segments = marks.split(render(self.prompt, marked)) if marks.usable else None
        if segments is None or "".join(segment.text for segment in segments) != prompt:
            return None
        spans, at = [], 0
        for segment in segments:
            if segment.part is not None:
                spans.append((at, at + len(segment.text)))
            at += len(segment.text)
        return spans

    def _conversation(self, row: Row) -> EncodedRow | BadRow:
        if self.template is None or self.finder is None:
            return BadRow(
                row.where,
                "conversations need a chat template, and this model's tokenizer has none. Give rows with instruction "
                "and output, take the model's instruct version, or give a template: data.chat_template=FILE",
            )
        for number, turn in enumerate(row.messages, start=1):
            if turn.get("role") == "assistant" and not is_untrained(turn) and says_nothing(turn):
                return BadRow(row.where, "a turn of the assistant's says nothing", f"turn {number}")
        written = write(row, self.template)
        if isinstance(written, BadRow):
            return written
        if (spelt := self._spelt_elsewhere(written)) is not None:
            return BadRow(row.where, "it spells a control token where no text is expected", spelt)
        try:
            answers = self.finder.answers(written)
        except UnknownBounds as error:
            return BadRow(row.where, "it cannot be told where an answer begins or ends", f"{error}")
        return self._encode_written(row, written, [answer for answer in answers if written.trained[answer.turn]])

    def _encode_written(self, row: Row, written: Written, answers: list[Answer]) -> EncodedRow | BadRow:
        if not answers:
            return BadRow(row.where, "no turn of the assistant's is left to train on")
        text = written.text
        last_answers = row.messages[-1].get("role") == "assistant"
        if last_answers:
            text = text.rstrip()
        spans = [(answer.start, min(answer.end, len(text))) for answer in answers]
        encoded = self.control.encode(text, _users(written, len(text)), spans)
        ids, found = encoded.ids, encoded.spans
        if last_answers and ids[-1] not in self.control.ids:  # which most chat templates have written
            ids = [*ids, self._end]
            if answers[-1].turn == len(row.messages) - 1:
                found[-1] = (found[-1][0], len(ids))
        # A row's first token has none before it to be predicted from.
        trained = [(answer.turn, max(start, 1), end) for answer, (start, end) in zip(answers, found, strict=True)]
        if not all(start < end for _, start, end in trained):
            return BadRow(row.where, "an answer has no token of its own")
        for what in written.told:
            self._tell(f"the chat template leaves out or changes {what}", row.where)
        self._tell_letters(row, (part.lead + part.text + part.trail for part in written.parts), ids)
        return EncodedRow(row.where, ids, trained, hash_texts(text, repr(spans)))

    def _spelt_elsewhere(self, written: Written) -> str | None:
        """Return a control token that is spelt in a role, a key or the like: what templates compare or put together."""
        return self.control.spelt(
            text for text in all_texts([written.turns, written.tools]) if text not in written.marked.texts
        )

    def _tell(self, kind: str, where: str) -> None:
        count, first = self.told.get(kind, (0, where))
        self.told[kind] = count + 1, first

    def _tell_letters(self, row: Row, texts: Any, ids: list[int]) -> None:
        if self.control.spelt(texts) is not None:
            self._tell("control tokens that the row spells are encoded as letters", row.where)
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown != self._end and unknown in ids:
            self._tell(f"the tokenizer has no token for some of the letters ({self.tokenizer.unk_token})", row.where)

    @property
    def _end(self) -> int:
        return int(self.tokenizer.eos_token_id)


def _users(written: Written, length: int) -> list[Span]:
    """Return the spans of characters that are the row's, not the template's."""
    spans: list[Span] = []
    at = 0
    for number, segment in enumerate(written.segments):
        end = at + len(segment.text)
        if segment.part is not None:
            part, before = written.parts[segment.part], written.segments[number - 1].text if number else ""
            behind = written.segments[number + 1].text if number + 1 < len(written.segments) else ""
            start = at - len(part.lead) if part.lead and before.endswith(part.lead) else at
            stop = end + len(part.trail) if part.trail and behind.startswith(part.trail) else end
            spans.append((max(start, spans[-1][1] if spans else 0), min(stop, length)))
        at = end
    return [(start, end) for start, end in spans if start < end]
