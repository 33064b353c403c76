"""A tokenizer's chat template: what it writes for a conversation, with the date of the run."""

from __future__ import annotations

import ast
import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace.common.foreign.limits import MOST_MEMORY, limited
from subspace.common.foreign.text import read_text
from subspace.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Sequence[Mapping[str, Any]]

_DATE = re.compile(r"""strftime_now\s*\(\s*('[^']*'|"[^"]*")\s*\)""")
_LITERAL = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\"""")
_GENERATION = re.compile(r"\{%-?\+?\s*generation\s*-?%\}")

#: Bytes of a chat template; the longest of published models have some twenty thousand.
MOST_TEMPLATE_BYTES = 1 << 20

_NO_TOOL: dict[str, Any] = {"type": "function", "function": {}}

RESERVED = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors"),
    *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
"""Names that a row's own options to the template may not have."""


def read_template(file: str | None) -> str | None:
    """Return the text of the chat template that ``data.chat_template`` names; None for the tokenizer's."""
    if file is None:
        return None
    try:
        return read_text(Path(file).expanduser(), most=MOST_TEMPLATE_BYTES)
    except UserError as error:
        raise UserError(f"data.chat_template is '{file}', a Jinja file: {error}") from None


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: with a chat template, if there is no other one.
        date: what the template writes as today's, as ``2025-01-31``.
        template: the text of another one, which is taken in place of the tokenizer's.

    Raises:
        UserError: the template writes the time in a way that cannot be fixed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str, template: str | None = None) -> None:
        self.tokenizer, self._date, self._other = tokenizer, datetime.date.fromisoformat(date), template
        self.writes_date = False
        self._sources = {tools: self._dated(tools=tools) for tools in (False, True)}

    def source(self, *, tools: bool) -> str:
        """Return the template's text, with the run's date; a tokenizer may have another one for rows with tools."""
        return self._sources[tools]

    def _dated(self, *, tools: bool) -> str:
        source = self._other or str(self.tokenizer.get_chat_template(None, [_NO_TOOL] if tools else None))
        fixed = _DATE.sub(lambda call: repr(self._date.strftime(ast.literal_eval(call.group(1)))), source)
        if re.search(r"strftime_now\s*\(", fixed):
            raise UserError(
                "the chat template of the model's tokenizer writes the time, in a form that is not known beforehand, "
                "so that no run could be repeated. Take that out of its chat_template"
            )
        self.writes_date |= fixed != source
        return fixed

    def render(self, turns: Turns, tools: Sequence[Any], options: Mapping[str, Any], *, prompt: bool = False) -> str:
        """Return what the template writes; with ``prompt``, the beginning of an answer too. May raise anything.

        A UserError is one that no other conversation would avoid: the template took too long.
        """
        with limited("the chat template, on one conversation,", memory=MOST_MEMORY):
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(turn) for turn in turns],
                    tools=list(tools) or None,
                    chat_template=self.source(tools=bool(tools)),
                    add_generation_prompt=prompt,
                    tokenize=False,
                    **options,
                )
            )

    def generated(self, turns: Turns, tools: Sequence[Any], options: Mapping[str, Any]) -> list[tuple[int, int]] | None:
        """Return where in ``render``'s text the template's own marks ``{% generation %}`` are; None if it has none."""
        source = self.source(tools=bool(tools))
        if not _GENERATION.search(source):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[[{key: value for key, value in turn.items() if value is not None} for turn in turns]],
            tools=list(tools) or None,
            chat_template=source,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **options},
        )
        texts, spans = rendered
        known = texts[0] == self.render(turns, tools, options)
        return [(int(start), int(end)) for start, end in spans[0]] if known else None

    def literals(self, *, tools: bool) -> list[str]:
        """Return the texts that the template may look for in a turn: its literals with more than letters in them."""
        found = set()
        for literal in _LITERAL.findall(self.source(tools=tools)):
            try:
                text = ast.literal_eval(literal)
            except (SyntaxError, ValueError):
                continue
            if len(text) > 2 and not text.isspace() and not text.isalnum():
                found.add(text)
        return sorted(found, key=len, reverse=True)
