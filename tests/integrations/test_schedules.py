"""Schedules in loops that are not ours: they act as in ours and go on after an interruption, or a notice is given."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

import subspace
from subspace.adapters.base import TrainProgress
from subspace.adapters.exchange.pretrained import own_tensors
from subspace.adapters.inject import adapter_groups, inject, trained_parameters
from subspace.adapters.penalties import with_penalties
from subspace.adapters.serialization import load_adapter
from subspace.errors import UserError
from subspace.integrations.trainer import FollowSchedules
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess
from tests.helpers.tiny_models import EARLY_SCHEDULES, tiny_llama

STEPS, HALF, RATE = 8, 4, 1e-2
#: Settings with which a schedule has acted before half of the steps, and acts after it.
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-dash": {"launch": 2},
    "adalora": {"warm_up": 0.0, "cool_down": 0.2, "every": 1},
    "flexlora": {"warm_up": 0.0, "cool_down": 0.0, "every": 2, "decay": "constant"},
}
SCHEDULED = sorted(EARLY_SCHEDULES)


def adapted(method: str) -> Any:
    model = tiny_llama()
    inject(model, method, SETTINGS[method], targets=["q_proj", "v_proj", "up_proj"])
    return model.train()


def rows(step: int) -> Tensor:
    return torch.randint(3, 384, (2, 12), generator=torch.Generator().manual_seed(step))


def loss_of(model: Any, step: int) -> Tensor:
    return model(input_ids=rows(step), labels=rows(step), use_cache=False).loss  # type: ignore[no-any-return]


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained_parameters(model).values(), lr=RATE)


def train(model: Any, optimizer: Any, steps: range, after: Callable[[int], object] = id) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(model, step)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after(step)
    return losses


def same(model: nn.Module, other: nn.Module) -> bool:
    found = own_tensors(other)
    return all(torch.equal(found[name], tensor) for name, tensor in own_tensors(model).items())


@pytest.mark.parametrize("method", SCHEDULED)
def test_a_schedule_acts_in_a_plain_loop_as_in_the_training_loop(method: str) -> None:
    model, other = adapted(method), adapted(method)
    optimizer = optimizer_of(model)
    groups, access = adapter_groups(model), DeepSpeedOptimizerAccess(optimizer=optimizer)
    for step in range(1, STEPS + 1):
        loss_of(model, step).backward()  # type: ignore[no-untyped-call]
        groups[0][0].method_class.before_step(groups[0], TrainProgress(step, STEPS), access)
        optimizer.step()
        groups[0][0].method_class.after_step(groups[0], TrainProgress(step, STEPS), access)
        optimizer.zero_grad()

    followed = optimizer_of(other)
    subspace.follow_schedules(other, followed, steps=STEPS)
    train(other, followed, range(1, STEPS + 1))
    assert same(model, other)

    unfollowed = adapted(method)
    train(unfollowed, optimizer_of(unfollowed), range(1, STEPS + 1))
    assert not same(unfollowed, other)


@pytest.mark.parametrize("method", SCHEDULED)
def test_a_loop_goes_on_from_what_torch_saves(method: str) -> None:
    model = adapted(method)
    optimizer = optimizer_of(model)
    subspace.follow_schedules(model, optimizer, steps=STEPS)
    stored = io.BytesIO()

    def save(step: int) -> None:
        if step == HALF:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stored)

    losses = train(model, optimizer, range(1, STEPS + 1), save)

    stored.seek(0)
    state = torch.load(stored, weights_only=True)
    other = adapted(method)
    resumed = optimizer_of(other)
    subspace.follow_schedules(other, resumed, steps=STEPS)
    train(other, resumed, range(1, 3))  # what is loaded counts, not what was before
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    assert train(other, resumed, range(HALF + 1, STEPS + 1)) == losses[HALF:]
    assert same(model, other)


@pytest.mark.parametrize("method", SCHEDULED)
def test_training_without_a_schedule_is_said_once(method: str, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(method)
    with torch.no_grad():
        loss_of(model, 1)
    loss_of(model.eval(), 1)
    assert not caplog.text
    train(model.train(), optimizer_of(model), range(1, 3))
    assert caplog.text.count(f"method {method} changes with the optimizer's steps") == 1
    assert "subspace.follow_schedules(model, optimizer, steps=...)" in caplog.text
    caplog.clear()
    for other in (adapted(method), adapted("lora")):
        optimizer = optimizer_of(other)
        subspace.follow_schedules(other, optimizer, steps=2)
        train(other, optimizer, range(1, 3))
    assert not caplog.text


def test_an_optimizer_of_other_tensors_is_refused() -> None:
    model = adapted("adalora")
    copies = torch.optim.AdamW([torch.cat([p.detach().flatten() for p in trained_parameters(model).values()])])
    with pytest.raises(UserError, match="the schedule of adalora cannot follow this AdamW"):
        subspace.follow_schedules(model, copies, steps=3)


def test_steps_and_adapters_are_asked_for() -> None:
    model = adapted("adalora")
    with pytest.raises(UserError, match="steps=0"):
        subspace.follow_schedules(model, optimizer_of(model), steps=0)
    with pytest.raises(UserError, match="without adapters"):
        subspace.follow_schedules(tiny_llama(), optimizer_of(model), steps=1)


def test_an_optimizer_without_adams_moments_is_refused_where_they_matter() -> None:
    model = adapted("lora-dash")
    optimizer = torch.optim.SGD(trained_parameters(model).values(), lr=RATE, momentum=0.9)
    subspace.follow_schedules(model, optimizer, steps=STEPS)
    with pytest.raises(UserError, match="SGD begin anew.*momentum_buffer. Take AdamW"):
        train(model, optimizer, range(1, STEPS + 1))


def test_following_again_replaces_the_first() -> None:
    model, other = adapted("adalora"), adapted("adalora")
    for each, times in ((model, 1), (other, 3)):
        optimizer = optimizer_of(each)
        for _ in range(times):
            subspace.follow_schedules(each, optimizer, steps=STEPS)
        train(each, optimizer, range(1, STEPS + 1))
    assert same(model, other)


def test_a_penalty_counts_once_a_step_however_many_passes_it_has() -> None:
    gradients: list[list[Any]] = []
    for passes in (1, 4):
        model = adapted("adalora")
        subspace.follow_schedules(model, optimizer_of(model), steps=STEPS, accumulate=passes)
        for _ in range(passes):
            (loss_of(model, 1) / passes).backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in trained_parameters(model).values()])
    for one, four in zip(*gradients, strict=True):
        assert torch.allclose(one, four, atol=1e-6)
    tapped = adapted("adalora")
    with_penalties(loss_of(tapped, 1), tapped).backward()  # type: ignore[no-untyped-call]
    found: list[Any] = [p.grad for p in trained_parameters(tapped).values()]
    assert all(torch.equal(a, b) for a, b in zip(gradients[0], found, strict=True))


# accelerate


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_accelerate_saves_and_loads_an_adapted_model(tmp_path: Path, method: str) -> None:
    def prepared() -> tuple[Any, Any, Any]:
        model = adapted(method)
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, optimizer_of(model))

    accelerator, model, optimizer = prepared()
    subspace.follow_schedules(model, optimizer, steps=STEPS)
    losses = train(
        model,
        optimizer,
        range(1, STEPS + 1),
        lambda step: step == HALF and accelerator.save_state(str(tmp_path / "at")),
    )
    accelerator.save_model(model, str(tmp_path / "whole"))

    accelerator, other, resumed = prepared()
    subspace.follow_schedules(other, resumed, steps=STEPS)
    accelerator.load_state(str(tmp_path / "at"))
    assert train(other, resumed, range(HALF + 1, STEPS + 1)) == losses[HALF:]
    assert same(model, other)
    third = adapted(method)
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "adapters")
    load_adapter(plain := tiny_llama(), tmp_path / "adapters")
    third.load_state_dict(other.state_dict())
    assert torch.equal(loss_of(plain, 1), loss_of(third.eval(), 1))


# HF Trainer


def trainer(method: str, folder: Path, **settings: Any) -> Any:
    set_seed(1)
    model = adapted(method)
    arguments: dict[str, Any] = {
        "max_steps": STEPS, "save_steps": HALF, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": RATE, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "save_only_model": False, "seed": 1, **settings,
    }  # fmt: skip
    data: Any = [{"input_ids": row, "labels": row} for step in range(16) for row in rows(step)]
    args = TrainingArguments(output_dir=str(folder), **arguments)
    return Trainer(model=model, args=args, train_dataset=data, eval_dataset=data[:2], callbacks=[FollowSchedules()])


def losses_of(training: Any) -> list[float]:
    return [entry["loss"] for entry in training.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", ["adalora", pytest.param("lora-dash", marks=pytest.mark.long)])
def test_hf_trainer_goes_on_from_its_checkpoint_with_equal_losses(tmp_path: Path, method: str) -> None:
    whole = trainer(method, tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{HALF}"
    names = {file.name for file in checkpoint.iterdir()}
    assert {"adapter.json", "adapter.safetensors", "model.safetensors", "optimizer.pt"} <= names
    assert "config.json" not in names
    resumed = trainer(method, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses_of(resumed) == losses_of(whole)  # its log of the first half was loaded, too
    assert len(losses_of(whole)) == STEPS
    assert same(whole.model, resumed.model)

    whole.save_model(str(tmp_path / "final"))
    load_adapter(plain := tiny_llama(), tmp_path / "final")
    assert torch.equal(loss_of(plain, 1), loss_of(whole.model.eval(), 1))


def test_hf_trainer_loads_the_best_model(tmp_path: Path) -> None:
    training = trainer(
        "lora", tmp_path, max_steps=4, save_steps=2, eval_steps=2, eval_strategy="steps", load_best_model_at_end=True,
        learning_rate=10.0,
    )  # fmt: skip
    training.train()
    best = training.state.best_model_checkpoint
    assert best is not None
    load_adapter(plain := tiny_llama(), Path(best))
    assert torch.equal(loss_of(plain, 1), loss_of(training.model.eval(), 1))
