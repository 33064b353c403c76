"""A run's folder: one process at a time, an adapter that is the run's own, and nothing written by what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from subspace import config as config_module
from subspace.adapters.serialization import TENSORS
from subspace.cli.main import main
from subspace.common.files import open_log
from subspace.common.locks import in_use
from subspace.distributed.watchdog import Watchdog
from subspace.errors import UserError
from subspace.evaluation.results import RESULTS, read_results
from subspace.resumption import is_finished
from subspace.run import train_run
from subspace.training.checkpoint import checkpoint_path, checkpoints, known_run_id, run_of
from tests.helpers.adapter_files import read, reseal, unseal, write
from tests.helpers.material import logged, make_material

SETTINGS_OF_RUNS = ["train.steps=4", "train.save_every=2"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"), rows=24)


def configured(material: Path, folder: Path, *settings: str) -> config_module.RunConfig:
    given = [f"runs={folder.parent}", f"name={folder.name}", *SETTINGS_OF_RUNS, *settings]
    return config_module.read_config(material, given)


@pytest.fixture(scope="module")
def whole(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(configured(material, tmp_path_factory.mktemp("runs") / "whole"))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of a run that has ended."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


# Locks.


def test_a_folder_that_a_run_is_writing_is_refused(
    material: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"runs={run.parent}", f"name={run.name}", *SETTINGS_OF_RUNS]
    commands = [
        ["train", str(material), *overrides, "train.steps=6", "--resume"],
        ["evaluate", str(run)],
        ["merge", str(run), "--out", str(run.parent / "merged")],
    ]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with in_use(run):
        for command in commands:
            assert main(command) == 2
            assert f"is in use by process {os.getpid()} on" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not (run.parent / "merged").exists()


def test_two_merges_into_one_folder_do_not_mix(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with in_use(run.parent / ".merged.merging"):
        assert main(["merge", str(run), "--out", str(run.parent / "merged")]) == 2
    assert "is in use by process" in capsys.readouterr().err
    assert not (run.parent / "merged").exists()


def test_a_run_holds_its_folder_from_the_first_look(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(folder: Path) -> None:
        with pytest.raises(UserError, match="in use"), in_use(folder):
            pass
        seen.append(folder)

    monkeypatch.setattr("subspace.run.ensure_new_run_dir", look)
    monkeypatch.setattr("subspace.run.write_outcome", lambda folder, *arguments: look(folder))
    folder = train_run(configured(material, tmp_path / "run"))
    assert seen == [folder, folder]
    with in_use(folder):
        pass


# An adapter and checkpoints that are the run's.


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


SPOIL: dict[str, Callable[[Path], object]] = {
    "no adapter": lambda adapter: shutil.rmtree(adapter),
    "no tensors": lambda adapter: (adapter / TENSORS).unlink(),
    "cut": lambda adapter: cut(adapter / TENSORS),
    "a flipped bit": lambda adapter: flip(adapter / TENSORS),
    "another alpha": lambda adapter: write(
        adapter,
        {
            **read(adapter),
            "adapters": [entry | {"settings": {"r": 4, "alpha": 1}} for entry in read(adapter)["adapters"]],
        },
    ),
    "another run's": lambda adapter: reseal(adapter, about={**read(adapter)["about"], "run": "another"}),
}


@pytest.mark.parametrize("spoil", SPOIL)
def test_resuming_a_run_that_had_ended_makes_a_spoilt_adapter_anew(
    spoil: str, material: Path, run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert is_finished(configured(material, run))
    SPOIL[spoil](run / "adapter")
    assert not is_finished(configured(material, run))
    overrides = [f"runs={run.parent}", f"name={run.name}", *SETTINGS_OF_RUNS]
    assert main(["train", str(material), *overrides, "--resume"]) == 0
    assert "note: the run had ended, but" in capsys.readouterr().err
    assert (run / "adapter" / TENSORS).read_bytes() == (whole / "adapter" / TENSORS).read_bytes()
    assert logged(run) == logged(whole)
    assert is_finished(configured(material, run))


def test_a_run_keeps_its_id_and_its_checkpoints_have_it(material: Path, run: Path) -> None:
    own = known_run_id(run)
    assert own
    train_run(configured(material, run, "train.steps=6"), resume=True)
    assert known_run_id(run) == own
    assert {run_of(path) for path in checkpoints(run)} == {own}
    assert read(run / "adapter")["about"]["run"] == own


def test_a_checkpoint_of_another_run_is_passed_over(
    material: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same settings and rows: only its run tells it from the run's own."""
    other = train_run(configured(material, tmp_path / "other"))
    assert known_run_id(other) != known_run_id(run)
    shutil.rmtree(checkpoint_path(run, 4))
    shutil.copytree(checkpoint_path(other, 4), checkpoint_path(run, 4))
    shutil.rmtree(run / "adapter")
    train_run(configured(material, run), resume=True)
    said = capsys.readouterr().err
    assert "the checkpoint step-000004 is another run's" in said
    assert "resumes after step 2" in said


def test_a_run_of_an_earlier_version_is_finished_and_goes_on(material: Path, run: Path) -> None:
    about = json.loads((run / "environment.json").read_text())
    del about["run"]
    (run / "environment.json").write_text(json.dumps(about))
    described = read(run / "adapter")
    del described["about"]["run"]
    reseal(run / "adapter", about=described["about"])
    unseal(run / "adapter")
    assert is_finished(configured(material, run))
    train_run(configured(material, run, "train.steps=6"), resume=True)
    assert known_run_id(run)


def test_an_adapter_of_another_run_is_not_scored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SPOIL["another run's"](run / "adapter")
    for command in (["evaluate", str(run)], ["merge", str(run), "--out", str(run.parent / "merged")]):
        assert main(command) == 2
        assert f"the adapter in {run / 'adapter'} is of another run" in capsys.readouterr().err


@pytest.mark.parametrize("left", ["log.jsonl", "adapter", "checkpoints/step-000002"])
def test_what_is_left_of_a_run_is_not_written_over(left: str, material: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "new" / left).parent.mkdir(parents=True)
    (run / left).rename(tmp_path / "new" / left)
    with pytest.raises(UserError, match="already holds a run"):
        train_run(configured(material, tmp_path / "new"))


# Refusals.


def opened(*arguments: object, **options: object) -> None:
    pytest.fail("a model was opened")


REFUSED = {
    "targets=[w_proj]": "w_proj",
    "method.r=0": "method.r",
    "method=prompt data.packing=true": "packing",
    "data.mixture=nothing.jsonl": "nothing.jsonl",
    "data.validation=9999": "9999",
    "evaluate.tasks=nosuite": "nosuite",
    "train.optimizer=nothing": "optimizer",
    "method.patterns={'(': {r: 2}}": "(",
}


@pytest.mark.parametrize("settings", REFUSED)
def test_what_a_configuration_decides_is_refused_before_a_model_is_opened(
    settings: str,
    material: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("subspace.run.open_model", opened)
    folder = tmp_path / "runs" / "run"
    given = settings.replace("={'", "=+{'").split(" ") if "{" not in settings else [settings]
    assert main(["train", str(material), f"runs={folder.parent}", f"name={folder.name}", *given]) == 2
    said = capsys.readouterr().err
    assert REFUSED[settings] in said
    assert "Traceback" not in said
    assert not folder.parent.exists()


def test_settings_that_a_run_was_not_begun_with_are_refused_before_its_rows_are_read(
    material: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subspace.run.open_run_data", lambda run: pytest.fail("rows were read"))
    with pytest.raises(UserError, match=r"method\.r: 4 -> 8"):
        train_run(configured(material, run, "method.r=8"), resume=True)


def test_a_spoilt_adapter_is_refused_before_a_model_is_opened(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("subspace.evaluation.subjects.open_model", opened)
    monkeypatch.setattr("subspace.adapters.export.open_model", opened)
    flip(run / "adapter" / TENSORS)
    before = sorted(run.rglob("*"))
    for command in (["evaluate", str(run)], ["merge", str(run), "--out", str(run.parent / "merged")]):
        assert main(command) == 2
        assert f"the adapter in {run / 'adapter'} is damaged" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before
    assert not (run / RESULTS).exists()


# What a file system refuses.


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE])
def test_a_log_that_cannot_be_written_ends_the_run_in_one_message(
    number: int, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(file: Path) -> IO[str]:
        if len(checkpoints(tmp_path / "run")) == 1:
            raise OSError(number, os.strerror(number), str(file))
        return open_log(file)

    monkeypatch.setattr("subspace.training.logging.open_log", refused)
    with pytest.raises(UserError, match=r"log.jsonl': .*\. The last good checkpoint is \S+step-000002$"):
        train_run(configured(material, tmp_path / "run"))


def test_a_name_that_is_too_long_is_one_message(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(material), f"runs={tmp_path / 'runs'}", f"name={'n' * 300}"]) == 2
    assert "the name is too long for the file system" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# From another folder.


def test_a_run_with_relative_paths_is_merged_and_scored_from_another_folder(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(material.parent)
    Path("own.yaml").write_text("file: own.jsonl\n")
    Path("own.jsonl").write_text('{"question": "What is it?", "choices": ["This", "That"], "label": 1}\n')
    settings = [f"runs={tmp_path}", "name=run", *SETTINGS_OF_RUNS, "model.path=model", "data.mixture=data.jsonl"]
    settings += ["evaluate.tasks=own.yaml"]
    config = config_module.read_config("run.yaml", settings)
    folder = train_run(config)
    assert is_finished(config)
    monkeypatch.chdir(tmp_path)
    assert main(["merge", str(folder), "--out", "merged"]) == 0
    assert main(["evaluate", str(folder)]) == 0
    assert [row.task for row in read_results(folder)] == ["own"]
    written = config_module.read_config(folder / "config.yaml")
    assert written.model.path == str(material.parent / "model")
    assert written.data.mixture == str(material.parent / "data.jsonl")
    assert written.evaluate.tasks == [str(material.parent / "own.yaml")]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"outcome": 3}',
        '{"outcome": {"steps": "x", "loss": 1, "seconds": 1, "peak_memory": 1}}',
        '{"run": 3}',
    ],
)
def test_a_run_that_says_nonsense_of_itself_is_refused_in_one_message(
    text: str, material: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "environment.json").write_text(text)
    settings = [f"runs={run.parent}", f"name={run.name}", *SETTINGS_OF_RUNS]
    resume = ["train", str(material), *settings, "--resume"]
    for command in (resume, ["evaluate", str(run)], ["merge", str(run), "--out", str(run.parent / "merged")]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.count("error: ") == 1
        assert f"{run / 'environment.json'}" in said
        assert "Traceback" not in said


# The watch.


def test_all_of_a_run_is_watched(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[int | str] = []

    class Noted(Watchdog):
        def beat(self, doing: int | str, patience: float = 1.0) -> None:
            beats.append(doing)
            super().beat(doing, patience)

    monkeypatch.setattr("subspace.run.Watchdog", Noted)
    train_run(configured(material, tmp_path / "run", "train.steps=2"))
    waits = ["the meeting of all processes", "the loading of the model", "the start of the engine", 1, 2]
    assert list(dict.fromkeys(beat for beat in beats if beat in waits)) == waits
