"""Batches, and what happens to one that does not fit into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from subspace.errors import RunFailed
from subspace.evaluation.batching import OOMSplitter, count_tokens, plan_batches, token_budget
from subspace.evaluation.protocols.likelihood import Likelihood
from tests.helpers.tiny_models import tiny_llama
from tests.workers.score_tasks import score

SIZES = [(1, n) for n in (5, 90, 7, 30, 31, 29, 5, 5, 200)]


def test_batches_hold_every_item_once_within_the_budget() -> None:
    plan = plan_batches(SIZES, 100)
    assert plan == [[8], [1], [4, 3, 5], [2, 0], [6, 7]]
    assert [count_tokens(SIZES, batch) for batch in plan] == [200, 90, 93, 14, 10]


def test_an_item_of_several_rows_counts_as_many() -> None:
    assert plan_batches([(4, 10), (2, 9), (2, 9)], 60) == [[0, 1], [2]]


def test_short_items_are_not_padded_to_long_ones_where_a_batch_is_worth_a_pass() -> None:
    lengths = [100, 90, 85, 70, 65, 60]
    assert plan_batches([(1, n) for n in lengths], 1000) == [[0, 1, 2], [3, 4, 5]]
    assert plan_batches([(1, n) for n in lengths], 5000) == [[0, 1, 2, 3, 4, 5]]


def test_writing_has_larger_batches_on_a_cpu() -> None:
    assert token_budget(tiny_llama(), writes=True) > token_budget(tiny_llama(), writes=False)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


class Scarce:
    """Scores batches of up to ``room`` tokens."""

    def __init__(self, room: int, error: Exception) -> None:
        self.room, self.error = room, error
        self.tried: list[int] = []

    def __call__(self, batch: list[int]) -> list[dict[str, Any]]:
        self.tried.append(count_tokens(SIZES, batch))
        if self.tried[-1] > self.room:
            raise self.error
        return [{"number": number} for number in batch]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "python"])
def test_a_batch_that_does_not_fit_is_halved(error: Exception) -> None:
    scarce = Scarce(50, error)
    halving = OOMSplitter(tiny_llama(), scarce, SIZES)
    assert halving.score([4, 3, 5]) == [{"number": n} for n in (4, 3, 5)]
    assert scarce.tried == [93, 31, 30, 29]


def test_what_did_not_fit_once_is_not_tried_again() -> None:
    scarce = Scarce(50, MemoryError())
    halving = OOMSplitter(tiny_llama(), scarce, SIZES)
    halving.score([4, 3, 5])
    scarce.tried.clear()
    halving.score([4, 3, 5])
    assert max(scarce.tried) <= 50


def test_an_item_that_does_not_fit_alone_ends_the_run_with_what_helps() -> None:
    with pytest.raises(RunFailed, match="one item of 200 tokens does not fit into memory by itself.*resumes where"):
        OOMSplitter(tiny_llama(), Scarce(100, MemoryError()), SIZES).score([8])


def test_under_zero_3_the_size_to_try_is_named() -> None:
    model = tiny_llama()
    model.lm_head.weight.ds_id = 0
    with pytest.raises(RunFailed, match="93 tokens.*evaluate.batch_tokens=46"):
        OOMSplitter(model, Scarce(50, MemoryError()), SIZES).score([4, 3, 5])


def test_another_error_is_no_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        OOMSplitter(tiny_llama(), Scarce(1, RuntimeError("shapes cannot be multiplied")), SIZES).score([4, 3])


def test_halving_changes_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = score(tmp_path / "before", "likelihood", stage=0)
    plain, refused = Likelihood.score, []

    def scarce(self: Any, model: Any, batch: Any) -> Any:
        if len(batch) > 2:
            refused.append(len(batch))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, model, batch)

    monkeypatch.setattr(Likelihood, "score", scarce)
    after = score(tmp_path / "after", "likelihood", stage=0)
    assert refused
    assert [r.metrics for r in after] == [r.metrics for r in before]
