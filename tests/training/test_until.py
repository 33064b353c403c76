"""A run that pauses at a step, ``subspace train --until``, goes on as the run that never paused, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from subspace import config as config_module
from subspace.adapters.serialization import TENSORS
from subspace.cli.main import main
from subspace.resumption import is_finished
from subspace.run import train_run
from subspace.training.checkpoint import checkpoint_path, checkpoints
from tests.helpers.material import logged, make_material

#: With a schedule that depends on the run's length, and more than one epoch.
SETTINGS = ["train.steps=9", "train.schedule=cosine", "method.dropout=0.1", "train.save_every=0"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"), rows=24)


def overrides(runs: Path, name: str, *more: str) -> list[str]:
    return [f"runs={runs}", f"name={name}", *SETTINGS, *more]


def test_a_run_that_pauses_twice_is_the_run_that_never_paused(material: Path, tmp_path: Path) -> None:
    every = "train.validate_every=3"
    whole = train_run(config_module.read_config(material, overrides(tmp_path, "whole", every)))
    config = config_module.read_config(material, overrides(tmp_path, "paused", every))
    for step in (2, 5):
        folder = train_run(config, resume=True, until=step)
        assert not is_finished(config)
        assert not (folder / "adapter").exists()
        assert checkpoints(folder)[-1] == checkpoint_path(folder, step)
        assert logged(folder) == logged(whole)[:step]
    assert train_run(config, resume=True, until=9) == folder
    assert is_finished(config)
    assert (whole / "adapter" / TENSORS).read_bytes() == (folder / "adapter" / TENSORS).read_bytes()
    for key in ("step", "loss", "learning_rate", "gradient_norm", "validation_loss"):
        assert logged(whole, key) == logged(folder, key)


def test_a_run_that_is_past_the_step_stays_where_it_is(material: Path, tmp_path: Path) -> None:
    config = config_module.read_config(material, overrides(tmp_path, "past"))
    folder = train_run(config, until=4)
    train_run(config, resume=True, until=2)
    assert [path.name for path in checkpoints(folder)] == [checkpoint_path(folder, 4).name]
    assert len(logged(folder)) == 4


def test_the_command_says_that_it_paused(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["train", str(material), *overrides(tmp_path, "said"), "--until", "3"]
    assert main(given) == 0
    assert "paused" in (said := capsys.readouterr().out)
    assert "step 3" in said
    assert main([*given, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["paused"] == 3
