"""A run goes on with the base that it began with: by bytes, from whatever path; and with no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from subspace import config as config_module
from subspace.adapters.serialization import SETTINGS
from subspace.errors import UserError
from subspace.evaluation.subjects import evaluate_subjects
from subspace.resumption import is_finished
from subspace.run import train_run
from subspace.training.checkpoint import begin_checkpoint, checkpoints, finish_checkpoint
from tests.helpers.adapter_files import unseal
from tests.helpers.material import logged, make_material, saved_adapter
from tests.helpers.tiny_models import bpe_tokenizer, tiny_llama

SETTINGS_OF_RUN = ["train.steps=4", "train.save_every=1", "train.keep_checkpoints=9"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run's folder, beside which its material lies."""
    root = tmp_path_factory.mktemp("bound")
    material = make_material(root, rows=24)
    return train_run(config_module.read_config(material, [f"runs={root}/runs", "name=whole", *SETTINGS_OF_RUN]))


@pytest.fixture
def world(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of the model and of the run after two of its steps, which a test may change."""
    root = whole.parent.parent
    shutil.copytree(root / "model", tmp_path / "model")
    late = ("adapter", "step-000003", "step-000004")
    run = tmp_path / "runs" / "whole"
    shutil.copytree(whole, run, ignore=lambda at, names: [] if Path(at).name.startswith("step-") else late)
    (tmp_path / "run.yaml").write_text((root / "run.yaml").read_text().replace(f"{root}/model", f"{tmp_path}/model"))
    _drop_outcome(run)
    return tmp_path


def _drop_outcome(run: Path) -> None:
    about = json.loads((run / "environment.json").read_text())
    about.pop("outcome", None)
    (run / "environment.json").write_text(json.dumps(about))


def go_on(world: Path, *settings: str) -> Path:
    config = config_module.read_config(
        world / "run.yaml", [f"runs={world}/runs", "name=whole", *SETTINGS_OF_RUN, *settings]
    )
    return train_run(config, resume=True)


def exchange(folder: Path) -> None:
    tiny_llama(folder, seed=5)


def other_tokens(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def other_end(folder: Path) -> None:
    bpe_tokenizer(eos_token="<|reserved_special_token_1|>").save_pretrained(folder)


def other_rotation(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["rope_parameters"]["rope_theta"] = 20000.0
    (folder / "config.json").write_text(json.dumps(content))


EXCHANGES = [
    (exchange, "its weights differ (SHA-256 "),
    (other_tokens, "its tokenizer differs (SHA-256 "),
    (other_end, "its tokenizer differs (SHA-256 "),
    (other_rotation, "its configuration differs (rope_parameters.rope_theta 20000.0, recorded 10000.0)"),
]


def test_the_same_bytes_at_another_path_go_on(whole: Path, world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (world / "model").rename(world / "moved")
    folder = go_on(world, f"model.path={world / 'moved'}")
    assert logged(folder) == logged(whole)
    assert {k: v.tolist() for k, v in saved_adapter(folder).items()} == {
        k: v.tolist() for k, v in saved_adapter(whole).items()
    }
    assert f"changed: model.path: {whole.parent.parent / 'model'} -> {world / 'moved'}" in capfd.readouterr().err


@pytest.mark.parametrize(("change", "words"), EXCHANGES)
def test_another_base_is_refused_before_it_is_loaded(
    world: Path, change: Callable[[Path], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(world / "model")
    monkeypatch.setattr("subspace.run.open_base", None)
    before = sorted(path.name for path in (world / "runs" / "whole" / "checkpoints").iterdir())
    with pytest.raises(UserError) as caught:
        go_on(world)
    assert words in str(caught.value)
    assert "or give this run another name (name=...)" in str(caught.value)
    assert sorted(path.name for path in (world / "runs" / "whole" / "checkpoints").iterdir()) == before


def forget_base(run: Path) -> None:
    """Make a run's files those of an earlier version, which recorded no base."""
    for checkpoint in checkpoints(run):
        copy = begin_checkpoint(checkpoint)
        shutil.copytree(checkpoint, copy, dirs_exist_ok=True)
        (copy / "manifest.json").unlink()
        _forget(copy / "training.json", "base")
        _forget(copy / "adapter" / SETTINGS, "base")
        unseal(copy / "adapter")
        facts = json.loads((copy / "training.json").read_text())
        del facts["config"]["model"]["revision"]
        (copy / "training.json").write_text(json.dumps(facts))
        finish_checkpoint(copy, checkpoint)
    if (run / "adapter").exists():
        _forget(run / "adapter" / SETTINGS, "base")
        unseal(run / "adapter")


def _forget(file: Path, key: str) -> None:
    content = json.loads(file.read_text())
    del content[key]
    file.write_text(json.dumps(content))


def test_a_run_of_before_goes_on_with_a_notice(world: Path, whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = world / "runs" / "whole"
    forget_base(run)
    with pytest.raises(UserError, match=r"trained with other settings.*model\.path"):  # nothing but the path is known
        go_on(world)
    folder = go_on(world, f"model.path={whole.parent.parent / 'model'}")
    assert logged(folder) == logged(whole)
    assert "of a version that did not record its base" in capfd.readouterr().err


def test_a_finished_run_is_finished_for_its_base_wherever_it_lies(whole: Path, tmp_path: Path) -> None:
    root = whole.parent.parent
    moved = Path(shutil.copytree(root / "model", tmp_path / "moved"))

    def config(*settings: str) -> Any:
        return config_module.read_config(
            root / "run.yaml", [f"runs={root}/runs", "name=whole", *SETTINGS_OF_RUN, *settings]
        )

    assert is_finished(config())
    assert is_finished(config(f"model.path={moved}"))
    assert not is_finished(config("train.steps=5"))
    exchange(moved)
    with pytest.raises(UserError, match=r"its weights differ.*or give this run another name"):
        is_finished(config(f"model.path={moved}"))


# Scores.


def subjects(world: Path, run: Path, *settings: str) -> list[Any]:
    return [config_module.read_subject(str(run), ["evaluate.limit=4", *settings])]


@pytest.fixture
def made_items(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from subspace.data import samples as samples_module
    from tests.helpers.items import items

    monkeypatch.setattr(samples_module, "task_items", lambda name, split: datasets.Dataset.from_list(items(name, 12)))
    monkeypatch.setattr("subspace.evaluation.subjects.check_contamination", lambda *_: None)


@pytest.fixture
def scored(whole: Path, tmp_path: Path, made_items: None) -> Path:
    """Return a copy of the finished run, scored."""
    run = Path(shutil.copytree(whole, tmp_path / "runs" / "scored"))
    shutil.copytree(whole.parent.parent / "model", tmp_path / "model")
    evaluate_subjects(subjects(tmp_path, run, f"model.path={tmp_path / 'model'}"))
    return run


def test_scores_record_the_base(scored: Path, whole: Path) -> None:
    (row,) = json.loads((scored / "results.json").read_text())
    recorded = json.loads((whole / "adapter" / SETTINGS).read_text())["base"]
    assert row["base"]["weights"] == recorded["weights"]
    assert row["base"]["tokenizer"] == recorded["tokenizer"]


def test_scores_are_taken_again_where_the_same_bytes_lie_elsewhere(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    monkeypatch.setattr("subspace.evaluation.evaluate.score_job", None)  # nothing is scored
    ((result,),) = evaluate_subjects(subjects(tmp_path, scored, f"model.path={moved}"))
    assert result.n == 4


@pytest.mark.parametrize(("change", "words"), EXCHANGES)
def test_a_score_on_another_base_is_refused_before_it_is_loaded(
    scored: Path, tmp_path: Path, change: Callable[[Path], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(tmp_path / "model")
    monkeypatch.setattr("subspace.evaluation.subjects.open_model", None)
    with pytest.raises(UserError) as caught:
        evaluate_subjects(subjects(tmp_path, scored, f"model.path={tmp_path / 'model'}"))
    assert words in str(caught.value)
    assert f"the adapter in {scored / 'adapter'} was made with " in str(caught.value)


def test_a_score_of_a_run_of_before_is_told(
    whole: Path, tmp_path: Path, made_items: None, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "runs" / "before"))
    forget_base(run)
    evaluate_subjects(subjects(tmp_path, run))
    assert "of a version that did not record its base" in caplog.text
