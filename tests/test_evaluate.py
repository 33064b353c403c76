"""Scoring as a whole: which items, in which batches, by how many processes, and what is left on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from subspace import declarations, evaluate, launcher
from subspace.errors import UserError
from subspace.evaluate import EvaluateConfig, count_tokens, find_tasks, plan_batches, take_sample
from subspace.paths import REPOSITORY
from subspace.progress import At
from subspace.results import TaskResult, read_items, read_results
from tests.evaluate_worker import score
from tests.items import items
from tests.tiny import bpe_tokenizer, tiny_llama

PROTOCOLS = evaluate.PROTOCOLS


@pytest.fixture(autouse=True)
def made_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let made-up items stand for prepared ones."""
    monkeypatch.setattr(evaluate, "task_items", lambda name, split: datasets.Dataset.from_list(items(name, 21)))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("all", list(declarations.tasks())),
        ("piqa", ["piqa"]),
        ("PIQA, boolq", ["boolq", "piqa"]),
        (["ARC-e", "obqa", "arc_easy"], ["arc_easy", "openbookqa"]),
    ],
)
def test_tasks_are_found_and_ordered(names: str | list[str], found: list[str]) -> None:
    assert [task.name for task in find_tasks(names)] == found


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no task is called 'pica'. Did you mean 'piqa'"):
        find_tasks("pica")


def test_a_sample_is_part_of_a_larger_one_in_the_split_s_order() -> None:
    task = declarations.task("piqa")
    small, large, whole = ([item["id"] for item in take_sample(task, "test", n).items] for n in (5, 15, 100))
    assert (len(small), len(large), len(whole)) == (5, 15, 21)
    assert set(small) < set(large) < set(whole)
    assert large == [name for name in whole if name in large]
    assert small != whole[:5]


def test_the_majority_is_the_split_s() -> None:
    task = declarations.task("piqa")
    labels = [item["label"] for item in items("piqa", 21)]
    most = max(labels.count(0), labels.count(1)) / 21
    assert [take_sample(task, "test", n).majority for n in (3, None)] == [most, most]


def test_batches_hold_every_item_once_within_the_budget() -> None:
    sizes = [(1, n) for n in (5, 90, 7, 30, 31, 29, 5, 5, 200)]
    plan = plan_batches(sizes, 100)
    assert plan == [[8], [1], [4, 3, 5], [2, 0, 6, 7]]
    assert [count_tokens(sizes, batch) for batch in plan] == [200, 90, 93, 28]


def test_an_item_of_several_rows_counts_as_many() -> None:
    assert plan_batches([(4, 10), (2, 9), (2, 9)], 60) == [[0, 1], [2]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_left_on_disk(tmp_path: Path, protocol: str) -> None:
    results = score(tmp_path, protocol, stage=0)
    assert read_results(tmp_path) == sorted(results, key=lambda result: result.task)
    assert [result.task for result in results] == ["piqa", "hellaswag"]
    (piqa, hellaswag) = results
    assert piqa.items == tmp_path / "evaluation" / protocol / "piqa.jsonl"
    records = read_items(piqa.items)
    sample = take_sample(declarations.task("piqa"), "test", 17).items
    assert [record["id"] for record in records] == [item["id"] for item in sample]
    assert piqa.metrics["acc"].value == sum(record["correct"]["acc"] for record in records) / 17
    assert piqa.n == 17
    assert piqa.fingerprint != hellaswag.fingerprint
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"limit": 16}, "items"),
        ({"protocol": "llm-adapters"}, "protocol"),
        ({"protocol": "llm-adapters", "prompt": "alpaca"}, "template"),
    ],
)
def test_the_fingerprint_follows_what_was_asked(change: dict[str, Any], part: str) -> None:
    def result(**settings: Any) -> TaskResult:
        config = EvaluateConfig(**{"tasks": "piqa", "limit": 17, **settings})
        return evaluate.evaluate(tiny_llama(), bpe_tokenizer(), config)[0]

    plain, changed = result(), result(**change)
    assert plain.fingerprint != changed.fingerprint
    assert plain.ingredients[part] != changed.ingredients[part]
    assert plain.fingerprint == result(batch_tokens=1).fingerprint


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_in_the_mode_it_was_in(training: bool) -> None:
    model = tiny_llama().train(training)
    modes = []
    model.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    evaluate.evaluate(model, bpe_tokenizer(), EvaluateConfig(tasks="piqa"))
    assert set(modes) == {(False, False)}
    assert model.training is training


def test_progress_reaches_the_end() -> None:
    seen: dict[str, list[float]] = {}
    totals: dict[str, float] = {}

    def watched(title: str, total: float, unit: str) -> AbstractContextManager[At]:
        totals[title] = total
        return nullcontext(lambda done, detail="": seen.setdefault(title, []).append(done))

    config = EvaluateConfig(tasks="piqa,siqa", batch_tokens=200)
    evaluate.evaluate(tiny_llama(), bpe_tokenizer(), config, progress=watched)
    assert {title: done[-1] for title, done in seen.items()} == totals
    assert all(done == sorted(done) for done in seen.values())


def test_a_missing_task_is_told_before_any_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(name: str, split: str) -> datasets.Dataset:
        if name == "openbookqa":
            raise UserError("openbookqa is not on this machine")
        return datasets.Dataset.from_list(items(name, 3))

    monkeypatch.setattr(evaluate, "task_items", lacking)
    model = tiny_llama()
    model.register_forward_hook(lambda *_: pytest.fail("a task was scored"))
    with pytest.raises(UserError, match="openbookqa is not on this machine"):
        evaluate.evaluate(model, bpe_tokenizer(), EvaluateConfig())


# Two processes

WAYS = {"likelihood": ("likelihood", 0), "llm-adapters": ("llm-adapters", 0), "zero3": ("likelihood", 3)}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score in all ways by two processes."""
    root = tmp_path_factory.mktemp("ranks")
    jobs = [(str(root / way), protocol, stage) for way, (protocol, stage) in WAYS.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [
        f"--master_port={launcher.free_port()}",
        str(Path(__file__).with_name("evaluate_worker.py")),
        json.dumps(jobs),
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return root


@pytest.mark.processes
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_score_as_one_does(by_two: Path, tmp_path: Path, way: str) -> None:
    results = score(tmp_path, *WAYS[way][:1], stage=0)
    names = [result.items.relative_to(tmp_path) for result in results if result.items]
    assert [read_items(tmp_path / name) for name in names] == [read_items(by_two / way / name) for name in names]
    assert [r.metrics for r in read_results(tmp_path)] == [r.metrics for r in read_results(by_two / way)]


@pytest.mark.processes
@pytest.mark.parametrize("way", WAYS)
def test_every_process_is_given_all_results(by_two: Path, way: str) -> None:
    first, second = (json.loads((by_two / way / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert [task for task, *_ in first] == ["piqa", "hellaswag"]
