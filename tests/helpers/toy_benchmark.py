"""A toy benchmark with its declarations, and the wheel that carries it: what ``prepare`` needs, without a network."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml

TRAIN, EXTRA, TEST = 40, 10, 6

TASK: dict[str, Any] = {
    "title": "Toy",
    "position": 1,
    "aliases": ["toy-task"],
    "license": "CC0",
    "license_source": "here",
    "item": {
        "id": "'toy-%s-%d'|format(official, number)",
        "question": "ask",
        "choices": "[a, b]",
        "label": "right|int - 1",
    },
    "splits": {
        "train": {
            "official": "train",
            "rows": TRAIN,
            "hub": {"repo": "toys/toy", "split": "train"},
            "pypi": {
                "wheel": "toy-wheel",
                "file": "toy/train/requests.jsonl.gz",
                "item": {"question": "query|regex_group('Q: (.*)', 1)"},
            },
        },
        "extra": {"official": "extra", "rows": EXTRA, "hub": {"repo": "toys/toy", "config": "extra", "split": "train"}},
        "test": {
            "official": "validation",
            "rows": TEST,
            "labels": [3, 3],
            "hub": {"repo": "toys/toy", "split": "validation"},
            "pypi": {"wheel": "toy-wheel", "file": "toy/test.arrow"},
        },
    },
    "published": {},
    "instruction": "Which? {{ question }}\n\nAnswer1: {{ choices[0] }} Answer2: {{ choices[1] }}",
    "answer": "answer{{ label + 1 }}",
    "output": "the correct answer is {{ answer }}",
    "answer_words": ["answer1", "answer2"],
    "likelihood": {
        "task": "toy",
        "version": "1.0",
        "metrics": ["acc"],
        "context": "Q: {{ question }}\nA:",
        "choice": "{{ choice }}",
    },
}


def record(number: int, start: str = "how many are") -> dict[str, str]:
    """Return a row as the original data set has it: the longer, the higher its number."""
    return {"ask": f"{start} {'very ' * number}{number}?", "a": "few", "b": "many", "right": str(1 + number % 2)}


def hub_rows(repo: str, config: str | None, split: str) -> list[dict[str, str]]:
    """Return what the hub would have."""
    count = {"train": TRAIN, "validation": TEST}[split] if config is None else EXTRA
    return [record(number, f"{repo} {config or split}:") for number in range(count)]


def published(rows: list[dict[str, str]]) -> str:
    """Return the git blob id of the rows in LLM-Adapters' form, computed apart from the package."""
    records = []
    for row in rows:
        answer = f"answer{row['right']}"
        text = f"Which? {row['ask']}\n\nAnswer1: few Answer2: many"
        output = f"the correct answer is {answer}"
        records.append({"instruction": text, "input": "", "output": output, "answer": answer})
    content = json.dumps(records, indent=4).encode()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def make_wheel(path: Path) -> None:
    """Write a wheel that pip takes for one: requests with two lines a question, all of them twice; an Arrow file."""
    lines = []
    for again in (0, 1_000_000):
        for number in range(TRAIN):
            row = record(number)
            doc = {"query": f"Q: {row.pop('ask')}", "idx": 0, **row}
            lines += [{"doc": doc, "idx": idx, "task_name": "toy", "doc_id": number + again} for idx in (0, 1)]
    requests = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())

    table = pyarrow.Table.from_pylist([record(number, "what is") for number in range(TEST)])
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)

    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("toy/train/requests.jsonl.gz", requests)
        wheel.writestr("toy/test.arrow", sink.getvalue().to_pybytes())
        wheel.writestr("toy_wheel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-wheel\nVersion: 1.0\n")
        wheel.writestr(
            "toy_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("toy_wheel-1.0.dist-info/RECORD", "")


def make_world(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Path:
    """Let the package see this benchmark only, its wheel downloaded already. ``changes`` replace entries of TASK."""
    data, cache = folder / "data", folder / "cache"
    wheel = cache / "downloads" / "toy_wheel-1.0-py3-none-any.whl"
    make_wheel(wheel)
    declared = {"version": 1.0, "file": wheel.name, "bytes": wheel.stat().st_size, "license": "CC0"}
    declared["sha256"] = hashlib.sha256(wheel.read_bytes()).hexdigest()
    files = {
        "tasks/toy.yaml": TASK | changes,
        "wheels.yaml": {"toy-wheel": declared},
        "prompts.yaml": {"plain": {"template": "{{ instruction }}{{ input }}\nSay:\n   "}},
        "mixtures/both.yaml": {"rows": TRAIN + EXTRA, "parts": [{"task": "toy"}, {"task": "toy", "split": "extra"}]},
        "mixtures/nested.yaml": {"parts": [{"task": "toy", "first": 5}, {"task": "toy"}]},
        "mixtures/apart.yaml": {"parts": [{"task": "toy", "first": 5}, {"task": "toy"}], "deduplicate": True},
    }
    for name, content in files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(yaml.safe_dump(content, sort_keys=False))
    (data / "models").mkdir(exist_ok=True)
    monkeypatch.setenv("SUBSPACE_DATA", str(data))
    monkeypatch.setenv("SUBSPACE_CACHE", str(cache))
    return cache
