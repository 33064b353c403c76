"""Scoring as a whole: which items, in which batches, by how many processes, and what is left on disk."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from subspace.adapters.inject import inject, remove_adapters, trained_parameters
from subspace.adapters.serialization import save_adapter
from subspace.common.paths import REPOSITORY
from subspace.common.progress import ProgressCallback
from subspace.data import samples as samples_module
from subspace.data import tasks as tasks_module
from subspace.data.samples import find_tasks, take_sample
from subspace.errors import UserError
from subspace.evaluation import config as config_module
from subspace.evaluation import evaluate as evaluate_module
from subspace.evaluation.config import EvaluateConfig, EvaluationSubject
from subspace.evaluation.protocols.likelihood import Likelihood
from subspace.evaluation.results import TaskResult, read_items, read_results, read_verified_items
from subspace.evaluation.subjects import evaluate_subjects
from subspace.models.config import ModelConfig
from tests.helpers.items import items
from tests.helpers.material import worker_command
from tests.helpers.tiny_models import bpe_tokenizer, tiny_llama
from tests.workers.score_tasks import score, score_subjects

PROTOCOLS = config_module.PROTOCOLS


@pytest.fixture(autouse=True)
def made_items(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let made-up items stand for prepared ones, but in tests of the real model and data."""
    if request.node.get_closest_marker("model"):
        return
    monkeypatch.setattr(samples_module, "task_items", lambda name, split: datasets.Dataset.from_list(items(name, 21)))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("all", list(tasks_module.list_tasks())),
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
    task = tasks_module.find_task("piqa")
    small, large, whole = ([item["id"] for item in take_sample(task, "test", n).items] for n in (5, 15, 100))
    assert (len(small), len(large), len(whole)) == (5, 15, 21)
    assert set(small) < set(large) < set(whole)
    assert large == [name for name in whole if name in large]
    assert small != whole[:5]


def test_the_majority_is_the_split_s() -> None:
    task = tasks_module.find_task("piqa")
    labels = [item["label"] for item in items("piqa", 21)]
    most = max(labels.count(0), labels.count(1)) / 21
    assert [take_sample(task, "test", n).majority for n in (3, None)] == [most, most]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_left_on_disk(tmp_path: Path, protocol: str) -> None:
    results = score(tmp_path, protocol, stage=0)
    assert read_results(tmp_path) == sorted(results, key=lambda result: result.task)
    assert [result.task for result in results] == ["piqa", "hellaswag"]
    (piqa, hellaswag) = results
    assert piqa.items == tmp_path / "evaluation" / protocol / "piqa.jsonl"
    records = read_items(piqa.items)
    sample = take_sample(tasks_module.find_task("piqa"), "test", 9).items
    assert [record["id"] for record in records] == [item["id"] for item in sample]
    assert piqa.metrics["acc"].value == sum(record["correct"]["acc"] for record in records) / 9
    assert piqa.n == 9
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
        return evaluate_module.evaluate(tiny_llama(), bpe_tokenizer(), config)[0]

    plain, changed = result(), result(**change)
    assert plain.fingerprint != changed.fingerprint
    assert plain.fingerprint_fields[part] != changed.fingerprint_fields[part]
    assert plain.fingerprint == result(batch_tokens=1).fingerprint


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_in_the_mode_it_was_in(training: bool) -> None:
    model = tiny_llama().train(training)
    modes = []
    model.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    evaluate_module.evaluate(model, bpe_tokenizer(), EvaluateConfig(tasks="piqa"))
    assert set(modes) == {(False, False)}
    assert model.training is training


def test_progress_reaches_the_end() -> None:
    seen: dict[str, list[float]] = {}
    totals: dict[str, float] = {}

    def watched(title: str, total: float, unit: str) -> AbstractContextManager[ProgressCallback]:
        totals[title] = total
        return nullcontext(lambda done, detail="": seen.setdefault(title, []).append(done))

    config = EvaluateConfig(tasks="piqa,siqa", batch_tokens=200)
    evaluate_module.evaluate(tiny_llama(), bpe_tokenizer(), config, progress=watched)
    assert {title: done[-1] for title, done in seen.items()} == totals
    assert all(done == sorted(done) for done in seen.values())


def test_a_missing_task_is_told_before_any_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(name: str, split: str) -> datasets.Dataset:
        if name == "openbookqa":
            raise UserError("openbookqa is not on this machine")
        return datasets.Dataset.from_list(items(name, 3))

    monkeypatch.setattr(samples_module, "task_items", lacking)
    model = tiny_llama()
    model.register_forward_hook(lambda *_: pytest.fail("a task was scored"))
    with pytest.raises(UserError, match="openbookqa is not on this machine"):
        evaluate_module.evaluate(model, bpe_tokenizer(), EvaluateConfig())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_answers_do_not_depend_on_the_batch(protocol: str) -> None:
    model = tiny_llama()
    config = EvaluateConfig(protocol=protocol, tasks="boolq,hellaswag,winogrande", limit=9)
    jobs = evaluate_module.build_jobs(model, bpe_tokenizer(), config)
    assert len(jobs) == 3

    def answers(job: evaluate_module.Job, size: int) -> list[Any]:
        batches = [range(first, min(first + size, 9)) for first in range(0, 9, size)]
        return [record["prediction"] for batch in batches for record in job.scorer.score(model, batch)]

    with torch.no_grad():
        for job in jobs:
            assert answers(job, 1) == answers(job, 4) == answers(job, 64)


def test_several_protocols_are_scored_in_one_go(tmp_path: Path) -> None:
    results = score(tmp_path, "likelihood,answer-word", stage=0)
    assert [(r.protocol, r.task) for r in results] == [
        (protocol, task) for protocol in ("likelihood", "answer-word") for task in ("piqa", "hellaswag")
    ]
    alone = score(tmp_path / "alone", "answer-word", stage=0)
    assert [r.metrics for r in results[2:]] == [r.metrics for r in alone]


def test_examples_stand_before_each_question() -> None:
    def job(count: int) -> evaluate_module.Job:
        config = EvaluateConfig(tasks="openbookqa", examples=count, limit=6)
        return evaluate_module.build_jobs(tiny_llama(), bpe_tokenizer(), config)[0]

    none, two = job(0), job(2)
    for plain, asked in zip(none.scorer.requests, two.scorer.requests, strict=True):  # type: ignore[attr-defined]
        assert [choice for _, choice in plain] == [choice for _, choice in asked]
        assert all(context.endswith(f"\n\n{bare}") for (context, _), (bare, _) in zip(asked, plain, strict=True))
        assert {context.count("\n\n") for context, _ in asked} == {2}
    assert two.fingerprint_fields["examples"] == "2 of train, seed 1234"
    assert two.fingerprint_fields != job(3).fingerprint_fields
    assert "examples" not in none.fingerprint_fields


def test_bytes_are_counted_where_that_is_asked_for() -> None:
    config = EvaluateConfig(tasks="piqa", by_bytes=True)
    (job,) = evaluate_module.build_jobs(tiny_llama(), bpe_tokenizer(), config)
    with torch.no_grad():
        records = job.scorer.score(tiny_llama(), range(21))
    for item, record in zip(job.sample.items, records, strict=True):
        per_byte = [
            score / len(choice.encode()) for score, choice in zip(record["scores"], item["choices"], strict=True)
        ]
        assert record["prediction"]["acc_bytes"] == per_byte.index(max(per_byte))
    assert job.scorer.metrics == ("acc", "acc_norm", "acc_bytes")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"protocol": "likelyhood"}, "protocol is 'likelyhood': .*Did you mean 'likelihood'"),
        ({"protocol": ["likelihood", "x"]}, "protocol is 'x': .*There are: answer-word, likelihood"),
        ({"defects": "pad_is_nought"}, "defects is 'pad_is_nought': .*Did you mean 'pad_is_zero'"),
    ],
)
def test_an_unknown_protocol_or_defect_names_the_nearest(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        EvaluateConfig(**settings)


# What was scored before


def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Likelihood, "score", lambda *_: pytest.fail("an item was scored"))


def test_what_is_scored_already_is_not_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = score(tmp_path, "likelihood", stage=0)
    no_forward(monkeypatch)
    assert score(tmp_path, "likelihood", stage=0) == first


@pytest.mark.parametrize("again", [False, True])
def test_results_that_cannot_be_added_to_are_told_before_anything_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    (tmp_path / "results.json").write_text("[{")
    no_forward(monkeypatch)
    with pytest.raises(UserError, match=r"results.json is damaged"):
        score(tmp_path, "likelihood", stage=0, overwrite=again)
    assert not list(tmp_path.rglob("*.jsonl*"))


@pytest.mark.parametrize(
    "change",
    ["again", "weights", "adapters", "an adapter's setting", "limit", "items are gone", "items are cut", "edited"],
)
def test_what_is_not_the_same_is_scored_again(tmp_path: Path, change: str) -> None:
    model, tokenizer = tiny_llama(), bpe_tokenizer()
    settings: dict[str, Any] = {"tasks": "piqa", "limit": 9}
    if change == "an adapter's setting":
        inject(model, "lora", {"alpha": 1})
    (first,) = evaluate_module.evaluate(model, tokenizer, EvaluateConfig(**settings), tmp_path)
    assert first.items
    passes: list[int] = []
    if change == "weights":
        model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] += 1e-3
    elif change == "adapters":
        inject(model, "lora")
    elif change == "an adapter's setting":
        remove_adapters(model)
        inject(model, "lora", {"alpha": 2})
    elif change == "items are gone":
        first.items.unlink()
    elif change == "items are cut":
        first.items.write_text(first.items.read_text()[:-20])
    elif change == "edited":
        first.items.write_text(first.items.read_text().replace("piqa-", "PIQA-", 1))
    else:
        settings |= {"overwrite": True} if change == "again" else {"limit": 8}
    model.register_forward_hook(lambda *_: passes.append(1))
    evaluate_module.evaluate(model, tokenizer, EvaluateConfig(**settings), tmp_path)
    assert passes


@pytest.mark.processes
def test_two_scorings_of_one_folder_at_a_time_leave_all_rows(tmp_path: Path) -> None:
    """Of the same tasks and of others: nobody dies, and every row is there with its items."""
    wanted = [("likelihood", "piqa,siqa,boolq"), ("likelihood", "piqa,siqa"), ("answer-word", "piqa,boolq")]
    fork = multiprocessing.get_context("fork")
    started = [
        fork.Process(target=score, args=(tmp_path / "both", protocol, 0), kwargs={"tasks": tasks, "batch_tokens": 60})
        for protocol, tasks in wanted
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * 3
    found = read_results(tmp_path / "both")
    assert len(found) == 5
    for result in found:
        (alone,) = score(tmp_path / "alone", result.protocol, 0, tasks=result.task, batch_tokens=60)
        assert alone.items
        assert read_verified_items(result) == read_items(alone.items)
    assert not list((tmp_path / "both").rglob("*.partial-*"))


class Killed(BaseException):
    """Stands for a signal that no handler sees."""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_killed_scoring_goes_on_where_it_was(protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after each few batches, the last line torn; no batch is scored twice but the ones that were torn."""
    names = [Path("evaluation", protocol, f"{task}.jsonl") for task in ("piqa", "hellaswag")]
    score(tmp_path / "undisturbed", protocol, stage=0)
    scorer = next(type(job.scorer) for job in laid_out(protocol))
    batches, plain = 0, scorer.score
    batch_limit = 0

    def killing(self: Any, model: Any, batch: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches > batch_limit:
            raise Killed
        return plain(self, model, batch)

    monkeypatch.setattr(scorer, "score", killing)
    kills = 0
    while True:
        batch_limit = batches + 2
        try:
            score(tmp_path / "killed", protocol, stage=0)
            break
        except Killed:
            kills += 1
            for file in (tmp_path / "killed").rglob("*.partial-0"):
                whole = file.read_bytes()
                file.write_bytes(whole[: len(whole) - 3 * (kills % 2)])
    assert kills > 3
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert not list((tmp_path / "killed").rglob("*.partial-*"))


@pytest.mark.parametrize(
    "line",
    [
        "5",
        "[1]",
        "[[0], {}]",
        '{"id": 1}',
        '[0, {"id": "x"}]',
        "[" * 10_000,
        '["0", null]',
        '[5, {"id": "5", "prompt": "", "prediction": {"acc": 0}, "label": 0, "correct": {"acc": true}}]',
        '[5, {"id": "I", "prompt": "", "prediction": {"acc": 0}, "label": 0, "correct": {}}]',
        '[5, {"id": "I", "prompt": "", "prediction": {"acc": 0}, "label": 0, "correct": {"acc": 1}}]',
        '[-1, {"id": "I", "prompt": "", "prediction": {"acc": 0}, "label": 0, "correct": {"acc": true}}]',
    ],
)
def test_what_a_partial_file_should_not_hold_is_passed_over(tmp_path: Path, line: str, monkeypatch: Any) -> None:
    undisturbed = score(tmp_path / "undisturbed", "likelihood", stage=0)
    plain, calls = Likelihood.score, 0

    def killing(self: Any, model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        return plain(self, model, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Likelihood, "score", killing)
        with pytest.raises(Killed):
            score(tmp_path / "killed", "likelihood", stage=0)
    (file,) = (tmp_path / "killed").rglob("*.partial-0")
    file.write_text(f"{file.read_text()}{line}\n")
    assert [result.metrics for result in score(tmp_path / "killed", "likelihood", stage=0)] == [
        result.metrics for result in undisturbed
    ]
    assert not file.exists()


def laid_out(protocol: str) -> list[evaluate_module.Job]:
    return evaluate_module.build_jobs(
        tiny_llama(), bpe_tokenizer(), EvaluateConfig(protocol=protocol, tasks="piqa", limit=3)
    )


# Two processes

WAYS = {f"{protocol}, ZeRO-{stage}": (protocol, stage) for protocol in PROTOCOLS for stage in (0, 3)}


def by_processes(jobs: list[Any]) -> list[str]:
    return worker_command(2, "score_tasks", json.dumps(jobs))


ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score in all ways by two processes."""
    root = tmp_path_factory.mktemp("ranks")
    command = by_processes([(str(root / way), protocol, stage, {}) for way, (protocol, stage) in WAYS.items()])
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False)
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


@pytest.mark.processes
def test_adapters_on_a_base_that_is_spread_answer_as_on_a_whole_one(tmp_path: Path) -> None:
    base, names = tmp_path / "saved", ["lora", "prefix"]
    tiny_llama(base / "base")
    for name in names:
        model = tiny_llama()
        inject(model, name)
        with torch.no_grad():
            for parameter in trained_parameters(model).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        save_adapter(model, base / name)
    protocols, which = "likelihood,llm-adapters", dict[str, Any](base=str(base), methods=names)
    score_subjects(tmp_path / "whole", protocols, 0, **which)
    command = by_processes([(str(tmp_path / "spread"), protocols, 3, which)])
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    files = sorted((tmp_path / "whole").rglob("*.jsonl"))
    assert len(files) == (1 + len(names)) * 4
    answers = [
        [[r["prediction"] for r in read_items(root / file.relative_to(tmp_path / "whole"))] for file in files]
        for root in (tmp_path / "whole", tmp_path / "spread")
    ]
    assert answers[0] == answers[1]
    assert len({str(one) for one in answers[0]}) > len(names)


def test_only_stage_3_spreads_a_base(tmp_path: Path) -> None:
    config = EvaluateConfig(engine=str(REPOSITORY / "ds_configs" / "zero2.json"))
    with pytest.raises(UserError, match="of ZeRO stage 2, but only stage 3 spreads a model. Take ds_configs/zero3"):
        evaluate_subjects([EvaluationSubject(ModelConfig(path="tiny"), config, tmp_path)])


@pytest.mark.long
@pytest.mark.processes
def test_two_killed_processes_go_on_where_they_were(tmp_path: Path) -> None:
    """SIGKILL at random while they score, three times; the last time one process alone goes on."""
    settings: dict[str, Any] = {"tasks": "piqa", "limit": None, "batch_tokens": 100, "count": 1500}
    score(tmp_path / "undisturbed", "likelihood", 0, **settings)
    killed, draw = tmp_path / "killed", random.Random(0)
    for _ in range(2):
        assert kill_at_random(by_processes([(str(killed), "likelihood", 0, settings)]), killed, draw.randrange(50, 400))
    assert 100 < items_kept(killed) < 1500
    score(killed, "likelihood", 0, **settings)
    name = Path("evaluation", "likelihood", "piqa.jsonl")
    assert (killed / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert not list(killed.rglob("*.partial-*"))


def items_kept(folder: Path) -> int:
    """Count the items that are scored, in whole files and in those of a scoring that goes on."""
    kept = 0
    for file in folder.rglob("evaluation/*/*.jsonl*"):
        with contextlib.suppress(FileNotFoundError):  # files come and go
            kept += len(file.read_bytes().splitlines()) - (".partial-" in file.name)
    return kept


def kill_at_random(command: list[str], folder: Path, more: int) -> bool:
    """Kill the processes once so many more items are kept; tell whether they were still at it."""
    wanted = items_kept(folder) + more
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True) as scoring:
        while scoring.poll() is None and items_kept(folder) < wanted:
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(scoring.pid, signal.SIGKILL)
    return scoring.returncode != 0


# On real items, with a tiny model and with SmolLM2


@pytest.mark.model
@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize("model", ["tiny", "smollm2-135m"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_answers_depend_neither_on_the_batch_nor_on_the_processes(
    protocol: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 1, 7 and 64 items by one process, and by two; 200 real items a task, 12 by SmolLM2, float32."""
    settings: dict[str, Any] = {"count": 0, "model_name": model, "tasks": "all", "batch_tokens": None}
    settings["limit"] = 200 if model == "tiny" else 12

    def answers(folder: Path) -> list[list[Any]]:
        files = sorted((folder / "evaluation" / protocol).glob("*.jsonl"))
        assert len(files) == 8
        return [[record["prediction"] for record in read_items(file)] for file in files]

    done = subprocess.run(
        by_processes([(str(tmp_path / "two"), protocol, 0, settings)]),
        env=ENVIRONMENT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    expected = answers(tmp_path / "two")
    for size in (64, 7, 1):
        monkeypatch.setattr(evaluate_module, "plan_batches", lambda sizes, _, size=size: in_batches(len(sizes), size))
        score(tmp_path / str(size), protocol, 0, **settings)
        assert answers(tmp_path / str(size)) == expected


def in_batches(count: int, size: int) -> list[list[int]]:
    return [list(range(first, min(first + size, count))) for first in range(0, count, size)]


@pytest.mark.model
@pytest.mark.long
@pytest.mark.processes
def test_ten_kills_at_random_change_nothing(tmp_path: Path) -> None:
    """SIGKILL ten times while SmolLM2 is scored by two protocols."""
    settings = ["evaluate.tasks=piqa,winogrande", "evaluate.limit=60", "evaluate.protocol=likelihood,answer-word"]
    settings += ["model.dtype=float32", "evaluate.batch_tokens=256"]

    def command(runs: str) -> list[str]:
        return [sys.executable, "-m", "subspace", "evaluate", "smollm2-135m", f"runs={tmp_path / runs}", *settings]

    subprocess.run(command("undisturbed"), env=ENVIRONMENT, capture_output=True, check=True)
    draw, folder = random.Random(0), tmp_path / "killed" / "smollm2-135m"
    for kill in range(10):
        share = (2 * 2 * 60 - items_kept(folder)) // (11 - kill)  # a busy machine kills late
        assert kill_at_random(command("killed"), folder, draw.randrange(1, max(2, share))), f"kill {kill} came too late"
    subprocess.run(command("killed"), env=ENVIRONMENT, capture_output=True, check=True)
    names = [file.relative_to(folder) for file in folder.rglob("*.jsonl")]
    assert len(names) == 4
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "undisturbed" / "smollm2-135m" / name).read_bytes()
    assert not list(folder.rglob("*.partial-*"))
