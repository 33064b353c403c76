"""Files of one's own, given with nothing but the model: all that they say is trained on, by defaults."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from subspace.config import read_config
from subspace.data.collate import IGNORE_INDEX, collate
from subspace.data.config import DataConfig
from subspace.data.dataset import open_data
from subspace.errors import UserError
from subspace.resolve import resolve_run
from subspace.resumption import open_run_data
from subspace.run import train_run
from tests.helpers.chat_templates import chat_tokenizer, templates
from tests.helpers.tiny_models import save, tiny_llama

ROWS = 200
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look up a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def instruction(number: int) -> dict[str, Any]:
    more = {"input": f"It is case {number}."} if number % 2 else {}
    return {"instruction": f"Say {number}.", **more, "output": f"Said {number}, with <|im_end|> spelt."}


def conversation(number: int) -> dict[str, Any]:
    call = {"name": "look_up", "arguments": json.dumps({"city": f"City {number}"})}
    return {
        "messages": [
            {"role": "system", "content": f"You are guide {number}."},
            {"role": "user", "content": f"Where is {number}?"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": call}]},
            {"role": "tool", "tool_call_id": "c1", "content": f"At {number}."},
            {"role": "assistant", "content": f"It is at {number}."},
            {"role": "user", "content": f"Sure, {number}?"},
            {"role": "assistant", "content": f"Sure, {number}."},
            {"role": "user", "content": f"Bye, {number}."},
            {"role": "assistant", "content": f"Bye {number}."},
        ],
        "tools": [TOOL],
    }


def said_by_instruction(number: int) -> list[str]:
    return [f"Said {number}, with <|im_end|> spelt.<|im_end|>"]


def said_by_conversation(number: int) -> list[str]:
    call = f'<tool_call>\n{{"name": "look_up", "arguments": {{"city": "City {number}"}}}}\n</tool_call><|im_end|>'
    said = (f"It is at {number}.", f"Sure, {number}.")
    return [call, *(f"{text}<|im_end|>" for text in said), f"<think>\n\n</think>\n\nBye {number}.<|im_end|>"]


def asked_by_instruction(number: int) -> list[str]:
    return [f"Say {number}." + (f"\n\nIt is case {number}." if number % 2 else "")]


def asked_by_conversation(number: int) -> list[str]:
    return [f"You are guide {number}.", f"Where is {number}?", f"At {number}.", f"Sure, {number}?", f"Bye, {number}."]


def labelled(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    pieces = groupby(labels, lambda label: label != IGNORE_INDEX)
    return [str(tokenizer.decode(list(piece))) for has_loss, piece in pieces if has_loss]


@pytest.mark.parametrize(
    ("make", "said", "asked", "template"),
    [
        (instruction, said_by_instruction, asked_by_instruction, "chatml"),
        (conversation, said_by_conversation, asked_by_conversation, "qwen3"),
    ],
    ids=["instructions", "conversations"],
)
def test_200_rows_are_trained_on_all_that_they_say(
    make: Any, said: Any, asked: Any, template: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = chat_tokenizer(templates()[template])
    save(tiny_llama(vocab_size=len(tokenizer)), tokenizer, tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(make(number)) + "\n" for number in range(ROWS)))
    (tmp_path / "run.yaml").write_text(
        f"name: mine\nruns: {tmp_path / 'runs'}\nmodel: {{path: {tmp_path / 'model'}}}\ndata: {{mixture: {rows}}}\n"
    )
    config = read_config(tmp_path / "run.yaml", [])

    data, _ = open_run_data(resolve_run(config, 1, torch.device("cpu")))
    assert not data.report["cut"] + data.report["dropped"]
    rows_of = [part[i] for part in (data.train, data.validation) for i in range(len(part))]
    assert len(rows_of) == ROWS
    answers: Counter[str] = Counter()
    for row in rows_of:
        tensors = collate([row], data.pad_id, data.loss_on)
        answers.update(labelled(row.input_ids, tensors["labels"][0].tolist(), tokenizer))
    assert answers == Counter(text for number in range(ROWS) for text in said(number))
    texts = [str(tokenizer.decode(row.input_ids)) for row in rows_of]
    for number in range(ROWS):
        (text,) = (text for text in texts if asked(number)[0] in text)
        assert all(text.count(part) == 1 for part in asked(number))
    with caplog.at_level(logging.INFO, logger="subspace"):
        folder = train_run(replace(config, train=replace(config.train, steps=2)))
    assert (folder / "adapter").is_dir()
    shown = [text for text in caplog.messages if text.startswith("one of the rows")]
    assert len(shown) == 1
    assert "\u27e6" in shown[0]


def test_another_chat_template_than_the_tokenizers_writes_what_it_leaves_out(tmp_path: Path) -> None:
    """The tokenizer's template writes no calls of tools; a file's does, and the cache keeps the two apart."""
    turns = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns}) + "\n")
    plain = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = chat_tokenizer(plain)
    with pytest.raises(UserError, match="leaves out the call of a tool.*data.chat_template=FILE"):
        open_data(DataConfig(mixture=str(rows), validation=0), tokenizer)
    calling = tmp_path / "calling.jinja"
    calling.write_text(templates()["qwen3"])
    data = open_data(DataConfig(mixture=str(rows), validation=0, chat_template=str(calling)), tokenizer)
    row = data.train[0]
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}' in tokenizer.decode(row.input_ids)
    with pytest.raises(UserError, match="data.chat_template is .*none.jinja', a Jinja file: .*No such file"):
        open_data(DataConfig(mixture=str(rows), validation=0, chat_template="none.jinja"), tokenizer)
