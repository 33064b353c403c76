"""From a record to a row: usual shapes are recognised by their keys, and no key is passed over without being counted.

What a key says is used; or the row is refused by the key's name, where it says what is not supported and would change
what is learnt; or it is counted, and told once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from subspace.data.rows import BadRow, Row
from subspace.data.sources.turns import KNOWN_KEYS, MEDIA, Bad, from_json, read_history, read_tools, read_turns
from subspace.errors import UserError, nearest

CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "question", "query")
ANSWERS = ("output", "completion", "answer", "response")
PAIRS = (*zip(QUESTIONS, ANSWERS, strict=True), *((q, a) for q in QUESTIONS for a in ANSWERS), ("input", "output"))
INPUTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
COLUMNS = (
    *(*CONVERSATIONS, *QUESTIONS, *ANSWERS, *INPUTS, *SYSTEMS),
    *("history", "tools", "functions", "text", "chat_template_kwargs"),
)
"""Keys that rows are recognised by, to which ``data.columns`` may map those of a file."""

WEIGHTS = ("weight", "weights", "sample_weight", "loss_weight")
REFUSED = {
    **dict.fromkeys(
        ("chosen", "rejected", "rejected_response", "rejected_responses", "rejected_messages", "rejected_output"),
        "pairs of a better and a worse answer are for training by preferences",
    ),
    **dict.fromkeys(("preferred_output", "non_preferred_output"), "this is for training by preferences"),
    **dict.fromkeys((*MEDIA, "objects"), "only text is trained on"),
    **dict.fromkeys(("input_ids", "token_ids"), "rows are read as text, not as tokens"),
    "completions": "several answers, judged one by one, are for training a reward",
    "documents": "documents beside the conversation are not given to the chat template",
}


@dataclass
class Seen:
    """Counts of a source: its ``rows``, their ``shapes``, and the ``unused`` keys with the rows that have them.

    ``keys`` are all that occur.
    """

    rows: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    keys: set[str] = field(default_factory=set)

    def notices(self, name: str) -> Iterator[str]:
        """Yield a sentence about keys that are not used, if there are any."""
        if self.unused:
            counts = ", ".join(f"{key} ({count:,})" for key, count in self.unused.most_common())
            yield f"{name}: of {self.rows:,} rows these keys are not used: {counts}"


def check_columns(columns: Mapping[str, str | None]) -> None:
    """Raise UserError if ``data.columns`` maps to a name that no row is recognised by."""
    for ours, theirs in columns.items():
        if ours not in COLUMNS and theirs is not None:
            raise UserError(
                f"data.columns says {ours}: {theirs}, and rows have no '{ours}' here. {nearest(ours, COLUMNS)}. The "
                "file's own name comes second"
            )


def read_row(where: str, record: Mapping[str, Any], columns: Mapping[str, str | None], seen: Seen) -> Row | BadRow:
    """Return the row that a record holds, and count its keys.

    Args:
        where: its place.
        record: its keys and values.
        columns: for names of ``COLUMNS`` the file's own; None for a key of the file that is left out.
        seen: counts, to which this row is added.
    """
    seen.rows += 1
    seen.keys.update(record)
    fields = {key: value for key, value in _mapped(record, columns).items() if not _is_absent(value)}
    try:
        _check_letters(record)
        _refuse(fields)
        shape, row, used = _read(where, fields)
    except Bad as bad:
        return BadRow(where, *bad.args)
    seen.shapes[shape] += 1
    seen.unused.update(key for key in fields.keys() - used if fields[key] not in ("", [], {}))
    seen.unused.update({f"{key} of turns" for turn in row.messages for key in turn.keys() - KNOWN_KEYS})
    return row


def _mapped(record: Mapping[str, Any], columns: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the record under the names of this project; a key of such a name that another is mapped to is dropped."""
    if not columns:
        return dict(record)
    taken = {*columns.values(), *columns}
    kept = {key: value for key, value in record.items() if key not in taken}
    return kept | {ours: record[theirs] for ours, theirs in columns.items() if theirs is not None and theirs in record}


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)  # tables write NaN for a missing text


def _check_letters(value: Any) -> None:
    """Raise Bad if a text somewhere holds half of a pair of surrogates, which no tokenizer takes."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Bad("half of a surrogate pair, which is no character", ascii(value[error.start])) from None
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _check_letters(key)
            _check_letters(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_letters(inner)


def _refuse(fields: Mapping[str, Any]) -> None:
    """Raise Bad if a key says what is not supported and would change what is learnt."""
    for key, reason in REFUSED.items():
        if fields.get(key):
            raise Bad(f"'{key}' is not supported: {reason}. data.columns={{{key}: null}} leaves the key out")
    for key in WEIGHTS:
        if _number(fields.get(key)) not in (None, 1.0):
            raise Bad(f"'{key}' is not supported: all rows weigh the same", str(fields[key]))
    for key in ("kto_tag", "label"):
        if str(fields.get(key)).casefold() == "false":
            raise Bad(f"'{key}' is false: the answer is an example of what not to say, which is not supported")


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _read(where: str, fields: Mapping[str, Any]) -> tuple[str, Row, set[str]]:
    """Return the name of a row's shape, the row, and the keys that are used."""
    if name := next((key for key in CONVERSATIONS if fields.get(key)), None):
        return _conversation(where, name, fields)
    if isinstance(fields.get("prompt"), list) or isinstance(fields.get("completion"), list):
        return _prompt_and_completion(where, fields)
    if pair := next((pair for pair in PAIRS if set(pair) <= fields.keys()), None):
        return _instruction(where, *pair, fields)
    if "text" in fields:
        text = _text(fields, "text")
        if not text.strip():
            raise Bad("'text' is empty")
        return "text", Row(where, text=text), {"text"}
    raise _no_shape(fields)


def _no_shape(fields: Mapping[str, Any]) -> Bad:
    has = ", ".join(map(str, fields)) or "nothing"
    if name := next((key for key in CONVERSATIONS if key in fields), None):
        return Bad(f"'{name}' should be a list of turns, each with role and content", "empty")
    if question := next((key for key in QUESTIONS if key in fields), None):
        answer = dict(zip(QUESTIONS, ANSWERS, strict=True))[question]
        return Bad(f"no '{answer}'", f"this row has {has}")
    known = "instruction and output, prompt and completion, question and answer, messages, conversations, or text"
    return Bad("no keys that rows are recognised by", f"it has {has}; rows have {known}, or data.columns maps others")


def _conversation(where: str, name: str, fields: Mapping[str, Any]) -> tuple[str, Row, set[str]]:
    turns, used = read_turns(name, fields[name]), {name}
    row = _whole(where, turns, fields, used)
    return "conversation", row, used


def _prompt_and_completion(where: str, fields: Mapping[str, Any]) -> tuple[str, Row, set[str]]:
    """Return a row of which both parts are turns, or one is a text."""
    turns: list[dict[str, Any]] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if key not in fields:
            raise Bad(f"no '{key}'", f"this row has {', '.join(fields)}")
        value = fields[key]
        turns += [{"role": role, "content": value}] if isinstance(value, str) else read_turns(key, value)
        if key == "prompt":
            turns = [_context(turn) for turn in turns]
    used = {"prompt", "completion"}
    return "prompt and completion", _whole(where, turns, fields, used), used


def _context(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn of a prompt, which carries no loss."""
    return {**turn, "weight": 0} if turn["role"] == "assistant" else turn


def _instruction(where: str, question: str, answer: str, fields: Mapping[str, Any]) -> tuple[str, Row, set[str]]:
    used = {question, answer}
    asked, said, more = _text(fields, question), _text(fields, answer), ""
    for key in INPUTS:
        if key in fields and key != question:
            more = _text(fields, key)
            used.add(key)
            break
    if not said.strip():
        raise Bad(f"'{answer}' is empty")
    if not asked.strip():
        if not more.strip():
            raise Bad(f"'{question}' is empty")
        asked, more = more, ""
    turns = [
        {"role": "user", "content": f"{asked}\n\n{more}" if more.strip() else asked},
        {"role": "assistant", "content": said},
    ]
    if fields.get("history"):
        turns = read_history(fields["history"]) + turns
        used.add("history")
    row = _whole(where, turns, fields, used)
    # A prompt template has no place for more: with a system prompt, say, the row is a conversation.
    alone = len(row.messages) == 2 and not row.tools
    texts = {"instruction": asked, "input": more, "output": said} if alone else None
    return "instruction", Row(where, row.messages, row.tools, texts, None, row.template_options), used


def _whole(where: str, turns: list[dict[str, Any]], fields: Mapping[str, Any], used: set[str]) -> Row:
    """Return a row of these turns, with the system prompt, the tools and the options that stand beside them."""
    for key in SYSTEMS:
        if isinstance(fields.get(key), str) and not fields[key].strip():
            used.add(key)
        elif key in fields:
            system = _text(fields, key)
            used.add(key)
            if turns[0]["role"] != "system":
                turns = [{"role": "system", "content": system}, *turns]
            elif turns[0].get("content") != system:
                raise Bad(f"'{key}' stands beside a conversation with a system prompt of its own")
    tools: tuple[Any, ...] = ()
    if fields.get("tools"):
        tools = read_tools(fields["tools"])
        used.add("tools")
    elif fields.get("functions"):
        tools = read_tools(fields["functions"])
        used.add("functions")
    options = fields.get("chat_template_kwargs") or {}
    options = from_json("chat_template_kwargs", options) if isinstance(options, str) else options
    if not isinstance(options, Mapping):
        raise Bad("'chat_template_kwargs' should be a mapping", f"not {type(options).__name__}")
    used.add("chat_template_kwargs")
    if not any(_says(turn) for turn in turns):
        raise Bad("no turn of the assistant's says anything, and those are trained on")
    return Row(where, tuple(turns), tools, None, None, options)


def _says(turn: Mapping[str, Any]) -> bool:
    if turn["role"] != "assistant" or turn.get("weight") == 0:
        return False
    keys = ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")
    return any(value.strip() if isinstance(value := turn.get(key), str) else value for key in keys)


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields[key]
    if not isinstance(value, str):
        raise Bad(f"'{key}' is {type(value).__name__}, not text")
    return value
