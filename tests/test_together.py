"""Runs that are trained together: each is what it is alone, whatever the others do."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from subspace.adapters.inject import adapters
from subspace.adapters.multi_adapter import share_weights
from subspace.adapters.registry import list_methods
from subspace.adapters.serialization import load_adapter
from subspace.cli.main import main
from subspace.config import RunConfig, read_config
from subspace.errors import RunFailed, UserError
from subspace.models.loading import open_model
from subspace.run import train_run, train_runs
from subspace.training import loop
from subspace.training.checkpoint import checkpoints
from subspace.training.steps import optimizer_step
from tests.helpers.material import logged, make_material, saved_adapter
from tests.helpers.tiny_models import EARLY_SCHEDULES, tiny_llama

#: One run of each way to share a pass, or not to, with other ranks, rates, seeds and schedules.
COVERING = {
    "lora": ["method=lora", "method.r=4"],
    "lora-o": ["method=lora", "method.r=8", "method.constraint=orthogonal", "method.constraint_weight=0.1"],
    "seed": ["method=lora", "method.r=2", "train.seed=3", "train.learning_rate=0.003", "train.schedule=constant"],
    "dora": ["method=dora", "method.r=4", "train.max_grad_norm=0.1", "targets=[q_proj, up_proj]"],
    "ssb": ["method=ssb", "train.steps=6"],
    "adalora": ["method=adalora", "method.every=3", "train.weight_decay=0.1"],
    "lora-dash": ["method=lora-dash", "method.launch=3", "method.r=4"],
    "prefix": ["method=prefix", "method.n=4"],
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


def configured(material: Path, runs: Path, name: str, *settings: str) -> RunConfig:
    return read_config(material, [f"runs={runs}", f"name={name}", *settings])


def weight_changes(material: Path, folder: Path) -> dict[str, Tensor]:
    """Return what a run's adapters add to each layer; of a method that replaces no weight, its tensors."""
    model = open_model(read_config(material).model)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_adapter(model, folder / "adapter")
    changes: dict[str, Tensor] = {}
    for site, adapter in adapters(model).items():
        if adapter.mergeable:
            merged = {key: value for key, value in adapter.merged().items() if value is not None}
            changes |= {f"{site}.{key}": v - frozen.get(f"{site}.{key}", 0) for key, v in merged.items()}
        else:
            changes |= {f"{site}.{key}": tensor.detach() for key, tensor in adapter.own_tensors().items()}
    return changes


def assert_same(material: Path, one: Path, other: Path) -> None:
    """Check that losses, and what is added to each weight, are equal but for rounding.

    Tensors that are no change of a weight are compared by their norms: AdamW moves an entry whose gradient is about
    zero by a whole step in either direction, as rounding has it.
    """
    losses, others = logged(one), logged(other)
    assert len(losses) == len(others)
    assert losses == pytest.approx(others, rel=1e-5)
    expected, weights = weight_changes(material, other), open_model(read_config(material).model).state_dict()
    for name, change in weight_changes(material, one).items():
        apart = change - expected[name]
        assert apart.abs().max() <= 1e-4 or (name not in weights and apart.norm() <= 1e-4 * expected[name].norm()), name


def test_mixed_runs_are_what_they_are_alone(material: Path, tmp_path: Path) -> None:
    common = ["train.steps=8", "train.micro_batch_size=4", "train.validate_every=4"]
    together, alone = (
        [configured(material, tmp_path / where, name, *common, *own) for name, own in COVERING.items()]
        for where in ("together", "alone")
    )
    train_runs(together)
    for one, other in zip(together, alone, strict=True):
        train_run(other)
        assert_same(material, one.folder, other.folder)
        assert logged(one.folder, "validation_loss") == pytest.approx(logged(other.folder, "validation_loss"), rel=1e-5)
        assert logged(one.folder, "gradient_norm") == pytest.approx(logged(other.folder, "gradient_norm"), rel=1e-4)
        about = json.loads((one.folder / "environment.json").read_text())
        assert about["together"] == list(COVERING)
        assert about["outcome"]["steps"] == (6 if one.name == "ssb" else 8)
        assert 0 < about["share"] < 1
        assert "together" not in json.loads((other.folder / "environment.json").read_text())


@pytest.mark.parametrize(
    ("base", "losses", "tensors"),
    [("model.quantize=nf4", 1e-5, 1e-3), ("model.quantize=int8", 1e-5, 1e-3), ("model.dtype=bfloat16", 1e-2, 5e-2)],
)
def test_runs_share_a_base_of_fewer_bits(
    material: Path, tmp_path: Path, base: str, losses: float, tensors: float
) -> None:
    """In bfloat16 a product over more rows may round otherwise."""
    chosen = [(name, COVERING[name]) for name in ("lora", "seed", "dora", "prefix")]
    together, alone = (
        [configured(material, tmp_path / where, name, base, "train.steps=5", *own) for name, own in chosen]
        for where in ("together", "alone")
    )
    train_runs(together)
    for one, other in zip(together, alone, strict=True):
        train_run(other)
        assert logged(one.folder) == pytest.approx(logged(other.folder), rel=losses)
        expected = saved_adapter(other.folder)
        for name, tensor in saved_adapter(one.folder).items():
            assert (tensor - expected[name]).norm() < tensors * expected[name].norm(), name


def test_runs_go_on_together_and_alone(material: Path, tmp_path: Path) -> None:
    chosen = {name: COVERING[name] for name in ("lora", "seed", "ssb")}
    # Their folders have the same name, as a study's have.
    configs = [configured(material, tmp_path / name, "0", "train.steps=9", *own) for name, own in chosen.items()]
    train_runs(configs, until=3)
    train_run(configs[2], resume=True, until=5)  # so that they are not at the same step
    train_runs(configs[1:], resume=True, until=6)
    train_runs(configs, resume=True)
    for config, (name, own) in zip(configs, chosen.items(), strict=True):
        undisturbed = train_run(configured(material, tmp_path / "alone", name, "train.steps=9", *own))
        assert_same(material, config.folder, undisturbed)


def test_a_run_that_diverges_does_not_end_the_others(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(engine: Any) -> Any:
        norm, found = optimizer_step(engine), adapters(engine.module).values()
        for adapter in found:
            if adapter.name == "ssb" and engine.global_steps == 3:
                adapter.get_parameter("l").data.fill_(math.nan)
        return norm

    monkeypatch.setattr(loop, "optimizer_step", spoil)
    bad = configured(material, tmp_path, "bad", "method=ssb")
    good, fine = (configured(material, tmp_path, name, *COVERING[name]) for name in ("lora", "dora"))
    with pytest.raises(RunFailed, match=r"1 of 3 runs failed.*bad: step 4: the loss is nan; \S+ holds a value"):
        train_runs([good, bad, fine])
    assert "step" in json.loads((bad.folder / "environment.json").read_text())["failure"]
    assert not (bad.folder / "adapter").exists()
    for config in (good, fine):
        undisturbed = train_run(configured(material, tmp_path / "alone", config.name, *COVERING[config.name]))
        assert_same(material, config.folder, undisturbed)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["method.dropout=0.1"], "dropout=0.1, whose random numbers"),
        (["method=full"], "method full changes the base"),
        (["train.batch_size=4"], "train.batch_size: 4 and 8"),
        (["data.max_length=32"], "data.max_length is 32 and 64"),
        (["model.dtype=bfloat16"], "model.dtype is bfloat16 and float32"),
        (["train.trackers=[wandb]"], "wandb"),
        (["name=a"], "have the folder"),
    ],
)
def test_what_cannot_be_shared_is_refused(material: Path, tmp_path: Path, settings: list[str], said: str) -> None:
    first = configured(material, tmp_path, "a")
    with pytest.raises(UserError, match=said):
        train_runs([first, configured(material, tmp_path, "b", *settings)])
    assert not list(tmp_path.iterdir())


def test_sharded_bases_are_refused(material: Path, tmp_path: Path) -> None:
    stage3 = f"engine={material.parent / 'zero3.json'}"
    with pytest.raises(UserError, match=r"ZeRO stage 3.*zero1.json"):
        train_runs([configured(material, tmp_path, name, stage3) for name in "ab"])


def test_the_command_takes_several_files(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for name in "ab":
        files.append(str(tmp_path / f"{name}.yaml"))
        Path(files[-1]).write_text(f"base: {material}\nname: {name}\ntrain: {{seed: 1}}\n")
    arguments = ["train", *files, f"runs={tmp_path / 'runs'}", "train.steps=4"]
    assert main([*arguments, "--dry-run"]) == 0
    assert f"{files[0]} {files[1]} runs=" in capsys.readouterr().out
    assert main([*arguments, "--until", "2"]) == 0
    assert len(checkpoints(tmp_path / "runs" / "a")) == 1
    assert main([*arguments, "--resume", "--json"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(Path(one["run"]).name, one["steps"]) for one in said] == [("a", 4), ("b", 4)]
    assert main([*arguments, "--resume"]) == 0
    assert "nothing left to train" in capsys.readouterr().err


def test_a_twin_shares_tensors_and_nothing_else() -> None:
    model = tiny_llama()
    twin = share_weights(model)
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert not {id(module) for module in model.modules()} & {id(module) for module in twin.modules()}


PAIRED = sorted(set(list_methods()) - {"full"})


@pytest.fixture(scope="module")
def alone(material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every method's run by itself."""
    runs = tmp_path_factory.mktemp("alone")
    return {name: train_run(configured(material, runs, name, *of_method(name))) for name in PAIRED}


def of_method(name: str) -> list[str]:
    own = [f"method.{key}={value}" for key, value in EARLY_SCHEDULES.get(name, {}).items()]
    return [f"method={name}", "train.steps=20", "train.save_every=0", *own]


@pytest.mark.long
@pytest.mark.parametrize("name", PAIRED)
def test_every_pair_of_methods(name: str, material: Path, alone: dict[str, Path], tmp_path: Path) -> None:
    for other in PAIRED[PAIRED.index(name) :]:
        configs = [
            configured(material, tmp_path / other, f"{number}-{method}", *of_method(method))
            for number, method in enumerate((name, other))
        ]
        train_runs(configs)
        for config, method in zip(configs, (name, other), strict=True):
            assert_same(material, config.folder, alone[method])


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_processes(stage: int, material: Path, tmp_path: Path) -> None:
    files = []
    for name in ("lora", "ssb", "seed"):
        files.append(str(tmp_path / f"{name}.yaml"))
        settings = dict(setting.split("=", 1) for setting in COVERING[name])
        nested = "".join(
            f"{section}: {{{', '.join(f'{k}: {v}' for k, v in group)}}}\n"
            for section, group in (
                (section, [(k.partition(".")[2], settings[k]) for k in keys])
                for section, keys in itertools.groupby(
                    sorted(k for k in settings if "." in k), lambda k: k.split(".")[0]
                )
                if section == "train"
            )
        )
        method = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith("method.")}
        described = ", ".join(f"{k}: {v}" for k, v in {"name": settings["method"], **method}.items())
        Path(files[-1]).write_text(f"base: {material}\nname: {name}\nmethod: {{{described}}}\n{nested}")
    common = [f"engine={material.parent / f'zero{stage}.json'}", "train.micro_batch_size=2"]
    assert main(["train", *files, f"runs={tmp_path / 'two'}", *common, "--processes", "2"]) == 0
    for name in ("lora", "ssb", "seed"):
        one = train_run(configured(material, tmp_path / "one", name, *COVERING[name]))
        assert logged(tmp_path / "two" / name) == pytest.approx(logged(one), rel=1e-4)
        for key, tensor in saved_adapter(one).items():
            assert torch.allclose(tensor, saved_adapter(tmp_path / "two" / name)[key], atol=1e-3), key
