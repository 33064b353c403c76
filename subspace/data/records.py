"""Training texts, pairs of prompt and answer, from a task's prepared items or from rows of a user's own.

A user's instruction is put into the prompt template; a conversation, which ends with the assistant's turn, is rendered
by the tokenizer's own chat template.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from subspace.data.prepare import task_checksum, task_items
from subspace.data.rows import BadRow, Row
from subspace.data.sources.bad_rows import BadRows
from subspace.data.sources.find import Source
from subspace.data.sources.shapes import Seen
from subspace.data.tasks import find_task, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Texts = list[tuple[str, str]]


@dataclass(frozen=True)
class TextRows:
    """Rows that are read on demand. ``fingerprint_inputs`` are all inputs that determine their texts.

    Reading fills ``told`` with notices to the user, for the cache to keep.
    """

    name: str
    fingerprint_inputs: tuple[str, ...]
    read: Callable[[], Texts]
    chat: bool = False
    told: list[str] = field(default_factory=list)


def task_rows(name: str, split: str, prompt: str) -> TextRows | None:
    """Return a task's rows, or None if its source does not have the split. ``prompt`` is a template."""
    checksum, declared = task_checksum(name, split), find_task(name)
    if checksum is None:
        return None

    def read() -> Texts:
        return [
            (render(prompt, {"instruction": declared.instruction(item), "input": ""}), declared.output(item))
            for item in task_items(name, split).to_list()
        ]

    texts = (declared.instruction_template, declared.answer_template, declared.output_template)
    return TextRows(f"{name}/{split}", (checksum, prompt, *texts), read)


def source_rows(source: Source, prompt: str, tokenizer: PreTrainedTokenizerBase, bad_rows: str) -> TextRows:
    """Return the rows of a user's own data.

    Args:
        source: where they come from.
        prompt: the prompt template; not used for chats.
        tokenizer: the model's, for its chat template.
        bad_rows: ``data.bad_rows``: whether rows that cannot be trained on are refused or left out.

    Raises:
        UserError: there are no rows. Others are checked when they are read.
    """
    first = next((row for row in source.rows() if isinstance(row, Row)), None)
    chat = first is not None and first.instruction is None
    told: list[str] = []

    def read() -> Texts:
        seen, bad, texts = Seen(), BadRows(), []
        for row in source.rows(seen):
            text = row if isinstance(row, BadRow) else _texts(row, prompt, tokenizer, chat=chat)
            if isinstance(text, BadRow):
                bad.add(text)
            else:
                texts.append(text)
        told[:] = [*source.notices, *bad.settle(source.name, seen.rows, bad_rows), *seen.notices(source.name)]
        return texts

    return TextRows(source.short_name, (*source.fingerprint, prompt, bad_rows), read, chat, told)


def _texts(row: Row, prompt: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> tuple[str, str] | BadRow:
    """Return the prompt and the answer of a row, or why it cannot be trained on."""
    if row.text is not None:
        return BadRow(row.where, "plain text is not trained on yet")
    if not chat:
        if row.instruction is None:
            return BadRow(row.where, "a conversation among instructions")
        return render(prompt, row.instruction), row.instruction["output"]
    if not getattr(tokenizer, "chat_template", None):
        return BadRow(
            row.where,
            "a conversation needs a chat template, and this model's tokenizer has none. Give rows with instruction and "
            "output, or take the model's instruct version",
        )
    messages = [{"role": turn["role"], "content": turn.get("content")} for turn in row.messages]
    if row.tools or any(turn.keys() - {"role", "content"} for turn in row.messages):
        return BadRow(row.where, "tools and more than role and content in a turn are not trained on yet")
    if messages[-1]["role"] != "assistant" or not str(messages[-1]["content"]).strip():
        return BadRow(row.where, "the last turn is trained on, so it must be the assistant's and say something")
    try:
        before = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
        conversation = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template may raise any exception
        return BadRow(row.where, "the tokenizer's chat template refuses the conversation", str(error))
    if not conversation.startswith(before):
        return BadRow(
            row.where, "the tokenizer's chat template writes this conversation differently once it is answered"
        )
    return before, conversation[len(before) :].rstrip()
