"""A method of a user's own, from a file or an installed package, goes through every command as the package's own do."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from safetensors.torch import load_file

from subspace.adapters import registry
from subspace.cli import main as cli
from subspace.config import RunConfig, read_config, read_run_subject
from subspace.data import samples as samples_module
from subspace.errors import UserError
from subspace.evaluation.subjects import evaluate_subjects
from subspace.resumption import is_finished
from subspace.run import train_run
from subspace.training.checkpoint import checkpoints
from tests.adapters.test_registry import MY_METHOD, install, own_register, write_method
from tests.helpers.items import items
from tests.helpers.material import logged, make_material
from tests.helpers.tiny_models import tiny_llama

__all__ = ["own_register"]  # an autouse fixture
STEPS = ["train.steps=4", "train.save_every=2", "train.keep_checkpoints=9"]


@pytest.fixture
def material(tmp_path: Path) -> Path:
    """Write a configuration that names ``my_method.py`` beside it."""
    file = make_material(tmp_path / "material", rows=12)
    write_method(file.parent)
    content = yaml.safe_load(file.read_text())
    content["method"] = {"name": "vera", "file": "my_method.py", "r": 3}
    file.write_text(yaml.safe_dump(content))
    return file


def as_a_later_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget which method files were run; the list on the disk stays."""
    monkeypatch.setattr(registry, "_files", {})
    monkeypatch.setattr(registry, "_methods", {k: v for k, v in registry._methods.items() if k != "vera"})


def run_command(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert cli.main(list(words)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def trained(material: Path, tmp_path: Path, name: str = "mine", *more: str) -> RunConfig:
    config = read_config(material, [f"runs={tmp_path / 'runs'}", f"name={name}", *STEPS, *more])
    train_run(config)
    return config


def test_a_run_keeps_its_methods_file_and_needs_the_original_no_more(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trained(material, tmp_path)
    whole = (config.folder / "adapter" / "adapter.safetensors").read_bytes()
    assert (config.folder / "method" / "my_method.py").read_bytes() == MY_METHOD.read_bytes()
    assert json.loads((config.folder / "adapter" / "adapter.json").read_text())["adapters"][0]["origin"] == {
        "file": "my_method.py",
        "sha256": config.method[0].sha256,
    }
    assert is_finished(config)

    (material.parent / "my_method.py").unlink()
    as_a_later_process(monkeypatch)
    again = read_config(config.folder / "config.yaml")
    assert dataclasses.asdict(again) == dataclasses.asdict(config)
    assert is_finished(again)

    # Stopped after two steps, it goes on from the run's own copy, to the same bits.
    shutil.rmtree(checkpoints(config.folder)[-1])
    shutil.rmtree(config.folder / "adapter")
    train_run(again, resume=True)
    assert (config.folder / "adapter" / "adapter.safetensors").read_bytes() == whole

    as_a_later_process(monkeypatch)
    report = json.loads(run_command(capsys, "merge", str(config.folder), "--out", str(tmp_path / "merged"), "--json"))
    assert report["layers"] == 10
    assert load_file(tmp_path / "merged" / "model.safetensors")


def test_a_configuration_and_the_command_line_name_a_file_in_several_ways(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_config(material).method
    assert (expected[0].name, expected[0].settings.r, expected[0].file) == ("vera", 3, "method/my_method.py")  # type: ignore[attr-defined]

    def method(content: Any, *overrides: str) -> Any:
        plain = yaml.safe_load(material.read_text())
        plain["method"] = content
        (material.parent / "other.yaml").write_text(yaml.safe_dump(plain))
        return read_config(material.parent / "other.yaml", overrides).method

    assert method({"file": "my_method.py", "r": 3}) == expected
    assert method("my_method.py", "method.r=3") == expected
    assert method([{"file": "my_method.py", "r": 3, "targets": expected[0].targets}]) == expected
    assert method({"file": str(MY_METHOD), "name": "VeRA", "r": 3}) == expected
    assert method({"name": "vera-16", "file": "my_method.py"})[0].settings.r == 16
    monkeypatch.chdir(material.parent)
    assert method("lora", "method=my_method.py", "method.r=3") == expected
    assert method("lora", "method=vera", "method.file=my_method.py", "method.r=3") == expected
    newer = write_method(tmp_path, "setting(4,", "setting(6,")
    assert method("my_method.py", f"method.file={newer}")[0].settings.r == 6
    assert method({"name": "vera", "file": "my_method.py", "sha256": expected[0].sha256, "r": 3}) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "nowhere.py"}, "method file '.*nowhere.py' cannot be read: No such file"),
        ({"name": "lora"}, "my_method.py registers no method 'lora'. There are: vera, vera-16"),
        ({"rr": 3}, "method vera has no setting 'rr'"),
        ({"sha256": "beef"}, "my_method.py' was changed: its SHA-256 is .*, and the configuration asks for beef"),
        ({"file": None}, "no method is called 'vera'"),
    ],
)
def test_what_a_configuration_says_wrong_of_a_file_is_refused(
    changes: dict[str, Any], message: str, material: Path
) -> None:
    content = yaml.safe_load(material.read_text())
    content["method"] |= changes
    material.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message):
        read_config(material)


def test_a_changed_file_cannot_resume_its_run(material: Path, tmp_path: Path) -> None:
    config = trained(material, tmp_path)
    shutil.rmtree(config.folder / "adapter")
    write_method(material.parent, "0.1", "0.2")
    changed = read_config(material, [f"runs={tmp_path / 'runs'}", "name=mine", *STEPS])
    assert not is_finished(changed)
    with pytest.raises(UserError, match="method.sha256"):
        train_run(changed, resume=True)


def test_the_run_of_another_user_is_scored_only_where_the_user_names_the_file(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained(material, tmp_path).folder
    as_a_later_process(monkeypatch)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user's"))
    copy = folder / "method" / "my_method.py"
    with pytest.raises(UserError, match=f"code that you have not run before.*method.file={copy}"):
        read_run_subject(folder)
    assert read_run_subject(folder, [f"method.file={copy}"]).method == "vera"


def test_a_run_is_scored_planned_and_shown(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(samples_module, "task_items", lambda name, split: datasets.Dataset.from_list(items(name, 12)))
    folder = trained(material, tmp_path).folder
    as_a_later_process(monkeypatch)
    (results,) = evaluate_subjects([read_run_subject(folder, ["evaluate.tasks=piqa"])])
    assert [(result.adapter, result.n) for result in results] == [("vera", 12)]
    assert "vera" in run_command(capsys, "table", str(folder))

    # 10 layers of 3 + out: q (64), k and v (32), up (128), down (64), each twice.
    count = 2 * (5 * 3 + 64 + 32 + 32 + 128 + 64)
    planned = json.loads(run_command(capsys, "plan", str(material), "--json"))
    assert planned["trained"] == count


def test_a_method_is_told_of_by_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = run_command(capsys, "methods", str(MY_METHOD), "r=7")
    assert "VeRA, as a method of a user's own" in page
    assert "  r=7 " in page
    told = json.loads(run_command(capsys, "methods", str(MY_METHOD), "--json"))
    assert (told["name"], told["num_params"], told["arxiv"]) == ("vera", "r + n_out", "2310.11454")
    assert Path(told["file"]) == MY_METHOD
    tiny_llama(tmp_path)
    counted = json.loads(run_command(capsys, "methods", str(MY_METHOD), "--shape", str(tmp_path), "--json"))
    assert counted["trained"] == 2 * (5 * 4 + 64 + 32 + 32 + 128 + 64)


def test_an_installed_package_offers_a_method_to_every_command(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from_file = logged(trained(material, tmp_path).folder)
    as_a_later_process(monkeypatch)
    install(tmp_path / "site-packages", monkeypatch)
    assert "vera-package" not in run_command(capsys, "methods", "--markdown")
    assert "vera" in [info["name"] for info in json.loads(run_command(capsys, "methods", "--json"))]
    content = yaml.safe_load(material.read_text())
    content["method"] = {"name": "vera", "r": 3}
    material.write_text(yaml.safe_dump(content))
    folder = trained(material, tmp_path, "installed").folder
    assert logged(folder) == from_file
    assert not (folder / "method").exists()
    assert read_config(folder / "config.yaml").method[0].file is None
    run_command(capsys, "merge", str(folder), "--out", str(tmp_path / "merged"))
