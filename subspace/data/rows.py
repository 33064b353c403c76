"""One row of a user's data, in the form that all files and shapes are brought to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """A row of a user's data.

    Attributes:
        where: its place, as ``rows.jsonl, line 3``.
        messages: each turn's whole dict as it was given (role, content, tool_calls, reasoning_content, ...), the
            system's first where the row has one, the history of an instruction as earlier turns. Empty for plain text.
        tools: the row's declarations of tools.
        instruction: ``instruction``, ``input`` and ``output`` of a row of that shape, for ``data.prompt``.
        text: plain text, all of which is trained.
        template_options: what the row says to the chat template, such as ``enable_thinking``.
    """

    where: str
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[Any, ...] = ()
    instruction: Mapping[str, str] | None = None
    text: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on.

    Attributes:
        where: its place, as ``rows.jsonl, line 3``.
        reason: why, in words that are the same for all rows of the kind: they are counted by it.
        detail: what it is in this row.
    """

    where: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f": {self.detail}" if self.detail else "")
