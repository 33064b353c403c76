"""Step 2: scores of the device against the CPU's, item by item; and batches that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch

from subspace.distributed.device import device
from subspace.evaluation import batching
from subspace.evaluation.config import PROTOCOLS
from subspace.evaluation.results import TaskResult, read_items
from tests.gpu.cases import Check, Figures, Missed
from tests.helpers.tiny_models import tiny_llama
from tests.workers.score_tasks import score

TASKS = ("boolq", "piqa", "winogrande", "arc_easy")
ITEMS = 50  # of each task
#: Answers that may differ from the CPU's: a model with random weights has ties that rounding decides.
MAY_DIFFER = 0.02


def scoring_on_cpu(check: Check) -> None:
    """Score by each protocol on the CPU."""
    tiny_llama(check.root / "model")
    for protocol in PROTOCOLS:
        check.case(protocol, _score_only, check, protocol)


def scoring(check: Check) -> None:
    """Score by each protocol on the device, and compare scores, texts and predictions with the CPU's."""
    for protocol in PROTOCOLS:
        check.case(protocol, _compare, check, protocol)


def _score_only(check: Check, protocol: str) -> Figures:
    results = _score(check, protocol, check.root / protocol)
    return {"items": sum(result.n for result in results), "seconds": sum(result.seconds for result in results)}


def _compare(check: Check, protocol: str) -> Figures:
    results = _score(check, protocol, check.root / protocol)
    expected = check.folder("scoring-on-cpu") / protocol
    answers = differ = texts = 0
    furthest = 0.0
    for result in results:
        pairs = zip(_records(check.root / protocol, result), _records(expected, result), strict=True)
        for ours, theirs in pairs:
            assert ours["id"] == theirs["id"]
            answers += 1
            differ += ours["prediction"] != theirs["prediction"]
            texts += ours.get("text") != theirs.get("text")
            scores = zip(ours.get("scores", []), theirs.get("scores", []), strict=True)
            furthest = max([furthest, *(abs(a - b) for a, b in scores)])
    figures = {
        "items": answers,
        "other answers": differ,
        "other texts": texts,
        "largest difference of a score": furthest,
        "seconds": sum(result.seconds for result in results),
    }
    if differ > MAY_DIFFER * answers:
        raise Missed(f"more than {MAY_DIFFER:.0%} of the answers are not the CPU's", **figures)
    if furthest > 1e-2:
        raise Missed("a score is not the CPU's within 0.01", **figures)
    return figures


def _records(folder: Path, result: TaskResult) -> list[Any]:
    return read_items(folder / "evaluation" / result.protocol / f"{result.task}.jsonl")


def _score(check: Check, protocol: str, folder: Path, **settings: Any) -> list[TaskResult]:
    count = 6 if check.tiny else ITEMS
    own = {"tasks": ",".join(TASKS), "limit": count, "batch_tokens": 2000, **settings}
    model = str(check.folder("scoring-on-cpu") / "model")
    if not Path(model).exists():
        tiny_llama(Path(model))
    return score(folder, protocol, 0, count, model, **own)


# Out of memory.


def out_of_memory(check: Check) -> None:
    """Let every batch above a size run out of the device's memory; the answers are those of batches that fit."""
    for protocol in ("likelihood", "llm-adapters"):
        check.case(protocol, _halved, check, protocol)


def _halved(check: Check, protocol: str) -> Figures:
    whole = _score(check, protocol, check.root / f"{protocol}-whole")
    splitter, failures = batching.OOMSplitter, [0]

    class Tight(splitter):  # type: ignore[valid-type, misc]
        """Batches of more than one item whose tokens are above a limit ask for a petabyte."""

        def __init__(self, model: Any, attempt: Any, sizes: Any) -> None:
            def tight(batch: list[int]) -> Any:
                if len(batch) > 1 and batching.count_tokens(sizes, batch) > 400:
                    failures[0] += 1
                    torch.empty(1 << 50, dtype=torch.uint8, device=device())
                return attempt(batch)

            super().__init__(model, tight, sizes)

    with mock.patch("subspace.evaluation.evaluate.OOMSplitter", Tight):
        halved = _score(check, protocol, check.root / f"{protocol}-halved")
    pairs = [
        (one, other)
        for a, b in zip(whole, halved, strict=True)
        for one, other in zip(
            _records(check.root / f"{protocol}-whole", a), _records(check.root / f"{protocol}-halved", b), strict=True
        )
    ]
    figures = {
        "batches that did not fit": failures[0],
        "items": len(pairs),
        "other answers": sum(one["prediction"] != other["prediction"] for one, other in pairs),
    }
    if not failures[0]:
        raise Missed("every batch fitted", **figures)
    if figures["other answers"] > MAY_DIFFER * len(pairs):
        raise Missed("halved batches give other answers", **figures)
    return figures
