"""Every base with every ZeRO stage, one and two processes and every family of methods; see tests/helpers/matrix.py.

The default suite trains a selection in which each base meets every engine and method, ``-m long`` all of them. The
recorded table is compared with what the code refuses today.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from subspace.training.compatibility import find_missing_requirement
from tests.helpers.matrix import (
    CELLS,
    RECORD,
    TABLE,
    Cell,
    beyond_tolerance,
    covering,
    measure,
    refused,
    table,
)

COVERING = covering()
FLOAT16 = [cell for cell in CELLS if cell.base == "fp16" and cell.engine != "3+nvme" and cell.ranks == 1]


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(COVERING, tmp_path_factory.mktemp("some"))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure([cell for cell in CELLS if refused(cell) is None], tmp_path_factory.mktemp("all"))


@pytest.fixture(scope="module")
def float16(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cuda")
        yield measure(FLOAT16, tmp_path_factory.mktemp("float16"))


@pytest.fixture(scope="module")
def record() -> Any:
    return json.loads(RECORD.read_text())


def by_name(cell: Cell) -> str:
    return cell.name


def hold(cell: Cell, outcome: dict[str, Any]) -> None:
    """Check that a cell did as its reference, that its file is what it trained, and that it merges."""
    if "refused" in outcome:
        assert outcome["refused"] == refused(cell, find_missing_requirement), cell.name
        return
    assert beyond_tolerance(cell, outcome) is None, cell.name
    assert len(outcome["held"]) == cell.ranks, cell.name


@pytest.mark.processes
def test_a_selection_trains_reloads_and_merges(some: dict[str, Any]) -> None:
    for cell in COVERING:
        hold(cell, some[cell.name])


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize("cell", [cell for cell in CELLS if refused(cell) is None], ids=by_name)
def test_every_combination_trains_reloads_and_merges(everything: dict[str, Any], cell: Cell) -> None:
    hold(cell, everything[cell.name])


@pytest.mark.gpu
@pytest.mark.processes
@pytest.mark.parametrize("cell", FLOAT16, ids=by_name)
def test_float16_trains_reloads_and_merges_on_a_gpu(float16: dict[str, Any], cell: Cell) -> None:
    assert "loss" in float16[cell.name]
    hold(cell, float16[cell.name])


def test_the_record_holds(record: Any) -> None:
    """What was refused is refused still, with the same words, and what was trained lies within today's tolerance."""
    for cell in CELLS:
        outcome = record["cells"][cell.name]
        if (why := refused(cell)) or "refused" not in outcome:
            assert outcome.get("refused") == why, cell.name
        if "loss" in outcome:
            hold(cell, outcome)


def test_the_table_is_that_of_the_record(record: Any) -> None:
    assert list(record["cells"]) == [cell.name for cell in CELLS]
    assert TABLE.read_text() == table(record), "write it anew: python -m tests.helpers.matrix --table"


@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4", "fp4", "int8", "nf4-double"])
def test_frozen_weights_are_spread_at_stage_3(record: Any, base: str) -> None:
    """Two processes hold about half of the weights each, packed ones too; only scales and norms are held twice."""
    whole, parts = (record["cells"][Cell(base, engine, 2, "lora").name]["held"] for engine in ("2", "3"))
    assert max(parts) < 0.6 * min(whole)
