"""Prompts of the protocols: in a template of ``data/prompts.yaml``, or as a user's turn in the chat template.

A model answers best in the form that it was trained with. Either kind encodes a prompt exactly as training does: a run
on tasks' rows sees their instruction in ``data.prompt``, one on conversations sees it as a user's turn, and its own
answer as the assistant's, with control tokens that only the template can write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from subspace.common.foreign.templates import render
from subspace.data.chat.control import ControlTokens, SpeltControlToken
from subspace.data.chat.template import ChatTemplate
from subspace.data.config import DataConfig
from subspace.data.tasks import prompt_template
from subspace.data.tokenization import encode_prompt, encode_rows
from subspace.errors import UserError
from subspace.evaluation.results import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# With private characters, which no template looks for.
_QUESTION, _ANSWER = "\ue000a question\ue001", "\ue000an answer\ue001"
_FORMS: tuple[Callable[[str], Any], ...] = (str, lambda text: [{"type": "text", "text": text}])


class Prompts(Protocol):
    """Interface of a way to ask.

    Attributes:
        template: its text, for the fingerprint.
        fingerprint_fields: what else scores depend on.
    """

    template: str
    fingerprint_fields: dict[str, str]

    def text(self, instruction: str) -> str:
        """Return the whole text that a model reads before it answers."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a result of ``text``."""

    def encode_rows(self, rows: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
        """Return the ids of (result of ``text``, answer), and how many of them are the prompt's."""


def open_prompts(tokenizer: PreTrainedTokenizerBase, prompt_name: str, *, chat: bool, writes: bool) -> Prompts:
    """Return the prompts of a template of ``data/prompts.yaml``, or of the tokenizer's chat template."""
    return ChatPrompts(tokenizer, writes=writes) if chat else TemplatePrompts(tokenizer, prompt_template(prompt_name))


class TemplatePrompts:
    """Prompts in a template of ``data/prompts.yaml``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.fingerprint_fields: dict[str, str] = {}

    def text(self, instruction: str) -> str:
        """Return the instruction in the template."""
        return render(self.template, {"instruction": instruction, "input": ""})

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt: exactly those that precede the answer in training."""
        return encode_prompt(self.tokenizer, text)

    def encode_rows(self, rows: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
        """Return the ids of prompts with answers, as they are trained."""
        return encode_rows(self.tokenizer, rows)


class ChatPrompts:
    """Prompts as a user's turn in the chat template of a tokenizer, up to where the assistant's answer begins.

    Some templates write more before an answer than they ask with, such as an empty block of thoughts. A model that
    ``writes`` begins with that itself; choices are scored behind it.

    Raises:
        UserError: the tokenizer has no chat template, or one that does not write a turn as it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, writes: bool) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "evaluate.chat_template=true was asked for, but the model's tokenizer has no chat template. Score a "
                "run that was trained with data.chat_template=FILE, take the instruct version, or leave it out"
            )
        self._chat = ChatTemplate(tokenizer, DataConfig.date)
        self.template = self._chat.source(tools=False)
        self.control = ControlTokens(tokenizer)
        self.fingerprint_fields = {"chat template": digest(self.template)}
        problem = ""
        for form in _FORMS:  # some templates want a turn's text as a list of parts
            self._form = form
            try:
                asked, (answered, found, _) = (
                    self._render(_QUESTION),
                    self._render(_QUESTION, _ANSWER).partition(_ANSWER),
                )
            except UserError as error:
                problem = problem or str(error)
                continue
            self.before, _, self._asked = asked.partition(_QUESTION)
            if found and asked.count(_QUESTION) == 1 and answered.startswith(f"{self.before}{_QUESTION}"):
                break
        else:
            raise UserError(problem or "the tokenizer's chat template does not write a user's turn once, as it is")
        own = writes and answered.startswith(asked)
        self.after = self._asked if own else answered.removeprefix(f"{self.before}{_QUESTION}")

    def _render(self, question: str, answer: str | None = None) -> str:
        turns = [{"role": "user", "content": self._form(question)}]
        turns += [{"role": "assistant", "content": self._form(answer)}] if answer is not None else []
        try:
            return self._chat.render(turns, [], {}, prompt=answer is None)
        except Exception as error:  # a template may raise any exception
            raise UserError(f"the tokenizer's chat template does not write {question[:60]!r}: {error}") from None

    def text(self, instruction: str) -> str:
        """Return what the template writes of the instruction, and before an answer to it."""
        written = self._render(instruction)
        turn = written.removeprefix(self.before).removesuffix(self._asked)
        if written != f"{self.before}{turn}{self._asked}" or turn.split() != instruction.split():
            raise UserError(f"the tokenizer's chat template changes what is asked: {instruction[:60]!r}")
        return f"{self.before}{turn}{self.after}"

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt; control tokens that the instruction spells are letters."""
        return self._encode(text.rstrip(" "), [self._turn(text)], [])[0]  # a space belongs to the answer's first token

    def encode_rows(self, rows: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
        """Return the ids of prompts with answers."""
        encoded = []
        for text, answer in rows:
            span = (len(text), len(text) + len(answer))
            ids, spans = self._encode(text + answer, [self._turn(text), span], [span])
            encoded.append((ids, spans[0][0] if answer else len(ids)))
        return encoded

    def _turn(self, text: str) -> tuple[int, int]:
        return len(self.before), len(text) - len(self.after)

    def _encode(
        self, text: str, users: Sequence[tuple[int, int]], marked: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            return self.control.encode(text, users, marked)
        except SpeltControlToken as error:
            raise UserError(
                f"an item spells the control token {error}, which this tokenizer cannot write as letters. "
                "Score it without evaluate.chat_template"
            ) from None
