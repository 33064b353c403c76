"""A run that goes on in several processes: to the bit in the same layout, with the same losses in any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from subspace.adapters.serialization import TENSORS
from subspace.training.checkpoint import checkpoint_path, checkpoints, find_corruption
from tests.distributed.test_zero import launch, losses
from tests.helpers.material import STAGES, logged, make_material
from tests.training.test_resume import killed

pytestmark = pytest.mark.processes

STEPS, KILLED_AFTER = 8, 4
NOISY = ["method=lora", "method.r=4", "method.dropout=0.2"]
SCHEDULED = ["method=adalora", "method.r=6", "method.target_r=2", "method.every=1"]
GROWN = ["method=flexlora", "method.r=4", "method.every=1", "method.warm_up=0", "method.decay=constant"]
CALM = ["method=lora", "method.r=4"]
LAYOUTS = {**{f"zero{stage}": stage for stage in STAGES}, "offload": 2}
#: What is resumed in the same layout: a schedule where its state is whole and where it is in parts.
SAME = {
    **{("noisy", engine): NOISY for engine in LAYOUTS},
    **{("scheduled", engine): SCHEDULED for engine in ("zero1", "zero3")},
    ("grown", "zero1"): GROWN,
}
#: Where a run went until it was killed, and where it goes on: ranks and engine.
MOVES = [
    ((1, "zero0"), (2, "zero1")),
    ((2, "zero3"), (1, "zero2")),
    ((2, "zero2"), (2, "zero3")),
]


def name_of(move: tuple[tuple[int, str], tuple[int, str]]) -> str:
    (ranks, engine), (then_ranks, then_engine) = move
    return f"{ranks}-{engine}-{then_ranks}-{then_engine}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train everything whole, kill copies of it, and let these go on: two launches for each number of ranks."""
    root = tmp_path_factory.mktemp("ranks")
    file = make_material(root, rows=32)
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    (root / "offload.json").write_text(json.dumps({"zero_optimization": offload}))

    def job(name: str, engine: str, settings: list[str], *, resume: bool = False) -> tuple[str, list[str], bool]:
        run = [f"runs={root}", f"name={name}", f"engine={root / f'{engine}.json'}", f"train.steps={STEPS}"]
        run += ["train.micro_batch_size=2", f"train.save_every={KILLED_AFTER}", "train.keep_checkpoints=99"]
        return str(file), [*run, *settings], resume

    calm = {origin for origin, _ in MOVES} | {(1, "zero0")}
    begin = {1: [], 2: [job(f"{kind}-{e}", e, s) for (kind, e), s in SAME.items()]}
    go_on = {1: [], 2: [job(f"{kind}-{e}-killed", e, s, resume=True) for (kind, e), s in SAME.items()]}
    for ranks, engine in sorted(calm):
        begin[ranks].append(job(f"{ranks}-{engine}", engine, CALM))
    for move in MOVES:
        ranks, engine = move[1]
        go_on[ranks].append(job(name_of(move), engine, CALM, resume=True))

    for ranks, jobs in begin.items():
        launch(jobs, root, ranks)
    for kind, engine in SAME:
        killed(root / f"{kind}-{engine}", f"{kind}-{engine}-killed", KILLED_AFTER)
    for move in MOVES:
        ranks, engine = move[0]
        killed(root / f"{ranks}-{engine}", name_of(move), KILLED_AFTER)
    for ranks, jobs in go_on.items():
        launch(jobs, root, ranks)
    return root


@pytest.mark.parametrize(("kind", "engine"), SAME)
def test_the_same_layout_goes_on_to_the_bit(runs: Path, engine: str, kind: str) -> None:
    whole, parts = runs / f"{kind}-{engine}", runs / f"{kind}-{engine}-killed"
    assert logged(whole) == logged(parts)
    assert (whole / "adapter" / TENSORS).read_bytes() == (parts / "adapter" / TENSORS).read_bytes()


@pytest.mark.parametrize("move", MOVES, ids=name_of)
def test_another_layout_goes_on_with_the_same_losses(runs: Path, move: tuple[tuple[int, str], tuple[int, str]]) -> None:
    whole, parts = losses(runs / "1-zero0"), losses(runs / name_of(move))
    assert len(parts) == STEPS
    assert whole[-1] < whole[0] - 0.1
    assert (whole - parts).abs().max() < 1e-5


@pytest.mark.parametrize("engine", LAYOUTS)
def test_checkpoints_say_the_same_in_every_layout(runs: Path, engine: str) -> None:
    path = checkpoint_path(runs / f"noisy-{engine}", KILLED_AFTER)
    assert find_corruption(path) is None
    assert len(checkpoints(runs / f"noisy-{engine}")) == STEPS // KILLED_AFTER
    names = json.loads((path / "manifest.json").read_text())["files"]
    sizes = {name: size for name, (size, _) in names.items() if name.endswith("safetensors")}
    one = json.loads((checkpoint_path(runs / "noisy-zero0", KILLED_AFTER) / "manifest.json").read_text())["files"]
    assert sizes == {name: size for name, (size, _) in one.items() if name.endswith("safetensors")}
