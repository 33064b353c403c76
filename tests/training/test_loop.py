"""The loop in one process: what a step's loss is, what stops a run, and what it leaves behind."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from subspace import config as config_module
from subspace.adapters.base import Adapter
from subspace.adapters.inject import adapters, inject, parameter_roles, trained_parameters
from subspace.adapters.serialization import TENSORS, load_adapter, save_adapter
from subspace.common.paths import REPOSITORY
from subspace.data import samples as samples_module
from subspace.data.collate import IGNORE_INDEX
from subspace.distributed.zero import gathered
from subspace.errors import RunFailed, UserError
from subspace.methods.adalora import AdaLoRA
from subspace.methods.lora import LoRA
from subspace.models.lm_head import summed_loss
from subspace.models.loading import open_model
from subspace.resolve import resolve_run
from subspace.resumption import open_run_data
from subspace.run import train_run
from subspace.training.checkpoint import checkpoints
from subspace.training.config import TrainConfig
from subspace.training.health_checks import TrainingHealthCheck, checksum
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess
from subspace.training.optimizers import lr_factor, parameter_groups
from tests.helpers.items import items
from tests.helpers.material import STAGES, logged, make_material, saved_adapter
from tests.helpers.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


def train(material: Path, runs: Path, name: str, *overrides: str) -> Path:
    return train_run(config_module.read_config(material, [f"runs={runs}", f"name={name}", *overrides]))


def test_micro_batches_give_the_loss_and_the_adapter_of_one_batch(material: Path, tmp_path: Path) -> None:
    whole = train(material, tmp_path, "whole")
    parts = train(material, tmp_path, "parts", "train.micro_batch_size=2")
    assert torch.allclose(torch.tensor(logged(whole)), torch.tensor(logged(parts)), atol=1e-5)
    assert logged(whole)[-1] < logged(whole)[0] - 0.1
    for name, tensor in saved_adapter(whole).items():
        assert torch.allclose(tensor, saved_adapter(parts)[name], atol=1e-4)


def test_loss_is_the_mean_over_the_labelled_tokens() -> None:
    model = tiny_llama()
    ids = torch.tensor([[5, 9, 33, 7, 120, 1, 1], [8, 8, 250, 31, 2, 90, 4]])
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, 3:5], labels[1, 4:7] = ids[0, 3:5], ids[1, 4:7]
    mask = torch.tensor([[1] * 5 + [0] * 2, [1] * 7])
    found = summed_loss(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    logs = torch.log_softmax(model(ids, attention_mask=mask).logits, -1)
    expected = -sum(logs[row, i - 1, ids[row, i]] for row, at in ((0, (3, 4)), (1, (4, 5, 6))) for i in at)
    assert torch.allclose(found, torch.as_tensor(expected), atol=1e-4)


def test_same_seed_same_run(material: Path, tmp_path: Path) -> None:
    a, b = (train(material, tmp_path, name, "method.dropout=0.1") for name in "ab")
    assert logged(a) == logged(b)
    assert all(torch.equal(tensor, saved_adapter(b)[name]) for name, tensor in saved_adapter(a).items())
    assert logged(train(material, tmp_path, "c", "method.dropout=0.1", "train.seed=1")) != logged(a)


def test_run_folder(material: Path, tmp_path: Path) -> None:
    folder = train(material, tmp_path, "run", "train.trackers=[tensorboard]", "train.save_every=2")
    about = json.loads((folder / "environment.json").read_text())
    assert about["adapters"]["trained"] == sum(tensor.numel() for tensor in saved_adapter(folder).values())
    assert len(about["adapters"]["sites"]) == 10
    assert about["outcome"]["steps"] == 6
    assert about["outcome"]["loss"] == logged(folder)[-1]
    assert list((folder / "tensorboard").glob("events*"))
    assert [path.name for path in checkpoints(folder)] == ["step-000004", "step-000006"]
    again = config_module.read_config(folder / "config.yaml", [])
    assert again.train.steps == 6
    assert again.method[0].settings.r == 4  # type: ignore[attr-defined]


def test_rows_that_hold_test_items_are_told(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = items("openbookqa", 3)
    made[1]["question"] = json.loads((material.parent / "data.jsonl").read_text().splitlines()[0])["instruction"]
    monkeypatch.setattr(samples_module, "task_items", lambda name, split: datasets.Dataset.from_list(made))
    folder = train(material, tmp_path, "seen", "train.steps=1")
    (told,) = json.loads((folder / "environment.json").read_text())["data"]["seen"]
    assert "data.jsonl holds 1 of 3 items of openbookqa, too many" in told
    assert "holds 1 of 3 items" in " ".join(capsys.readouterr().err.split())


def test_several_methods_train_in_one_run(material: Path, tmp_path: Path) -> None:
    parts = """method:
- {name: rslora, r: 4, targets: [q_proj, v_proj], patterns: {'layers\\.0\\..*': {r: 2}}}
- {name: ssb, targets: [up_proj]}
"""
    several = tmp_path / "several.yaml"
    several.write_text(material.read_text().replace("method: {name: lora, r: 4}\n", parts))
    folder = train(several, tmp_path, "several")
    about = json.loads((folder / "environment.json").read_text())["adapters"]
    # q (64, 64) and v (32, 64) at rank 2 in the first layer and 4 in the second; up (128, 64) in both.
    assert about["methods"] == [
        {
            "method": "lora",
            "sites": 4,
            "trained": (2 + 4) * (64 + 64 + 32 + 64),
            "reach": "over 17% of the decoder's weights (not mlp.gate_proj, mlp.up_proj, mlp.down_proj, "
            "self_attn.o_proj and others)",
        },
        {
            "method": "ssb",
            "sites": 2,
            "trained": 2 * (128 + 64),
            "reach": "over 22% of the decoder's weights (not mlp.gate_proj, mlp.down_proj, self_attn.q_proj, "
            "self_attn.o_proj and others)",
        },
    ]
    assert about["trained"] == sum(tensor.numel() for tensor in saved_adapter(folder).values())
    assert logged(folder)[-1] < logged(folder)[0]
    again = config_module.read_config(folder / "config.yaml")
    assert again.method == config_module.read_config(several).method
    description = load_adapter(tiny_llama(), folder / "adapter")
    assert {part["method"] for part in description["adapters"]} == {"lora", "ssb"}


def test_a_run_is_not_overwritten(material: Path, tmp_path: Path) -> None:
    train(material, tmp_path, "once")
    with pytest.raises(UserError, match="already holds a run. Give this one another name"):
        train(material, tmp_path, "once")


def test_nan_stops_the_run_and_names_the_tensor(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def spoiled(cls: type[Adapter], group: list[Adapter], clock: Any, access: Any) -> None:
        nonlocal calls
        calls += 1
        if clock.step == 3:
            next(iter(group[0].trained().values())).data.fill_(math.nan)

    monkeypatch.setattr(LoRA, "after_step", classmethod(spoiled))
    with pytest.raises(RunFailed, match=r"step 4: the loss is nan; \S+q_proj\.A holds a value .*step-000002"):
        train(material, tmp_path, "nan", "train.save_every=2")
    assert calls == 3
    assert not (tmp_path / "nan" / "adapter").exists()
    last = load_file(checkpoints(tmp_path / "nan")[-1] / "adapter" / TENSORS)
    assert all(torch.isfinite(tensor).all() for tensor in last.values())


def spoil_weight(monkeypatch: pytest.MonkeyPatch, name: str, index: Any, value: float) -> None:
    """Let models be opened with some values of a frozen weight not finite, or too large."""
    real = open_model

    def opened(*arguments: Any, **more: Any) -> Any:
        model = real(*arguments, **more)
        parameter = model.get_parameter(name)
        with gathered([parameter], modified_by_main=True), torch.no_grad():
            parameter[index] = value
        return model

    monkeypatch.setattr("subspace.run.open_model", opened)


WEIGHTS = {
    "model.layers.1.mlp.down_proj.weight": (3, 5),
    "model.layers.0.self_attn.q_proj.weight": (0, 0),  # inside an adapter
    "model.norm.weight": (7,),
    "model.embed_tokens.weight": (slice(None), 2),
}


@pytest.mark.parametrize(("weight", "stage"), [*((weight, 0) for weight in WEIGHTS), (next(iter(WEIGHTS)), 3)])
def test_a_frozen_weight_that_is_not_finite_is_named(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str, stage: int
) -> None:
    spoil_weight(monkeypatch, weight, WEIGHTS[weight], math.nan)
    told = rf"step 1: the loss is nan; the frozen {re.escape(weight)} holds [1-9]\d* of [\d,]+ values that are not"
    with pytest.raises(RunFailed, match=told):
        train(material, tmp_path, "nan", f"engine={material.parent / f'zero{stage}.json'}")


@pytest.fixture(scope="module")
def rare(material: Path) -> Path:
    """Material in which every row has a token of its own."""
    rows = [json.loads(line) for line in (material.parent / "data.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["instruction"] += f" {chr(0x4E00 + number)}"
    (material.parent / "rare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (material.parent / "rare.yaml").write_text(material.read_text().replace("data.jsonl", "rare.jsonl"))
    return material.parent / "rare.yaml"


def rare_token(material: Path, step: int) -> tuple[int, str]:
    """Return a token that no step has before this one, and where its row is."""
    data, plan = open_run_data(resolve_run(config_module.read_config(material), 1, torch.device("cpu")))
    seen = {token for earlier in range(step - 1) for row in plan[earlier] for token in data.train[row].input_ids}
    row = plan[step - 1][3]
    return (set(data.train[row].input_ids) - seen).pop(), data.where(row)


@pytest.mark.parametrize(("stage", "every"), [(0, 1), (3, 10)])
def test_the_first_layer_and_the_row_that_make_a_loss_infinite_are_named(
    rare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, every: int
) -> None:
    """All weights are finite. What is embedded for one token is so large that a norm gives 0, and this MLP divides."""
    forward: Callable[[Any, Tensor], Tensor] = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) + 0 / x.abs().amax(-1, keepdim=True))
    token, where = rare_token(rare, step=3)
    spoil_weight(monkeypatch, "model.embed_tokens.weight", (token, 1), 3e38)
    late = ", which was found a few steps later" if every > 1 else ""
    layer = re.escape("the output of the frozen model.layers.0.mlp is the first that is not finite")
    told = f"step 3: the loss is nan{late}; {layer}, for {re.escape(where)}[.]"
    settings = [f"train.log_every={every}", f"engine={rare.parent / f'zero{stage}.json'}"]
    with pytest.raises(RunFailed, match=told):
        train(rare, tmp_path, "infinite", *settings)


@pytest.mark.parametrize("every", [1, 10])
def test_an_adapter_whose_output_is_not_finite_is_named(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Some steps later it has spoilt all adapters: then the rows are named, and what finds the rest."""
    forward, steps = LoRA.forward, [0]

    def spoiled(self: LoRA, x: Tensor) -> Tensor:
        return forward(self, x) + (math.inf if self.out_features == 128 and steps[0] == 2 else 0)

    def count(cls: type[Adapter], group: list[Adapter], clock: Any, access: Any) -> None:
        steps[0] = clock.step

    monkeypatch.setattr(LoRA, "forward", spoiled)
    monkeypatch.setattr(LoRA, "after_step", classmethod(count))
    told = r"the output of method lora at model\.layers\.0\.mlp\.up_proj is the first that is not .*, for \S+, line"
    if every > 1:
        told = r", which was found a few steps later; its rows are \S+, line \d+; .* and 4 more[.] .*log_every=1"
    with pytest.raises(RunFailed, match=rf"step 3: the loss is (nan|inf).*{told}"):
        train(material, tmp_path, "spoiled", f"train.log_every={every}")


@pytest.fixture(scope="module")
def engines(material: Path) -> dict[str, str]:
    """Return the engine files by name: each stage, and the optimizer in CPU memory, as in the file for one GPU."""
    files = {f"zero{stage}": str(material.parent / f"zero{stage}.json") for stage in STAGES}
    one = json.loads((REPOSITORY / "ds_configs" / "one-24gb.json").read_text())
    one["zero_optimization"]["offload_optimizer"]["pin_memory"] = False  # there is no device to pin it for
    for stage in (2, 3):
        one["zero_optimization"]["stage"] = stage
        path = material.parent / f"one-24gb-{stage}.json"
        path.write_text(json.dumps(one))
        files[path.stem] = str(path)
    return files


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("engine", [*(f"zero{stage}" for stage in STAGES), "one-24gb-2", "one-24gb-3"])
def test_a_gradient_that_is_not_finite_stops_the_run_at_its_step(
    material: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engines: dict[str, str],
    engine: str,
    accumulated: bool,
) -> None:
    forward = LoRA.forward
    spoil: list[bool] = []

    def sometimes_spoiled(self: LoRA, x: Tensor) -> Tensor:
        # The root of zero is zero, and its slope is infinite.
        return forward(self, x) + (torch.sqrt((0 * self.B).sum()) if spoil else 0)

    def soon(cls: type[Adapter], group: list[Adapter], clock: Any, access: Any) -> None:
        spoil.extend([True] if clock.step == 3 else [])

    monkeypatch.setattr(LoRA, "forward", sometimes_spoiled)
    monkeypatch.setattr(LoRA, "after_step", classmethod(soon))
    settings = [f"train.micro_batch_size={4 if accumulated else 8}", "train.save_every=2", f"engine={engines[engine]}"]
    with pytest.raises(
        RunFailed, match=r"step 4: a gradient is not finite; the gradient of \S+q_proj\.B .*step-000002"
    ):
        train(material, tmp_path, "spoiled", *settings)
    assert logged(tmp_path / "spoiled", "step") == [1, 2, 3]


@pytest.mark.parametrize("stage", STAGES)
def test_a_schedule_asks_for_all_gradients_at_once(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """AdaLoRA needs three small gradients at each of 14 sites; one after the other, each is a collective."""
    calls: list[str] = []
    per_step: list[int] = []
    scheduled = AdaLoRA.before_step.__func__  # type: ignore[attr-defined]

    def count(name: str) -> None:
        real = getattr(torch.distributed, name)

        def counted(*arguments: Any, **more: Any) -> Any:
            calls.append(name)
            return real(*arguments, **more)

        monkeypatch.setattr(torch.distributed, name, counted)

    for name in ("all_reduce", "all_gather_into_tensor"):
        count(name)

    def before_step(cls: type[AdaLoRA], *arguments: Any) -> None:
        calls.clear()
        scheduled(cls, *arguments)
        per_step.append(len(calls))

    monkeypatch.setattr(AdaLoRA, "before_step", classmethod(before_step))
    train(material, tmp_path, "run", "method=adalora", f"engine={material.parent / f'zero{stage}.json'}")
    assert len(per_step) == 6
    assert max(per_step) <= 1


def spoil_one_gradient(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let the gradients of one step be infinite, though its loss is not."""
    forward, bad = LoRA.forward, [False]

    def spoiled(self: LoRA, x: Tensor) -> Tensor:
        # The root of zero is zero, and its slope is infinite.
        return forward(self, x) + (torch.sqrt((0 * self.B).sum()) if bad[0] and self.training else 0)

    def look_at_the_clock(cls: type[Adapter], group: list[Adapter], clock: Any, access: Any) -> None:
        bad[0] = clock.step == at - 1

    monkeypatch.setattr(LoRA, "forward", spoiled)
    monkeypatch.setattr(LoRA, "after_step", classmethod(look_at_the_clock))


#: A bad step 13 is found at step 15, before its checkpoint, or at step 14, before its validation.
RARE = ("train.steps=20", "train.log_every=10", "train.save_every=5")


@pytest.mark.parametrize(
    ("stage", "more"), [*((stage, ()) for stage in STAGES), (0, ("train.validate_every=7", "train.save_final=best"))]
)
def test_a_bad_step_that_nobody_looked_at_spoils_nothing_that_is_kept(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, more: tuple[str, ...]
) -> None:
    spoil_one_gradient(monkeypatch, at=13)
    told = r"step 13: a gradient is not finite, .* checkpoint is \S+step-000010; nothing was saved from that step on"
    with pytest.raises(RunFailed, match=told):
        train(material, tmp_path, "spoiled", *RARE, *more, f"engine={material.parent / f'zero{stage}.json'}")
    assert [path.name for path in checkpoints(tmp_path / "spoiled")][-1] == "step-000010"
    last = load_file(checkpoints(tmp_path / "spoiled")[-1] / "adapter" / TENSORS)
    assert all(torch.isfinite(tensor).all() for tensor in last.values())
    assert not (tmp_path / "spoiled" / "adapter").exists()
    assert logged(tmp_path / "spoiled", "loss")[1:] == logged(tmp_path / "spoiled", "loss")[1:2]  # steps 1 and 10
    assert all(math.isfinite(loss) for loss in logged(tmp_path / "spoiled", "validation_loss"))
    assert not prefetching()


def test_a_bad_step_is_told_of_where_a_schedule_fails_on_it(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_one_gradient(monkeypatch, at=13)
    look_at_the_clock = LoRA.after_step

    def decompose(cls: type[Adapter], group: list[Adapter], clock: Any, access: Any) -> None:
        look_at_the_clock(group, clock, access)  # type: ignore[arg-type]
        torch.linalg.svd(next(iter(group[0].trained().values())).detach())

    monkeypatch.setattr(LoRA, "after_step", classmethod(decompose))
    with pytest.raises(RunFailed, match=r"step 13: a gradient is not finite") as failed:
        train(material, tmp_path, "decomposed", *RARE)
    assert "linalg.svd" in str(failed.value.__cause__)
    assert not prefetching()  # though the error still holds the loop's frame


def test_a_step_that_the_engine_skips_stops_the_run_but_in_float16(tmp_path: Path) -> None:
    """Of gradients on NVMe DeepSpeed alone knows that one is not finite."""
    model = tiny_llama()
    inject(model, "lora", {"r": 4})
    health = TrainingHealthCheck(model, DeepSpeedOptimizerAccess(), folder=tmp_path)
    engine = SimpleNamespace(was_step_applied=lambda: False, fp16_enabled=lambda: False, skipped_steps=1)
    with pytest.raises(RunFailed, match=r"step 7: a gradient is not finite. The step was not taken. No checkpoint"):
        health.check_updated(7, engine)
    engine.fp16_enabled = lambda: True
    health.check_updated(7, engine)


def test_what_is_logged_is_the_same_however_seldom_it_is_read(material: Path, tmp_path: Path) -> None:
    often, seldom = (
        train(material, tmp_path, name, "train.steps=12", "train.save_every=0", f"train.log_every={every}")
        for name, every in (("often", 1), ("seldom", 5))
    )
    for key in ("loss", "gradient_norm", "learning_rate"):
        of_all = logged(often, key)
        assert logged(seldom, key) == [of_all[step - 1] for step in (1, 5, 10, 12)]
    ends = [json.loads((folder / "environment.json").read_text())["outcome"]["loss"] for folder in (often, seldom)]
    assert ends[0] == ends[1]
    assert all(torch.equal(tensor, saved_adapter(seldom)[name]) for name, tensor in saved_adapter(often).items())
    assert not prefetching()


def test_rows_are_read_without_touching_the_random_state_of_training(material: Path) -> None:
    data = open_run_data(resolve_run(config_module.read_config(material), 1, torch.device("cpu")))[0]
    before = torch.get_rng_state()
    batch = data.batch([3, 1, 2])
    assert torch.equal(torch.get_rng_state(), before)
    assert batch.num_tokens == int(batch.attention_mask.sum()) == int(data.train.lengths[[3, 1, 2]].sum())
    assert batch.num_labelled == int(data.train.answers[[3, 1, 2]].sum())


def prefetching() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("section", [{"initial_scale_power": 1}, {"loss_scale": 8}], ids=["dynamic", "static"])
def test_a_loss_scale_that_never_recovers_is_told(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: dict[str, int]
) -> None:
    forward = LoRA.forward
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)  # slow on a CPU, but right
    monkeypatch.setattr(LoRA, "forward", lambda self, x: forward(self, x) + torch.sqrt((0 * self.B).sum()))
    (tmp_path / "engine.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": section}))
    settings = ["model.dtype=float16", f"engine={tmp_path / 'engine.json'}", "train.steps=80", "train.batch_size=2"]
    with pytest.raises(
        RunFailed, match=r"overflow float16 at every loss scale, \d+ steps in a row .*; the gradient of \S+ is not"
    ):
        train(material, tmp_path, "overflows", *settings)
    assert len(logged(tmp_path / "overflows")) <= 50


def test_a_file_that_holds_the_start_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    inject(model, "lora", {"r": 4})
    learning = TrainingHealthCheck(model, DeepSpeedOptimizerAccess())
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(RunFailed, match="holds the values that training began with"):
        learning.check_file(tmp_path / "adapter")
    next(iter(trained_parameters(model).values())).data.add_(1)
    save_adapter(model, tmp_path / "adapter")
    learning.check_file(tmp_path / "adapter")


def test_a_tensor_may_move_late_where_its_method_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    inject(model, "lora", {"r": 4})
    for name, parameter in trained_parameters(model).items():
        parameter.data.add_(1 if name.endswith(".A") else 0)
    moved = {name: checksum(parameter - 1) for name, parameter in trained_parameters(model).items()}
    still = {name: checksum(parameter) for name, parameter in trained_parameters(model).items()}
    start = {name: (moved if name.endswith(".A") else still)[name] for name in moved}
    with pytest.raises(RunFailed, match=r"10 of 20 trained tensors have not moved, first \S+\.B"):
        TrainingHealthCheck(model, DeepSpeedOptimizerAccess(), start).check_changed(2)
    monkeypatch.setattr(LoRA, "delayed_grad_params", frozenset({"B"}))
    TrainingHealthCheck(model, DeepSpeedOptimizerAccess(), start).check_changed(2)


def test_a_tensor_that_does_not_learn_stops_the_run(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(self: LoRA, x: Tensor) -> Tensor:
        return self.frozen(x) + (x @ self.A.T) @ (0 * self.B.T)

    monkeypatch.setattr(LoRA, "forward", cut)
    with pytest.raises(RunFailed, match=r"after 2 steps 20 of 20 trained tensors have not moved"):
        train(material, tmp_path, "cut")


def test_tensors_that_the_loss_does_not_reach_are_named_after_the_first_backward_pass(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(self: LoRA, x: Tensor) -> Tensor:
        return self.frozen(x) + (x @ self.A.T) @ self.B.detach().T

    monkeypatch.setattr(LoRA, "forward", cut)
    words = (
        r"after the first backward pass 10 of 20 trained tensors have no gradient, first \S+\.B: .* out of `targets`"
    )
    with pytest.raises(RunFailed, match=words):
        train(material, tmp_path, "unreached")


def test_learning_rate_of_zero_is_noticed(material: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="Is the learning rate zero"):
        train(material, tmp_path, "still", "train.learning_rate=0")


def test_best_checkpoint_and_early_stop(material: Path, tmp_path: Path) -> None:
    # A learning rate so high that losses go up as often as down: patience ends the run.
    folder = train(
        material, tmp_path, "best", "train.steps=90", "train.learning_rate=30", "train.schedule=constant",
        "train.validate_every=1", "train.patience=3", "train.save_final=best", "train.max_grad_norm=0",
    )  # fmt: skip
    losses = logged(folder, "validation_loss")
    outcome = json.loads((folder / "environment.json").read_text())["outcome"]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3 < 90
    assert outcome["best_step"] == best + 1
    about = json.loads((folder / "adapter" / "adapter.json").read_text())["about"]
    assert about["step"] == best + 1
    assert about["validation"] == min(losses)


def test_validation_is_the_mean_over_all_held_out_tokens(material: Path, tmp_path: Path) -> None:
    one = train(material, tmp_path, "one", "train.validate_every=3")
    two = train(material, tmp_path, "two", "train.validate_every=3", "train.micro_batch_size=2")
    assert logged(one, "validation_loss") == pytest.approx(logged(two, "validation_loss"), abs=1e-5)
    assert len(logged(one, "validation_loss")) == 2


@pytest.mark.parametrize("method", ["dora", "ssb", "houlsby", "prefix", "adalora"])
def test_only_factors_decay_and_up_factors_learn_faster(method: str) -> None:
    model = tiny_llama()
    inject(model, method)
    config = TrainConfig(learning_rate=1e-3, weight_decay=0.1, lora_plus_lr_ratio=16.0)
    of = {id(trained_parameters(model)[name]): role for name, role in parameter_roles(model).items()}
    seen = 0
    for group in parameter_groups(model, config):
        for parameter in group["params"]:
            role = of[id(parameter)]
            assert group["weight_decay"] == (0.1 if role in ("down", "up", "core") else 0.0)
            assert group["lr"] == pytest.approx(16e-3 if role == "up" else 1e-3)
            seen += 1
    assert seen == sum(len(a.trained()) for a in adapters(model).values())


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.5, 0.0]),
        ("cosine", [0.5, 1.0, 1.0, 0.5, 0.0]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules(schedule: str, factors: list[float]) -> None:
    config = TrainConfig(schedule=schedule, warmup_steps=2)
    assert [lr_factor(config, step, 10) for step in (0, 1, 2, 6, 10)] == pytest.approx(factors)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_learn_much_as_thirty_two(material: Path, tmp_path: Path, dtype: str) -> None:
    # A loss scale that nothing overflows at: steps would be skipped.
    unskipped = {"zero_optimization": {"stage": 1}, "fp16": {"enabled": "auto", "initial_scale_power": 8}}
    (tmp_path / "engine.json").write_text(json.dumps(unskipped))
    settings = ["train.steps=12", f"engine={tmp_path / 'engine.json'}"]
    exact = train(material, tmp_path, "exact", *settings)
    if dtype == "float16" and not get_accelerator().is_fp16_supported():
        with pytest.raises(UserError, match="this device cannot compute in"):
            train(material, tmp_path, "rounded", *settings, "model.dtype=float16")
        return
    rounded = train(material, tmp_path, "rounded", *settings, f"model.dtype={dtype}")
    assert logged(exact)[-1] < logged(exact)[0] - 0.3
    assert logged(rounded)[-1] == pytest.approx(logged(exact)[-1], abs=0.15)
    assert {tensor.dtype for tensor in saved_adapter(rounded).values()} == {torch.float32}
