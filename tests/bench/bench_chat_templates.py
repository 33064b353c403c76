"""Count what chat templates write of conversations, as a row of people's own data is written.

    SUBSPACE_CHAT_TEMPLATES=FOLDER python -m tests.bench.bench_chat_templates

FOLDER holds the ``.jinja`` files of huggingface/trl (trl/chat_templates) and chujiezheng/chat_templates, each in a
folder of its repository's name for it. The tests' own templates are counted too.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from subspace.data.chat.encoding import RowEncoder
from subspace.data.rows import BadRow, Row
from tests.helpers.chat_templates import chat_tokenizer, templates

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look up a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Which one."}}},
    },
}
SYSTEM = {"role": "system", "content": "Be brief."}
TOLD = {"role": "tool", "tool_call_id": "call00001", "content": "sunny"}


def user(number: int) -> dict[str, Any]:
    return {"role": "user", "content": f"Question {number}?"}


def answer(number: int, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": f"Answer {number}.", **more}


def call() -> dict[str, Any]:
    function = {"name": "look_up", "arguments": {"city": "Paris"}}
    return {"role": "assistant", "tool_calls": [{"id": "call00001", "type": "function", "function": function}]}


CASES = {
    "question and answer": Row("", (user(1), answer(1))),
    "system prompt": Row("", (SYSTEM, user(1), answer(1))),
    "three turns": Row("", (user(1), answer(1), user(2), answer(2), user(3), answer(3))),
    "tools, a call and its answer": Row("", (user(1), call(), TOLD, answer(2)), (TOOL,)),
    "thoughts": Row("", (user(1), answer(1, reasoning_content="I think so."))),
    "thoughts in two turns": Row(
        "", (user(1), answer(1, reasoning_content="First."), user(2), answer(2, reasoning_content="Second."))
    ),
}


def main() -> None:
    """Print the table, and why rows are refused."""
    found: dict[str, Counter[str]] = {case: Counter() for case in CASES}
    reasons: Counter[str] = Counter()
    for template in templates().values():
        encoder = RowEncoder(chat_tokenizer(template), "", asked=False, date="2025-01-31")
        for case, row in CASES.items():
            encoder.told.clear()
            encoded = encoder.encode(row)
            if isinstance(encoded, BadRow):
                found[case]["refused"] += 1
                reasons[f"{case}: {encoded.reason}"] += 1
            else:
                told = any("thoughts" in kind for kind in encoder.told)
                found[case]["written, thoughts left out and told" if told else "written"] += 1
    columns = ("written", "written, thoughts left out and told", "refused")
    print(f"| {len(templates())} templates | {' | '.join(columns)} |\n| --- | ---: | ---: | ---: |")
    for case, counts in found.items():
        print(f"| {case} | {' | '.join(str(counts[column]) for column in columns)} |")
    for reason, count in reasons.most_common():
        print(f"{count:3} {reason}")


if __name__ == "__main__":
    main()
