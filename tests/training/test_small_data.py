"""Files of few rows: every row is trained, by defaults that fit the run; and what a setting cannot do is told."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from subspace import config as config_module
from subspace.adapters.inject import inject
from subspace.config import RunConfig
from subspace.errors import UserError
from subspace.resolve import resolve_run, schedule_notices
from subspace.resumption import open_run_data
from subspace.run import train_run
from subspace.training.config import TrainConfig
from subspace.training.optimizers import ineffective_settings, lr_factor, parameter_groups
from tests.helpers.material import logged, make_material, saved_adapter, write_rows
from tests.helpers.reference import train_plainly
from tests.helpers.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


def read(material: Path, *overrides: str, rows: int | None = None) -> RunConfig:
    """Return the settings of a run whose schedule is left to the defaults, on so many rows."""
    file = material.parent / f"rows-{rows}.jsonl"
    if rows and not file.exists():
        write_rows(file, rows, words=(6, 16))
    own = [f"data.mixture={file}"] if rows else []
    plain = ["data.validation=null", "train.steps=null", "train.warmup_steps=null"]
    return config_module.read_config(material, [*plain, *own, *overrides])


def opened(config: RunConfig, ranks: int = 1) -> tuple[Any, Any]:
    return open_run_data(resolve_run(config, ranks, torch.device("cpu")))


# The last, smaller step.

#: Rows, rows of a step, micro-batch, epochs. With micro-batches of one row, a last step of few leaves some empty.
SIZES = [(31, 16, None, 1), (10, 16, None, 3), (31, 8, 1, 2), (7, 4, 2, 1), (3, 8, 2, 1), (9, 4, None, 2.4)]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("rows", "batch", "micro", "epochs"), SIZES)
def test_the_last_smaller_step_is_the_mean_over_its_tokens(
    material: Path, tmp_path: Path, rows: int, batch: int, micro: int | None, epochs: float, packing: bool
) -> None:
    settings = [f"train.batch_size={batch}", f"train.epochs={epochs}", f"data.packing={packing}", f"runs={tmp_path}"]
    config = read(material, *settings, f"train.micro_batch_size={micro or 'null'}", "name=run", rows=rows)
    folder = train_run(config)
    expected, tensors = train_plainly(config)
    assert len(expected) == -(-round(rows * epochs) // batch)
    assert logged(folder) == pytest.approx(expected, abs=1e-5)
    for name, tensor in saved_adapter(folder).items():
        assert torch.allclose(tensor, tensors[name], atol=2e-4), name


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # torch's compiler looks where it is warned not to
def test_the_last_smaller_step_is_the_same_in_compiled_layers(material: Path, tmp_path: Path) -> None:
    settings = ["train.batch_size=8", "train.micro_batch_size=2", "train.epochs=1", f"runs={tmp_path}", "name=run"]
    config = read(material, *settings, "train.compile=true", rows=11)
    assert logged(train_run(config)) == pytest.approx(train_plainly(config)[0], abs=1e-5)


@pytest.mark.parametrize("number", range(12))
def test_the_run_says_how_often_each_row_is_trained(material: Path, number: int) -> None:
    draw = np.random.default_rng(number)
    rows, batch, epochs = (int(draw.integers(1, most)) for most in (70, 24, 4))
    config = read(material, f"train.batch_size={batch}", f"train.epochs={epochs}", rows=rows)
    data, plan = opened(config)
    told = schedule_notices(config, data, plan)[0]
    assert told.startswith(f"{rows} rows to train on, 0 held out: {len(plan)} step")
    assert Counter(row for step in range(len(plan)) for row in plan[step]) == dict.fromkeys(range(rows), epochs)
    assert f"; each {'once' if epochs == 1 else f'{epochs} times'}" in told
    last = len(plan[-1])
    assert (f"the last of {last}" in told) == (last < batch and len(plan) > 1)
    assert ("more rows than there are" in told) == (len(plan[0]) > rows)
    assert data.report["fed"] == rows
    assert data.report["tokens"] == data.train.lengths.sum()


def test_a_number_of_steps_says_which_rows_it_leaves_out(material: Path) -> None:
    for steps, told in (
        (2, "2 steps of 8; 16 of them once, the others not at all"),
        (7, "7 steps of 8; 16 of them 2 times, the others once"),
        (5, "5 steps of 8; each once"),
    ):
        config = read(material, f"train.steps={steps}", rows=40)
        data, plan = opened(config)
        assert schedule_notices(config, data, plan)[0] == f"40 rows to train on, 0 held out: {told}"
        assert data.report["fed"] == min(40, 8 * steps)  # though more are encoded, to be grouped by length


# Held-out rows.


@pytest.mark.parametrize("rows", [5, 50, 200, 1000, 1500])
def test_rows_are_held_out_only_where_a_validation_is_due(material: Path, rows: int) -> None:
    tenth = max(1, min(120, rows // 10))
    for settings, held in (
        ([], 0),
        (["train.validate_every=0"], 0),
        (["train.validate_every=5"], tenth),
        (["train.patience=2"], tenth),
        (["train.save_final=best"], tenth),
        (["data.validation=3"], 3),
        (["data.validation=3", "train.validate_every=5"], 3),
    ):
        config = read(material, *settings, rows=rows)
        data, plan = opened(config)
        assert (len(data.validation), plan.num_rows) == (held, rows - held), settings
        told = schedule_notices(config, data, plan)
        assert f"{rows - held:,} rows to train on, {held} held out" in told[0]
        unused = held and not config.train.validates
        assert any("nothing looks at them" in notice for notice in told) == bool(unused)


def test_a_run_that_keeps_the_best_validates_once_an_epoch(material: Path, tmp_path: Path) -> None:
    config = read(material, "train.save_final=best", f"runs={tmp_path}", "name=best", rows=40)
    folder = train_run(config)
    of = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    # 36 rows in steps of 8, three epochs: 13.5 steps.
    assert [line["step"] for line in of if "validation_loss" in line] == [4, 8, 12, 14]
    about = json.loads((folder / "adapter" / "adapter.json").read_text())["about"]
    assert about["validation"] == min(logged(folder, "validation_loss"))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["train.save_final=best", "train.validate_every=0"], "train.save_final=best need validations"),
        (["train.patience=3", "train.validate_every=0"], "train.patience=3 need validations"),
        (["train.validate_every=3", "data.validation=0"], "train.validate_every=3 needs held-out rows"),
        (["train.patience=3", "data.validation=0"], "train.patience=3 needs held-out rows"),
    ],
)
def test_what_needs_validations_that_are_excluded_is_refused(
    material: Path, settings: list[str], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        resolve_run(read(material, *settings), 1, torch.device("cpu"))


# The learning rate.


@pytest.mark.parametrize("steps", [1, 5, 15, 38, 100, 999, 1000, 40000])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_by_default_warm_up_fits_the_run(schedule: str, steps: int) -> None:
    config = TrainConfig(schedule=schedule)
    warmup = config.warmup(steps)
    assert warmup == min(100, steps // 10)
    factors = [lr_factor(config, step, steps) for step in range(steps)]
    assert max(factors) == factors[max(0, warmup - 1)] == 1
    assert sum(factors) > 0.4 * steps


@pytest.mark.parametrize(("warmup", "told"), [(100, "at 4% of"), (5, "at 80% of"), (4, "at 100% of"), (3, None)])
def test_a_warm_up_that_exceeds_the_run_is_told(material: Path, warmup: int, told: str | None) -> None:
    config = read(material, f"train.warmup_steps={warmup}", "train.epochs=1", "train.learning_rate=0.001", rows=31)
    notices = schedule_notices(config, *opened(config))
    expected = f"train.warmup_steps={warmup} is no less than the run's 4 steps: the learning rate ends {told} "
    assert any(notice.startswith(expected) for notice in notices) == bool(told)
    assert len(notices) == (2 if told else 1)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_logged_learning_rate_is_the_step_s_own(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    taken: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: Any, closure: Any = None) -> Any:
        taken.append(self.param_groups[0]["lr"])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    settings = [f"train.schedule={schedule}", "train.warmup_steps=2", "train.epochs=2", "train.trackers=[tensorboard]"]
    config = read(material, *settings, f"runs={tmp_path}", "name=run", rows=31)
    folder = train_run(config)
    assert logged(folder, "learning_rate") == taken
    assert taken == pytest.approx([0.01 * lr_factor(config.train, at, 8) for at in range(8)])
    assert taken[-1] > 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("learning_rate")] == pytest.approx(taken)


# Settings without effect.


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["train.patience=3", "train.validate_every=2"], "train.patience=3 has no effect"),
        (["train.patience=2", "train.validate_every=2"], None),
        (["train.lora_plus_rule=peft"], "train.lora_plus_rule=peft has no effect"),
        (["train.lora_plus_rule=peft", "train.lora_plus_lr_ratio=4"], None),
        (["train.save_every=0", "train.keep_checkpoints=5"], "train.keep_checkpoints=5 has no effect"),
        (["data.limit=32"], "data.limit=32 has no effect"),
        (["data.limit=31"], None),
    ],
)
def test_settings_that_cannot_matter_are_told(material: Path, settings: list[str], told: str | None) -> None:
    config = read(material, "train.epochs=2", *settings, rows=31)  # eight steps, or seven
    notices = schedule_notices(config, *opened(config))[1:]
    assert [notice[: len(told or "")] for notice in notices] == ([told] if told else [])


def test_a_patience_that_is_told_to_be_too_long_never_ends_a_run(material: Path, tmp_path: Path) -> None:
    """The rate is so high that losses go up as often as down."""
    wild = ["train.learning_rate=30", "train.schedule=constant", "train.max_grad_norm=0"]
    wild += ["train.validate_every=1", "train.steps=9"]
    for patience in (1, 3, 7, 8):
        config = read(
            material, *wild, f"train.patience={patience}", f"runs={tmp_path}", f"name=p{patience}", "train.steps=9"
        )
        ended = len(logged(train_run(config))) < 9
        silent = not any("patience" in notice for notice in schedule_notices(config, *opened(config)))
        assert silent or not ended
        assert silent == (patience < 8)


@pytest.mark.parametrize(
    ("method", "decays", "ups"),
    [
        ("lora", True, True),
        ("bitfit", False, False),
        ("ia3", False, False),
        ("prefix", False, False),
        ("full", True, False),
        ("houlsby", True, True),
    ],
)
def test_what_the_optimizer_s_settings_do_not_reach_is_told(method: str, decays: bool, ups: bool) -> None:
    model = tiny_llama()
    inject(model, method)
    config = TrainConfig(weight_decay=0.1, lora_plus_lr_ratio=16)
    groups = parameter_groups(model, config)
    assert any(group["weight_decay"] for group in groups) == decays
    assert any(group["lr"] > config.learning_rate for group in groups) == ups
    told = ineffective_settings(model, config)
    assert [notice.split("=")[0] for notice in told] == [
        *(["train.weight_decay"] if not decays else []),
        *(["train.lora_plus_lr_ratio"] if not ups else []),
    ]
    assert all(f"has no effect on method {method}" in notice for notice in told)
    assert not ineffective_settings(model, TrainConfig())
