"""Training that begins with adapters that were trained before: their values, their base, and what is refused."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from subspace import config as config_module
from subspace.adapters.serialization import TENSORS
from subspace.errors import UserError
from subspace.models.transformers_compat import unsharded_loading
from subspace.run import train_run
from tests.helpers.material import logged, make_material, saved_adapter
from tests.helpers.tiny_models import tiny_llama

STILL = ("train.steps=1", "train.learning_rate=1e-7", "train.warmup_steps=0")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the material, and a run ``runs/first`` of each method that a test begins with."""
    folder = tmp_path_factory.mktemp("world")
    make_material(folder)
    for method in ("lora", "dora", "pissa"):
        train(folder, method, f"method={method}", "method.r=4", "train.learning_rate=0.05", "train.steps=3")
    return folder


def recipe_of(world: Path) -> Path:
    return next(path for path in world.glob("*.yaml"))


def train(world: Path, name: str, *overrides: str, **options: Any) -> Path:
    given = [f"runs={world / 'runs'}", f"name={name}", "train.warmup_steps=0", *overrides]
    return train_run(config_module.read_config(recipe_of(world), given), **options)


def farthest(one: Path, other: Path) -> float:
    a, b = (load_file(folder / "adapter" / TENSORS) for folder in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
def test_it_begins_where_the_other_ended(world: Path, method: str, stage: int, tmp_path: Path) -> None:
    first, made = world / "runs" / method, [f"runs={tmp_path}", f"method={method}", "method.r=4", *STILL]
    engine = f"engine=ds_configs/zero{stage}.json"
    begun = train(world, "begun", f"train.start_from={first}", engine, *made)
    fresh = train(world, "fresh", engine, *made)
    assert farthest(begun, first) < 1e-6
    assert farthest(fresh, first) > 1e-2
    assert abs(logged(begun)[0] - logged(fresh)[0]) > 1e-3
    assert str(first) in (begun / "config.yaml").read_text()


def test_resumed_it_does_not_begin_again(world: Path, tmp_path: Path) -> None:
    """Nor does it need the other run any more."""
    start = shutil.copytree(world / "runs" / "lora", tmp_path / "start")
    made = [f"runs={tmp_path}", "method=lora", "method.r=4", "train.steps=4", f"train.start_from={start}"]
    whole = train(world, "whole", *made)
    train(world, "parts", *made, until=2)
    shutil.rmtree(start)
    parts = train(world, "parts", *made, resume=True)
    assert farthest(whole, parts) == 0
    assert saved_adapter(parts)


def test_other_settings_are_told(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = world / "runs" / "lora" / "adapter"
    train(world, "told", f"runs={tmp_path}", "method=lora", "method.r=4", "method.alpha=7", f"train.start_from={first}",
          *STILL)  # fmt: skip
    said = "".join(capsys.readouterr())
    assert "begins with the adapter in" in said
    assert "alpha was 32 and is 7" in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.start_from=nowhere"], "no adapter in nowhere"),
        (["method.r=5"], "does not fit this model in"),
        (["method=dora", "method.r=4"], "its method is lora, and this run's dora"),
        (["targets=[q_proj]"], "Give both the same targets"),
        (["model.path=OTHER"], "is another base"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    world: Path, overrides: list[str], said: str, tmp_path: Path
) -> None:
    tiny_llama(tmp_path / "other", seed=5)
    made = [override.replace("OTHER", str(tmp_path / "other")) for override in overrides]
    first = f"train.start_from={world / 'runs' / 'lora'}"
    with pytest.raises(UserError, match=said):
        train(world, "refused", f"runs={tmp_path / 'runs'}", "method=lora", "method.r=4", first, *made)
    assert not (tmp_path / "runs").exists()


def test_a_schedule_begins_anew_and_says_so(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [f"runs={tmp_path}", "method=adalora", "train.steps=2"]
    first = train(world, "first", *made)
    capsys.readouterr()
    train(world, "second", *made, f"train.start_from={first}")
    assert "the schedule of adalora begins anew" in "".join(capsys.readouterr())


def test_a_method_that_has_launched_is_refused(world: Path, tmp_path: Path) -> None:
    dash = ["method=lora-dash", "method.r=4", "method.launch=1", f"runs={tmp_path}", "train.steps=2"]
    first = train(world, "first", *dash)
    with pytest.raises(UserError, match="chooses its directions at a step"):
        train(world, "second", *dash, f"train.start_from={first}")


def test_an_adapter_of_peft(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft", reason="a test requirement: pip install -r tests/requirements.txt")
        model = yaml.safe_load(recipe_of(world).read_text())["model"]["path"]
        from transformers import AutoModelForCausalLM

        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        with unsharded_loading():
            theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        theirs.save_pretrained(tmp_path / "theirs")
    from subspace.integrations.peft.runs import import_run

    monkeypatch.chdir(tmp_path)
    imported = Path(import_run("theirs", [f"model.path={model}"]).folder).absolute()
    made = ["method=lora", "method.r=4", "method.alpha=8", "targets=[q_proj,v_proj]", *STILL]
    begun = train(world, "further", f"runs={tmp_path}", f"train.start_from={imported}", *made)
    assert farthest(begun, imported) < 1e-6
