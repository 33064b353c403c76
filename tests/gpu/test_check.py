"""The check of a GPU: that it runs to its end on a CPU in small, goes on after failures, and resumes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from subspace.adapters import linalg
from subspace.adapters.inject import inject, remove_adapters
from subspace.common.paths import REPOSITORY
from tests.bench.bench_methods import random_decompositions
from tests.gpu import every_method, wheels
from tests.gpu.cases import Check, LeftOut, Missed, end_case, is_poison, read_cases, unfinished_case
from tests.gpu.items import ITEMS, STEPS, Item, find_item
from tests.gpu.report import write_report
from tests.gpu.seven_billion import busy
from tests.helpers.tiny_models import tiny_llama

#: One of each step, of those that take a few seconds.
SOME = ("syncs", "out-of-memory", "write-7b", "svd")
#: Left out on a CPU, for a reason that is told.
ONLY_ON_A_GPU = {"optimizers": {"paged_adamw", "paged_adamw8bit"}, "memory": {"liger", "flash_attention_2"}}


def check(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tests/gpu/check.py"), "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=6000,
    )


def found(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / "check.json").read_text())["items"]
    return read


def wrong(outcomes: dict[str, Any]) -> list[str]:
    """Return what failed, or was left out though a CPU can show it."""
    lines = [
        f"{name} did not end: {outcome.get('error')}" for name, outcome in outcomes.items() if not outcome["ended"]
    ]
    for name, outcome in outcomes.items():
        for case, result in outcome["cases"].items():
            told = f"{name}, {case}: {result['status']}, {result.get('error')}"
            if result["status"] == "failed":
                lines.append(told)
    return lines


def test_every_item_has_its_function_and_a_step_takes_ten_minutes_at_most() -> None:
    for item in ITEMS:
        assert callable(getattr(importlib.import_module(item.module), item.function))
        assert [find_item(name).name for name in item.after] == list(item.after)
    for step in STEPS:
        assert sum(item.seconds for item in ITEMS if item.step == step) <= 600


@pytest.mark.filterwarnings("default")  # as in the items' own processes
@pytest.mark.parametrize("name", SOME)
def test_an_item_of_each_step_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("SUBSPACE_SVD", str(tmp_path / "svd"))
    item = find_item(name)
    getattr(importlib.import_module(item.module), item.function)(Check(item, tmp_path, "cpu", tiny=True))
    cases = read_cases(tmp_path / "items" / f"{name}.jsonl")
    assert [(case, result.get("error")) for case, result in cases.items() if result["status"] != "passed"] == []
    assert all(result["figures"] for result in cases.values())


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Let the item ``train`` do something else in the processes of the check, which import nothing else then."""
    folder.mkdir()
    body = "".join(f"    {line}\n" for line in lines)
    (folder / "sitecustomize.py").write_text(
        "import os, sys, time, types\n"
        "def poison(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def lacks():\n"
        "    from tests.gpu.cases import LeftOut\n"
        "    raise LeftOut('no such kernel')\n"
        f"def train(check):\n{body}"
        "planted = types.ModuleType('tests.gpu.first_look'); planted.train = train\n"
        "sys.modules['tests.gpu.first_look'] = planted\n"
    )
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("PYTHONPATH", folder.name)  # relative, as of a folder that wheels were installed into


@pytest.mark.processes
def test_what_was_found_is_written_and_not_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path / "planted", monkeypatch, "check.case('a', lambda: {'MB': 3})", "check.case('b', dict)")
    arguments = ("--device", "cpu", "--tiny", "--items", "train")
    out = tmp_path / "out"
    done = check(out, *arguments)
    assert wrong(found(out)) == []
    assert done.returncode == 0, done.stdout + done.stderr
    report = (out / "report.md").read_text()
    assert "| a | passed | 3 |" in report
    assert "Nothing." in report.partition("## What failed")[2].partition("##")[0]
    before = (out / "check.json").read_bytes()
    assert check(out, *arguments).returncode == 0
    assert (out / "check.json").read_bytes() == before
    assert "another folder" in check(out, "--device", "cpu", "--items", "train").stderr  # true shapes there


@pytest.mark.long
@pytest.mark.processes
def test_the_whole_check_runs_on_a_cpu(tmp_path: Path) -> None:
    done = check(tmp_path, "--device", "cpu", "--tiny", "--minutes", "90")
    outcomes = found(tmp_path)
    assert wrong(outcomes) == []
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(outcomes) == [item.name for item in ITEMS]
    for name, cases in ONLY_ON_A_GPU.items():
        assert cases == {case for case, result in outcomes[name]["cases"].items() if result["status"] == "left out"}
    assert not (tmp_path / "work").exists()


@pytest.mark.gpu
@pytest.mark.processes
@pytest.mark.parametrize("step", STEPS)
def test_a_step_passes_on_a_gpu(tmp_path: Path, step: int) -> None:
    done = check(tmp_path, "--device", "cuda", "--steps", str(step))
    assert wrong(found(tmp_path)) == []
    assert done.returncode == 0, done.stdout + done.stderr


# Failures.


def make_check(out: Path) -> Check:
    return Check(find_item("train"), out, "cpu", tiny=True)


def test_a_case_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    def fails() -> None:
        raise ValueError("by design")

    def misses() -> None:
        raise Missed("too large", size=3)

    def lacks() -> None:
        raise LeftOut("no such kernel")

    item = make_check(tmp_path)
    for function in (fails, misses, lacks, dict):
        item.case(function.__name__, function)
    cases = read_cases(item.file)
    assert [case["status"] for case in cases.values()] == ["failed", "failed", "left out", "passed"]
    assert cases["fails"]["error"] == "ValueError: by design"
    assert "in fails" in cases["fails"]["trace"]
    assert cases["misses"]["figures"] == {"size": 3}

    calls: list[str] = []
    make_check(tmp_path).case("fails", lambda: calls.append("again"))  # another process of the same item
    assert calls == []


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (ValueError("the loss is not the CPU's"), False),
    ],
)
def test_which_errors_end_a_process(error: Exception, stays: bool) -> None:
    assert is_poison(error) is stays


@pytest.mark.processes
def test_after_an_error_of_the_device_or_a_crash_a_new_process_does_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item whose first case poisons its process, whose second crashes it and whose fourth hangs."""
    plant(
        tmp_path / "planted",
        monkeypatch,
        "check.case('poison', poison)",
        "check.case('crash', lambda: os.kill(os.getpid(), 11))",
        "check.case('lacks', lacks)",
        "check.case('good', dict)",
        "check.case('hang', lambda: time.sleep(99))",
        "check.case('last', dict)",
    )
    done = check(tmp_path, "--device", "cpu", "--tiny", "--items", "train", "--minutes", "0.15")
    assert done.returncode == 1
    train = found(tmp_path)["train"]
    assert {name: case["status"] for name, case in train["cases"].items()} == {
        "poison": "failed",
        "crash": "failed",
        "lacks": "left out",
        "good": "passed",
        "hang": "failed",
    }
    assert "status -11" in train["cases"]["crash"]["error"]
    assert "too long" in train["cases"]["hang"]["error"]
    assert not train["ended"]
    assert "**train** did not end" in (tmp_path / "report.md").read_text()


def test_a_case_without_an_outcome_is_the_one_that_ended_its_process(tmp_path: Path) -> None:
    file = tmp_path / "item.jsonl"
    assert unfinished_case(file) is None
    file.write_text(
        '{"case": "a", "status": "began"}\n{"case": "a", "status": "passed"}\n{"case": "b", "status": "began"}\n{"c'
    )
    assert unfinished_case(file) == "b"
    file.write_text(file.read_text().removesuffix('{"c'))
    end_case(file, "b", "its process ended with status -11")
    assert unfinished_case(file) is None
    assert read_cases(file)["b"]["status"] == "failed"


@pytest.mark.processes
def test_it_says_where_there_is_no_device_and_what_it_does_not_know(tmp_path: Path) -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    file = str(REPOSITORY / "tests/gpu/check.py")
    done = subprocess.run(
        [sys.executable, file, "--out", str(tmp_path)], capture_output=True, text=True, env=hidden, timeout=300
    )
    assert done.returncode == 2
    assert "there is no CUDA device" in done.stdout
    assert found(tmp_path) == {}
    for wrong_words, told in ((["--steps", "7"], "there is no step 7"), (["--items", "trian"], "no item 'trian'")):
        done = subprocess.run([sys.executable, file, *wrong_words], capture_output=True, text=True, timeout=60)
        assert (done.returncode, told in done.stderr) == (2, True)


def test_the_report_has_failures_first_and_every_figure(tmp_path: Path) -> None:
    cases = {
        "lora": {"status": "passed", "figures": {"tokens/s": 1234.5, "same": True}},
        "dora": {"status": "failed", "error": "off | by\n one", "figures": {"tokens/s": 10.0}},
    }
    outcome = {"step": 3, "title": "", "seconds": 2.0, "ended": True, "cases": cases}
    write_report({"device": "cuda", "tiny": False, "items": {"nf4": outcome}}, tmp_path / "report.md")
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "- **FAILED** nf4, dora: off \\| by one" in lines
    assert "| case |  | tokens/s | same |" in lines
    assert "| lora | passed | 1,234 | yes |" in lines or "| lora | passed | 1,235 | yes |" in lines
    assert sum(line.endswith("| not run | | | |") for line in lines) == len(ITEMS) - 1


def test_time_in_which_a_kernel_runs_counts_once() -> None:
    assert busy([]) == 0
    assert busy([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7


@pytest.mark.parametrize("change", ["loss", "gradients", None])
def test_a_method_that_computes_something_else_is_found(tmp_path: Path, change: str | None) -> None:
    """The file is what the CPU computed; changed, the device is as far from it as a wrong kernel would be."""
    model, file = tiny_llama().requires_grad_(False), tmp_path / "fp32-dora.pt"
    every_method._inject(model, "dora", quantized=False)
    every_method._write(model, file)
    remove_adapters(model)
    wanted = torch.load(file, weights_only=True)
    if change == "loss":
        wanted["loss"] += 1e-3
    if change == "gradients":
        wanted["gradients"]["model.layers.0.self_attn.q_proj.A"] *= 1.1
    torch.save(wanted, file)
    every_method._inject(model, "dora", quantized=False)
    if change is None:
        assert every_method._compare(model, "fp32", file)["gradient off, share"] < 1e-6
        return
    with pytest.raises(Missed, match=change.removesuffix("s")):
        every_method._compare(model, "fp32", file)


def test_the_cost_of_a_method_is_measured_without_decompositions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBSPACE_SVD", str(tmp_path / "svd"))
    W = torch.randn(12, 8)
    with random_decompositions():
        for svd in (linalg.full_svd(W), linalg.top_singular_triplets(W, 8), linalg.bottom_singular_triplets(W, 8)):
            assert not torch.allclose(svd.U * svd.sigma @ svd.Vt, W, atol=0.1)
        inject(tiny_llama(), "milora", {"r": 4})
    assert not (tmp_path / "svd").exists()
    U, sigma, Vt = linalg.full_svd(W)
    assert torch.allclose(U * sigma @ Vt, W, atol=1e-5)


# What is carried.


def test_only_what_a_machine_lacks_is_carried() -> None:
    whole = {Requirement(line).name for line in wheels.to_carry({})}
    assert {"deepspeed", "transformers", "bitsandbytes", "pydantic-core", "hjson"} <= whole
    assert not whole & {"torch", "sympy", "networkx", "nvidia-cublas", "triton"}  # torch's own
    image = wheels.already_there("transformers==5.17.0\nscipy 1.16.0\n# a comment\nPyYAML\nnumpy @ file:///numpy.whl\n")
    assert image["pyyaml"] == ""
    lacking = {Requirement(line).name for line in wheels.to_carry(image)}
    assert whole - lacking == {"scipy", "pyyaml", "numpy"}  # 5.17 is outside what the project takes


def test_an_item_is_named_for_its_function() -> None:
    assert Item("nf4-peft", 3, "seven_billion", 1, "").function == "nf4_peft"
