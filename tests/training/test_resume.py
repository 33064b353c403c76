"""A run that stops and goes on is the run that never stopped, to the bit; and what cannot go on is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from subspace import config as config_module
from subspace.adapters.inject import adapters, inject
from subspace.adapters.registry import list_methods
from subspace.adapters.serialization import TENSORS
from subspace.common.random_state import random_states, set_random_states
from subspace.distributed.signals import SignalHandler
from subspace.errors import RunStopped, UserError
from subspace.resolve import step_plan
from subspace.resumption import is_finished
from subspace.run import train_run
from subspace.training.checkpoint import MANIFEST, checkpoint_path, checkpoints
from subspace.training.checkpointer import ConsumedSamples
from subspace.training.optimizers import make_optimizer
from subspace.training.resume import Checkpoint, restore_checkpoint
from tests.helpers.material import logged, make_material, write_rows
from tests.helpers.tiny_models import EARLY_SCHEDULES, KINDS, tiny_llama

STEPS = 9
#: With what has a state of its own: epochs, accumulation, a schedule, decay. Every step has a checkpoint.
SETTINGS = [f"train.steps={STEPS}", "train.micro_batch_size=2", "train.schedule=cosine", "train.weight_decay=0.1"]
SETTINGS += ["train.save_every=1", "train.keep_checkpoints=99"]
DROPOUT = ["method=lora", "method.r=4", "method.dropout=0.2"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"), rows=24)  # four and a half epochs in nine steps


def train(material: Path, runs: Path, name: str, *overrides: str, resume: bool = False) -> Path:
    config = config_module.read_config(material, [f"runs={runs}", f"name={name}", *SETTINGS, *overrides])
    return train_run(config, resume=resume)


def killed(whole: Path, name: str, step: int) -> Path:
    """Return a copy of a run as a kill after the checkpoint of a step would have left it, two steps further on."""
    folder = whole.with_name(name)
    shutil.copytree(whole, folder, ignore=lambda at, names: {"adapter"} if Path(at) == whole else set())
    for path in checkpoints(folder):
        if path.name > checkpoint_path(folder, step).name:
            shutil.rmtree(path)
    lines = [line for line in (folder / "log.jsonl").read_text().splitlines() if json.loads(line)["step"] <= step + 2]
    (folder / "log.jsonl").write_text("\n".join([*lines, '{"step": 9, "lo']))
    about = json.loads((folder / "environment.json").read_text())
    del about["outcome"]
    (folder / "environment.json").write_text(json.dumps(about))
    return folder


def assert_same(one: Path, other: Path) -> None:
    assert (one / "adapter" / TENSORS).read_bytes() == (other / "adapter" / TENSORS).read_bytes()
    for key in ("step", "loss", "learning_rate", "gradient_norm", "validation_loss"):
        assert logged(one, key) == logged(other, key)


@pytest.fixture(scope="module")
def whole(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    return train(material, tmp_path_factory.mktemp("runs"), "whole", *DROPOUT, "train.validate_every=3")


@pytest.mark.parametrize("step", [1, 2, 5, 8])
def test_a_run_goes_on_from_any_step(material: Path, whole: Path, step: int) -> None:
    folder = killed(whole, f"after-{step}", step)
    train(material, whole.parent, folder.name, *DROPOUT, "train.validate_every=3", resume=True)
    assert_same(whole, folder)
    assert json.loads((folder / "environment.json").read_text())["resumed_after"] == step


#: With every change one of each kind; the others take minutes together.
METHODS = [pytest.param(name, marks=[] if name in KINDS else pytest.mark.long) for name in list_methods()]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on(material: Path, tmp_path: Path, method: str) -> None:
    settings = [
        f"method={method}",
        *(f"method.{key}={value}" for key, value in EARLY_SCHEDULES.get(method, {}).items()),
    ]
    whole = train(material, tmp_path, "whole", *settings)
    folder = killed(whole, "killed", 5)
    train(material, tmp_path, "killed", *settings, resume=True)
    assert_same(whole, folder)


def test_a_model_in_sixteen_bits_goes_on(material: Path, tmp_path: Path) -> None:
    settings = [
        "model.dtype=bfloat16",
        "model.gradient_checkpointing=true",
    ]  # its adapters are copied and share products
    whole = train(material, tmp_path, "whole", *settings)
    folder = killed(whole, "killed", 4)
    train(material, tmp_path, "killed", *settings, resume=True)
    assert_same(whole, folder)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_model_whose_head_is_its_embedding_goes_on(material: Path, tmp_path: Path, stage: int) -> None:
    tiny_llama(tmp_path / "model", tie_word_embeddings=True)
    engine = material.parent / f"zero{stage}.json"
    settings = [f"model.path={tmp_path / 'model'}", "method=full", "train.learning_rate=0.001", f"engine={engine}"]
    whole = train(material, tmp_path, "whole", *settings)
    folder = killed(whole, "killed", 4)
    train(material, tmp_path, "killed", *settings, resume=True)
    assert_same(whole, folder)


@pytest.mark.parametrize("setting", ["train.schedule=linear", "train.schedule=constant", "data.packing=true"])
def test_every_schedule_and_packing_goes_on(material: Path, tmp_path: Path, setting: str) -> None:
    settings = [setting, "train.warmup_steps=7", "method.dropout=0.1"]
    whole = train(material, tmp_path, "whole", *settings)
    folder = killed(whole, "killed", 4)
    train(material, tmp_path, "killed", *settings, resume=True)
    assert_same(whole, folder)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_state_of_eight_bits_goes_on(material: Path, tmp_path: Path, stage: int) -> None:
    # Large enough that bitsandbytes does not keep its state in 32 bits.
    settings = ["method=lora", "method.r=64", "train.optimizer=adamw8bit", f"engine={material.parent}/zero{stage}.json"]
    whole = train(material, tmp_path, "whole", *settings)
    folder = killed(whole, "killed", 5)
    train(material, tmp_path, "killed", *settings, resume=True)
    assert_same(whole, folder)
    other = killed(whole, "other", 5)
    with pytest.raises(UserError, match="in blocks of 8 bits"):
        train(material, tmp_path, other.name, *settings, f"engine={material.parent}/zero{2 - stage}.json", resume=True)


@pytest.mark.parametrize(("optimizer", "stage"), [("adamw8bit", 0), ("adamw8bit", 2), ("paged_adamw", 1)])
def test_a_state_in_pages_is_in_pages_again(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, stage: int
) -> None:
    """What bitsandbytes allocates is marked here, as its managed memory is on a GPU; no copy has that mark."""
    from bitsandbytes.optim.optimizer import Optimizer8bit

    def paged(self: Optimizer8bit, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        buffer = torch.zeros_like(p, dtype=dtype, requires_grad=False)
        buffer.is_paged = True  # type: ignore[attr-defined]
        return buffer

    made: list[torch.optim.Optimizer] = []

    def remembered(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made.append(make_optimizer(name, groups))
        return made[-1]

    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", paged)
    monkeypatch.setattr(Optimizer8bit, "prefetch_state", lambda self, p: None)
    monkeypatch.setattr("subspace.resolve.check_optimizer", lambda *a, **k: None)  # pages need a GPU
    monkeypatch.setattr("subspace.run.make_optimizer", remembered)
    settings = [
        "method=lora",
        "method.r=64",
        f"train.optimizer={optimizer}",
        f"engine={material.parent}/zero{stage}.json",
    ]
    whole = train(material, tmp_path, "whole", *settings)
    folder = killed(whole, "killed", 5)
    train(material, tmp_path, "killed", *settings, resume=True)
    assert_same(whole, folder)
    for state in (state for optimizer in made for state in optimizer.state.values()):
        assert all(state[name].is_paged for name in ("state1", "state2"))
    assert len(made) == 2
    assert made[1].state


def stop_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Ask a run to stop, as a signal does, once so many steps are done."""
    real, asked = ConsumedSamples.add, []

    def add(self: ConsumedSamples, number: int) -> None:
        real(self, number)
        if number == step:
            asked.append(number)

    patch.setattr(ConsumedSamples, "add", add)
    patch.setattr(
        SignalHandler, "stop_requested", property(lambda self: bool(asked), lambda self, value: None), raising=False
    )


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(material: Path, whole: Path) -> None:
    settings = [*DROPOUT, "train.validate_every=3", "train.save_every=0"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(RunStopped, match="after step 4, by a signal. Its checkpoint is saved"):
            train(material, whole.parent, "asked", *settings)
    folder = whole.parent / "asked"
    # The best so far has one too.
    assert [path.name for path in checkpoints(folder)] == ["step-000003", "step-000004"]
    assert not (folder / "adapter").exists()
    train(material, whole.parent, "asked", *settings, resume=True)
    assert_same(whole, folder)


def test_a_run_that_is_stopped_before_it_began_starts_over(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        SignalHandler, "stop_requested", property(lambda self: True, lambda self, value: None), raising=False
    )
    with pytest.raises(RunStopped, match="before the first step"):
        train(material, tmp_path, "run")
    monkeypatch.undo()
    assert len(logged(train(material, tmp_path, "run", resume=True))) == STEPS


def test_a_damaged_checkpoint_is_passed_over(material: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = killed(whole, "damaged", 5)
    (checkpoint_path(folder, 5) / "training.safetensors").write_bytes(b"")
    (checkpoint_path(folder, 4) / MANIFEST).unlink()
    train(material, whole.parent, folder.name, *DROPOUT, "train.validate_every=3", resume=True)
    assert_same(whole, folder)
    said = capsys.readouterr().err
    assert "checkpoint step-000005 cannot be used: training.safetensors has 0 bytes instead of" in said
    assert "checkpoint step-000004 cannot be used: manifest.json is missing or damaged" in said
    assert "resumes after step 3" in said


def test_without_a_checkpoint_it_starts_at_the_beginning(
    material: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = killed(whole, "none", 0)
    train(material, whole.parent, folder.name, *DROPOUT, "train.validate_every=3", resume=True)
    assert_same(whole, folder)
    assert "holds no checkpoint to resume from" in capsys.readouterr().err


def test_a_checkpoint_has_no_frozen_weights(whole: Path) -> None:
    size = sum(path.stat().st_size for path in (whole / "adapter").rglob("*"))
    saved = sum(path.stat().st_size for path in checkpoint_path(whole, 5).rglob("*") if path.is_file())
    random = 50_000  # states of generators
    assert saved < 4 * size + random
    assert not list(whole.rglob("*.pt"))


def test_early_stopping_is_remembered(material: Path, tmp_path: Path) -> None:
    settings = ["train.learning_rate=30", "train.schedule=constant", "train.validate_every=1", "train.patience=3"]
    settings += ["train.save_final=best", "train.max_grad_norm=0", "train.steps=90"]
    whole = train(material, tmp_path, "whole", *settings)
    last = len(logged(whole))
    assert last < 90
    for step in (last - 1, last):
        folder = killed(whole, f"after-{step}", step)
        train(material, tmp_path, folder.name, *settings, resume=True)
        assert_same(whole, folder)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("method.r=8", r"method\.r: 4 -> 8"),
        ("data.max_length=32", r"data\.max_length: 64 -> 32"),
        ("train.batch_size=4", r"train\.batch_size: 8 -> 4"),
        ("model.dtype=bfloat16", r"model\.dtype: float32 -> bfloat16"),
        ("targets=q_proj", r"targets.*q_proj"),
        ("train.seed=1", r"train\.seed: 0 -> 1"),
        ("train.optimizer=adamw8bit", r"train\.optimizer: adamw -> adamw8bit"),
    ],
)
def test_a_change_that_would_be_wrong_is_refused(material: Path, whole: Path, change: str, complaint: str) -> None:
    folder = killed(whole, change.replace("=", "-"), 3)
    with pytest.raises(UserError, match=f"other settings, which cannot change during a run: {complaint}"):
        train(material, whole.parent, folder.name, *DROPOUT, change, resume=True)
    assert [path.name for path in checkpoints(folder)] == [f"step-{n:06d}" for n in (1, 2, 3)]


def test_a_change_that_may_be_is_told(material: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = killed(whole, "changed", 3)
    changes = ["train.learning_rate=0.001", "train.micro_batch_size=4", f"engine={material.parent / 'zero2.json'}"]
    train(material, whole.parent, folder.name, *DROPOUT, "train.validate_every=3", *changes, resume=True)
    said = capsys.readouterr().err
    assert "changed: train.learning_rate: 0.01 -> 0.001" in said
    assert "changed: train.micro_batch_size: 2 -> 4" in said
    assert "changed: engine zero_optimization.stage: 0 -> 2" in said
    assert logged(folder, "learning_rate")[3] == pytest.approx(logged(whole, "learning_rate")[3] / 10)


def test_other_rows_are_refused(material: Path, whole: Path) -> None:
    text = (material.parent / "data.jsonl").read_text()
    folder = killed(whole, "other-rows", 3)
    try:
        (material.parent / "data.jsonl").write_text(text.replace("soap", "book"))
        with pytest.raises(UserError, match="its first 3 steps used other rows"):
            train(material, whole.parent, folder.name, *DROPOUT, "train.validate_every=3", resume=True)
    finally:
        (material.parent / "data.jsonl").write_text(text)


def test_a_finished_run_is_known(material: Path, whole: Path) -> None:
    settings = [f"runs={whole.parent}", "name=whole", *SETTINGS, *DROPOUT, "train.validate_every=3"]
    assert is_finished(config_module.read_config(material, settings))
    assert not is_finished(config_module.read_config(material, [*settings, "train.steps=12"]))


#: Rows, rows of a step, epochs and those of the longer run: with whole steps or not, fewer rows than a step, and more
#: than one block of steps that are grouped by length.
LONGER = [
    *((16, 8, 1, 2), (19, 8, 1, 2), (5, 8, 1, 2), (9, 2, 1, 1.5)),
    *(pytest.param(*sizes, marks=pytest.mark.long) for sizes in ((19, 8, 2, 3), (5, 8, 3, 4))),
]


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize(("rows", "batch", "epochs", "more"), LONGER)
def test_a_finished_run_goes_on_for_more_epochs(
    material: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: int,
    batch: int,
    epochs: float,
    more: float,
    schedule: str,
) -> None:
    """With the same learning rates it is the run of that length to the bit; with others it has that run's rows."""
    file = tmp_path / "rows.jsonl"
    write_rows(file, rows)
    settings = [f"data.mixture={file}", "data.validation=null", "train.steps=null", f"train.batch_size={batch}"]
    settings += [
        "train.micro_batch_size=1",
        f"train.schedule={schedule}",
        "train.warmup_steps=0",
        "train.save_every=50",
    ]
    settings += [*DROPOUT, "train.keep_checkpoints=2"]
    train(material, tmp_path, "longer", *settings, f"train.epochs={epochs}")
    before = logged(tmp_path / "longer", "loss")
    train(material, tmp_path, "longer", *settings, f"train.epochs={more}", resume=True)
    said = " ".join(capsys.readouterr().err.split())
    fresh = train(material, tmp_path, "fresh", *settings, f"train.epochs={more}")
    steps, after = len(before), len(logged(fresh))
    small = rows * epochs % batch > 0
    done = steps - small
    assert (f"step {steps} was the last one of a shorter run" in said) == small
    if schedule == "constant" or done < 2:  # the first step's rate is that of any length
        assert_same(tmp_path / "longer", fresh)
        told = (
            f"the run has {after} steps now, and was to have {steps}: its first {done} were those of a run of {after}"
        )
        assert not done or told in said
    else:
        assert (
            f"its first {done} were those of a run of {steps} (train.schedule=linear); from step {done + 1} on" in said
        )
        assert logged(tmp_path / "longer", "step") == logged(fresh, "step")
        assert logged(tmp_path / "longer")[:done] == before[:done]
        assert logged(tmp_path / "longer", "learning_rate")[done:] == logged(fresh, "learning_rate")[done:]
    facts = [json.loads((checkpoints(tmp_path / n)[-1] / "training.json").read_text()) for n in ("longer", "fresh")]
    assert facts[0]["fed"] == facts[1]["fed"]
    assert facts[0]["rows"] == round(rows * more)


def test_a_run_is_made_longer_by_steps(material: Path, whole: Path) -> None:
    folder = whole.with_name("longer")
    shutil.copytree(whole, folder)
    longer = [*DROPOUT, "train.validate_every=3", "train.steps=12"]
    train(material, whole.parent, folder.name, *longer, resume=True)
    assert logged(folder)[:STEPS] == logged(whole)
    assert len(logged(folder)) == 12


def test_what_cannot_be_made_longer_says_why(material: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows(file, 19)
    settings = [f"data.mixture={file}", "data.validation=null", "train.steps=null", "train.keep_checkpoints=1"]
    train(material, tmp_path, "run", *settings, "train.epochs=1")
    with pytest.raises(
        UserError, match=r"cannot be made longer: its last step, 3, had fewer rows .*keep_checkpoints=2"
    ):
        train(material, tmp_path, "run", *settings, "train.epochs=2", resume=True)
    with pytest.raises(UserError, match=r"has 3 steps already, more than the 2 that are asked for"):
        train(material, tmp_path, "run", *settings, "train.steps=2", resume=True)
    with pytest.raises(UserError, match=r"a validation is due, but \S+ held out no rows when it began"):
        train(material, tmp_path, "run", *settings, "train.epochs=1", "train.validate_every=2", resume=True)


def test_a_run_of_before_goes_on_as_it_began(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to version 0.1 there was no smaller last step, and other defaults held rows out and warmed up."""
    file = tmp_path / "rows.jsonl"
    write_rows(file, 150)
    settings = [f"data.mixture={file}", "train.steps=null", "train.epochs=5", "train.micro_batch_size=null"]
    settings += ["train.save_every=5", *DROPOUT]
    then = ["data.validation=120", "train.warmup_steps=100", "train.validate_every=0"]
    now = ["data.validation=null", "train.warmup_steps=null", "train.validate_every=null"]
    with monkeypatch.context() as before:
        before.setattr("subspace.resumption.step_plan", lambda *given, former: step_plan(*given, former=True))
        whole = train(material, tmp_path, "whole", *settings, *then)
    assert len(logged(whole)) == 5 * 30 // 8 == 18
    facts = json.loads((checkpoint_path(whole, 10) / "training.json").read_text())
    assert "rows" not in facts
    assert is_finished(
        config_module.read_config(material, [f"runs={tmp_path}", "name=whole", *SETTINGS, *settings, *now])
    )
    folder = killed(whole, "killed", 10)
    train(material, tmp_path, "killed", *settings, *now, resume=True)
    assert_same(whole, folder)
    again = killed(folder, "again", 15)  # from a checkpoint that the run of now has written
    train(material, tmp_path, "again", *settings, *now, resume=True)
    assert_same(whole, again)


def test_random_states_come_back() -> None:
    import random

    import numpy as np

    before = json.loads(json.dumps(random_states()))
    drawn = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()]
    set_random_states(before)
    assert [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()] == drawn


def test_a_checkpoint_of_another_layer_is_refused() -> None:
    """Shapes are equal in all layers, so what goes by position would load there without a word."""
    model = tiny_llama()
    inject(model, "lora", {"r": 4}, targets=[r"model\.layers\.0\.self_attn\.q_proj"])
    own = {
        f"{site}.{name}": t for site, adapter in adapters(model).items() for name, t in adapter.own_tensors().items()
    }
    elsewhere = {name.replace("layers.0", "layers.1"): tensor for name, tensor in own.items()}
    with pytest.raises(UserError, match="other names or shapes"):
        restore_checkpoint(SimpleNamespace(module=model), Checkpoint(Path("step-000001"), {}, elsewhere, {}), seed=0)
