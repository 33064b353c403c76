"""Training texts, pairs of prompt and answer, from a task's prepared items or from a user's own file.

A file is JSON (a list of objects), JSON lines, or Parquet. Its rows have ``instruction``, ``output`` and optionally
``input``; or ``messages``, a conversation that ends with the assistant's turn, which is rendered by the tokenizer's own
chat template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace.common.files import file_sha256
from subspace.data.prepare import task_checksum, task_items
from subspace.data.tasks import find_task, render
from subspace.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = (".json", ".jsonl", ".parquet")
Texts = list[tuple[str, str]]


@dataclass(frozen=True)
class TextRows:
    """Rows that are read on demand. ``fingerprint_inputs`` are all inputs that determine their texts."""

    name: str
    fingerprint_inputs: tuple[str, ...]
    read: Callable[[], Texts]
    chat: bool = False


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


def file_rows(path: Path, prompt: str, tokenizer: PreTrainedTokenizerBase) -> TextRows:
    """Return the rows of a user's file.

    Args:
        path: a file with one of the suffixes ``FILES``.
        prompt: the prompt template; not used for chats.
        tokenizer: the model's, for its chat template.

    Raises:
        UserError: the file is missing, empty or damaged. Other rows are checked when they are read.
    """
    if not path.is_file():
        beside = [file.name for file in path.parent.glob("*") if file.suffix in FILES] if path.parent.is_dir() else []
        hint = nearest(path.name, beside) if beside else f"Nothing with {', '.join(FILES)} lies there"
        raise UserError(f"the data file {path} is not there. {hint}")
    first = next(records(path), None)
    if first is None:
        raise UserError(f"{path} has no rows")
    chat = "messages" in first[1]

    def read() -> Texts:
        if chat:
            return [_chat_texts(record, where, tokenizer) for where, record in records(path)]
        return [_instruction_texts(record, where, prompt) for where, record in records(path)]

    return TextRows(path.name, (file_sha256(path), prompt), read, chat)


def _instruction_texts(record: Mapping[str, Any], where: str, prompt: str) -> tuple[str, str]:
    fields = {name: _text(record, name, where) for name in ("instruction", "output")}
    fields["input"] = _text(record, "input", where) if record.get("input") else ""
    for name in ("instruction", "output"):
        if not fields[name].strip():
            raise UserError(f"{where}: '{name}' is empty")
    return render(prompt, fields), fields["output"]


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    if name not in record:
        has = ", ".join(record) or "nothing"
        raise UserError(
            f"{where}: no '{name}'. A row has instruction, output and maybe input, or messages; this has {has}"
        )
    if not isinstance(record[name], str):
        raise UserError(f"{where}: '{name}' is {type(record[name]).__name__}, not text")
    return str(record[name])


def _chat_texts(record: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    messages = _messages(record, where)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where}: 'messages' need a chat template, and this model's tokenizer has none. "
            "Give rows with instruction and output, or take the model's instruct version"
        )
    try:
        prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
        conversation = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template may raise any exception
        raise UserError(f"{where}: the tokenizer's chat template refuses the conversation: {error}") from None
    if not conversation.startswith(prompt):
        raise UserError(
            f"{where}: the tokenizer's chat template writes this conversation differently once it is answered"
        )
    return prompt, conversation[len(prompt) :].rstrip()


def _messages(record: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' should be a list of turns, each with role and content")
    turns = []
    for number, turn in enumerate(messages, start=1):
        if not isinstance(turn, dict):
            raise UserError(f"{where}: turn {number} should have role and content")
        turns.append({name: _text(turn, name, f"{where}, turn {number}") for name in ("role", "content")})
    if turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        raise UserError(f"{where}: the last turn is trained on, so it must be the assistant's and say something")
    return turns


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location of each record, such as ``rows.jsonl, line 3``, and the record.

    Raises:
        UserError: the suffix is unknown, or the file is damaged.
    """
    read = {".json": _json, ".jsonl": _json_lines, ".parquet": _parquet}.get(path.suffix)
    if read is None:
        raise UserError(f"{path} is not a data file of a known kind: {', '.join(FILES)}")
    for where, record in read(path):
        if not isinstance(record, dict):
            raise UserError(f"{path}, {where}: a row should be an object, not {type(record).__name__}")
        yield f"{path}, {where}", record


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start}") from None
    except json.JSONDecodeError as error:
        lines = ". One object a line is called .jsonl" if error.msg == "Extra data" else ""
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}, column {error.colno}{lines}") from None
    if not isinstance(content, list):
        raise UserError(f"{path} should be a list of rows, not {type(content).__name__}")
    yield from ((f"row {number}", record) for number, record in enumerate(content, start=1))


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}, line {number}: not UTF-8: byte {error.start}") from None
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: not JSON: {error.msg}, column {error.colno}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not Parquet, or cut: {' '.join(str(error).split())[:120]}") from None
