"""A thousand malformed and hostile inputs: each is answered in one message, soon, and nothing is left or executed."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from subspace.adapters.inject import inject
from subspace.adapters.serialization import save_adapter
from subspace.evaluation.results import TaskResult, accuracy, items_file, write_items, write_results
from tests.helpers.material import make_material
from tests.helpers.tiny_models import tiny_llama
from tests.hostile import configurations, files, runs
from tests.hostile.inputs import Case, Place, judge

SEED = 19
LEAST = 1000
DRAWN = 100


def all_cases(seed: int = SEED) -> list[Case]:
    rng = random.Random(seed)
    return [*configurations.cases(rng), *files.cases(rng), *runs.cases(rng)]


def drawn(cases: list[Case], count: int, seed: int = SEED) -> list[Case]:
    """Return so many of the cases, every kind among them."""
    rng = random.Random(seed)
    shuffled = rng.sample(cases, len(cases))
    first = {case.kind: case for case in reversed(shuffled)}
    rest = [case for case in shuffled if case not in first.values()]
    return [*first.values(), *rest][:count]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("valid")
    config = make_material(root)
    torch.manual_seed(0)
    model = tiny_llama()
    inject(model, "lora", {"r": 4}, targets=["q_proj"])
    adapter = save_adapter(model, root / "adapter")
    items = items_file(root / "scored", "likelihood", "boolq")
    records = [
        {"id": str(n), "prompt": "p", "prediction": {"acc": 1}, "label": 1, "correct": {"acc": n % 2 == 0}}
        for n in range(8)
    ]
    write_items(items, records)  # type: ignore[arg-type]
    result = TaskResult(
        model="tiny", adapter="", dtype="float32", protocol="likelihood", task="boolq", n=8, majority=0.5, truncated=0,
        metrics={"acc": accuracy([n % 2 == 0 for n in range(8)])}, seconds=1.0, items=items,
        fingerprint_fields={"protocol": "likelihood", "task version": "1.0", "items": "8 items"},
    )  # fmt: skip
    write_results(root / "scored", [result])
    for lock in (root / "scored").rglob("*.lock"):  # of the writing; reading leaves none
        lock.unlink()
    return Place(config, root / "zero0.json", root / "model", Path(adapter), root / "scored", root / "canary")


def faults_of(cases: list[Case], place: Place, tmp_path: Path) -> dict[str, list[str]]:
    found = {}
    for number, case in enumerate(cases):
        folder = tmp_path / f"{number:04}"
        if faults := judge(case, place, folder):
            found[f"{case.kind}: {case.name}"] = faults
        shutil.rmtree(folder)
    return found


def test_the_generator_makes_a_thousand_inputs_of_every_kind_and_the_same_ones_each_time() -> None:
    cases = all_cases()
    kinds = Counter(case.kind for case in cases)
    assert len(cases) >= LEAST
    assert min(kinds.values()) >= 5
    assert len({(case.kind, case.name) for case in cases}) == len(cases)
    assert [(case.kind, case.name) for case in cases] == [(case.kind, case.name) for case in all_cases()]


def test_a_hundred_malformed_inputs_are_answered_in_one_message(place: Place, tmp_path: Path) -> None:
    assert faults_of(drawn(all_cases(), DRAWN), place, tmp_path) == {}


@pytest.mark.long
def test_a_thousand_malformed_inputs_are_answered_in_one_message(place: Place, tmp_path: Path) -> None:
    assert faults_of(all_cases(), place, tmp_path) == {}
