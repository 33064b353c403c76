"""Step 4: what a step of each method costs over the frozen model's, what decompositions cost, how fast scoring is."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

import torch

from subspace.adapters import linalg
from subspace.adapters.registry import list_methods
from subspace.common.paths import svd_cache_folder
from subspace.evaluation.config import EvaluateConfig
from subspace.evaluation.evaluate import build_jobs, evaluate
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model, open_tokenizer
from tests.bench import bench_methods
from tests.gpu.cases import Check, Figures, Missed
from tests.gpu.first_look import synchronize
from tests.gpu.seven_billion import TINY, model_7b
from tests.workers.score_tasks import made_items


def method_steps(check: Check) -> None:
    """Alternate 20 steps of each method with the frozen model's and HF PEFT's, in 2 layers of 7B's width."""
    changes: dict[str, Any] = {**TINY, "num_hidden_layers": 1} if check.tiny else {}
    if check.tiny:
        bench_methods.SETTINGS["p-tuning"]["hidden"] = 64
    layers, rounds, shape = (1, 2, (2, 16)) if check.tiny else (2, 20, (16, 128))
    weights: Any = bench_methods.build(layers, torch.bfloat16, **changes)
    ids = torch.randint(0, 2048, shape, generator=torch.Generator().manual_seed(1)).to(check.device)

    def one(name: str) -> Figures:
        with bench_methods.random_decompositions():
            figures = bench_methods.measure(weights, name, ids, rounds)
        return {
            "trained": figures["trained"],
            "ms of the frozen step": 1000 * figures["frozen_seconds"],
            "time over frozen": figures["time"],
            "PEFT's": figures.get("peft_time", "-"),
            "ours over PEFT's": figures.get("over_peft", "-"),
            "MB": figures["memory"],
            "PEFT's MB": figures.get("peft_memory", "-"),
            "frozen MB": figures["frozen_memory"],
        }

    for name in list_methods():
        check.case(name, one, name)


# Decompositions.


def svd(check: Check) -> None:
    """Time each decomposition that a method starts from, and see that it is one."""
    shapes = [(96, 64), (128, 96)] if check.tiny else [(4096, 4096), (11008, 4096)]
    for shape in shapes:
        W = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(check.device) / shape[1] ** 0.5
        expected: list[torch.Tensor] = []
        for kind in ("whole", "largest 32", "smallest 32"):
            check.case(f"{shape[0]} x {shape[1]}, {kind}", _decompose, check, W, kind, expected)


def _decompose(check: Check, W: torch.Tensor, kind: str, expected: list[torch.Tensor]) -> Figures:
    shutil.rmtree(svd_cache_folder(), ignore_errors=True)  # files of 100 MB each, which are read in place of computing
    if not expected:
        squares = torch.linalg.eigvalsh(W.double().T @ W.double())  # much faster, and exact enough in float64
        expected.append(squares.clamp(min=0).sqrt().flip(0).float())
    compute: dict[str, Callable[[], linalg.SVD]] = {
        "whole": lambda: linalg.full_svd(W),
        "largest 32": lambda: linalg.top_singular_triplets(W, 32),
        "smallest 32": lambda: linalg.bottom_singular_triplets(W, 32),
    }
    synchronize(check)
    began = time.perf_counter()
    U, sigma, Vt = compute[kind]()
    synchronize(check)
    seconds = time.perf_counter() - began
    (values,) = expected
    wanted = {"whole": values, "largest 32": values[:32], "smallest 32": values[-32:]}[kind]
    figures = {
        "seconds, its file too": seconds,
        "worst value off, share of the largest": float((sigma - wanted).abs().max() / values[0]),
        "W v - sigma u, share of the largest": float((W @ Vt.T - U * sigma).norm(dim=0).max() / values[0]),
        "U not orthonormal": float((U.T @ U - torch.eye(U.shape[1], device=U.device)).abs().max()),
    }
    limits = {"whole": 1e-4, "largest 32": 2e-2, "smallest 32": 1e-4}  # random values do not fall, so 32 are not exact
    if figures["worst value off, share of the largest"] > limits[kind]:
        raise Missed("a singular value is wrong", **figures)
    return figures


# Scoring.


def scoring_speed(check: Check) -> None:
    """Score made-up items of four tasks by two protocols, in bfloat16."""
    config = ModelConfig(path=str(model_7b(check)), dtype="bfloat16")
    opened: list[Any] = []
    for protocol in ("likelihood", "llm-adapters"):
        check.case(protocol, _score, check, config, opened, protocol)


def _score(check: Check, config: ModelConfig, opened: list[Any], protocol: str) -> Figures:
    if not opened:
        opened += [open_model(config), open_tokenizer(config)]
    model, tokenizer = opened
    count = 4 if check.tiny else 50
    asked = EvaluateConfig(protocol=protocol, tasks="boolq,piqa,hellaswag,arc_easy", limit=count)
    with made_items(count):
        jobs = build_jobs(model, tokenizer, asked)
        first = [job for job in jobs if job.sample.task.name == "piqa"]
        evaluate(model, tokenizer, asked, jobs=first)  # warms up
        synchronize(check)
        began = time.perf_counter()
        results = evaluate(model, tokenizer, asked, jobs=jobs)
    seconds = time.perf_counter() - began
    tokens = sum(rows * length for job in jobs for rows, length in job.scorer.sizes)
    items = sum(result.n for result in results)
    return {
        "items": items,
        "items/s": items / seconds,
        "tokens read": tokens,
        "tokens/s": tokens / seconds,
        "seconds": seconds,
    }
