"""The execution of a study: what it trains in which order, what it goes on with, and what it refuses."""

from __future__ import annotations

import csv
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from subspace.cli.main import main
from subspace.common.files import remove_folder
from subspace.common.locks import in_use
from subspace.config import read_config
from subspace.errors import RunStopped, UserError
from subspace.study import execute, record
from subspace.study.cells import Cell, read_search
from subspace.study.config import read_study
from subspace.study.execute import Executor, next_cells, planned_steps, remaining_steps
from subspace.study.files import TIMES, write_report
from subspace.study.grid import Grid
from subspace.study.report import report_grid
from subspace.study.results import read_results
from subspace.study.shared_pass import Pass, begin_pass, interrupted_passes, take_back
from subspace.training.checkpoint import checkpoints, step_of
from tests.helpers.studies import STUDY, here, made_up, make_study, stopping_after

OPTIMUM = {"lora": 1e-2, "ssb": 1.0}


def quadratic(label: str, rate: float, seed: int, step: int) -> float:
    """A loss that is least at a method's rate, and differs a little between seeds."""
    return 1 + 0.01 * (math.log10(rate) - math.log10(OPTIMUM[label])) ** 2 + 1e-3 * math.sin(seed + step)


@pytest.fixture
def unsealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up trainings have no adapter to be compared with."""
    monkeypatch.setattr(execute, "is_finished", lambda config: True)


def opened(root: Path, runs: Path, text: str = STUDY, methods: str = "[lora, ssb]") -> Grid:
    """Return the grid of a study in a folder of its own, whose ladders are all around the base's rate."""
    file = make_study(root, methods, text.replace("{runs}", str(runs)))
    return record.open_grid(read_study(file), write=True)


def cells_without_times(folder: Path) -> list[dict[str, str]]:
    with (folder / "cells.csv").open() as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def test_a_study_finds_a_planted_rate_with_equally_many_trials(root: Path, tmp_path: Path, unsealed: None) -> None:
    grid = opened(root, tmp_path)
    asked: list[tuple[Path, int]] = []
    assert Executor(grid, made_up(quadratic, asked)).execute()
    outcome, _ = read_search(grid)
    assert {name: trial.rate for name, trial in outcome.best.items()} == {"lora": 1e-2, "ssb": 1.0}
    assert len({len(tried) for tried in outcome.trials.values()}) == 1
    finals = [folder for folder, _ in asked[-4:]]
    assert [folder.name for folder in finals] == ["seed-0", "seed-0", "seed-1", "seed-1"]
    assert {folder.name for folder, _ in asked[:-4]} == {"seed-100"}
    assert remaining_steps(grid, outcome) == 0
    assert planned_steps(grid) <= sum(5 for _ in asked)


def test_a_study_goes_on_wherever_it_was_stopped(root: Path, tmp_path: Path, unsealed: None) -> None:
    whole = opened(root, tmp_path / "whole")
    Executor(whole, made_up(quadratic)).execute()
    write_report(read_results(whole))
    stopped = opened(root, tmp_path / "stopped")
    for commands in (1, 3, 2, 100):
        executor = Executor(stopped, stopping_after(made_up(quadratic), commands))
        if commands < 100:
            with pytest.raises(RunStopped):
                executor.execute()
        else:
            assert executor.execute()
    write_report(read_results(stopped))
    for name in ("cells.csv", "curves.csv", "table.md"):
        assert (whole.folder / name).read_bytes() == (stopped.folder / name).read_bytes()


def test_cells_that_are_due_are_trained_together(root: Path, tmp_path: Path, unsealed: None) -> None:
    def loss(label: str, rate: float, seed: int, step: int) -> float:
        return math.inf if rate >= 1e-2 and label == "lora" else quadratic(label, rate, seed, step)

    commands: list[list[str]] = []

    def run(arguments: Sequence[str], output: Path) -> int:
        commands.append([word for word in arguments if word.endswith(".yaml")])
        return made_up(loss)(arguments, output)

    one, several = opened(root, tmp_path / "one"), opened(root, tmp_path / "several")
    assert Executor(one, made_up(loss)).execute()
    assert Executor(several, run, together=4).execute()
    assert max(map(len, commands)) == 4
    for command in commands:
        settings = [read_config(file).train for file in command]
        assert len({config.seed for config in settings}) == 1  # the same rows
    for grid in (one, several):
        write_report(read_results(grid))
    assert cells_without_times(one.folder) == cells_without_times(several.folder)
    assert any(row["state"] == "failed" for row in cells_without_times(several.folder))


def test_cells_that_shared_a_pass_when_it_was_stopped_share_it_again(
    root: Path, tmp_path: Path, unsealed: None
) -> None:
    commands: list[list[str]] = []

    def stopped(arguments: Sequence[str], output: Path) -> int:
        """Only the first of three cells comes to the end."""
        files = [word for word in arguments if word.endswith(".yaml")]
        commands.append(files)
        rest = [word for word in arguments if word not in files]
        made_up(quadratic)([rest[0], files[0], *rest[1:]], output)
        output.write_text("stopped\n")
        return RunStopped.status

    def whole(arguments: Sequence[str], output: Path) -> int:
        commands.append([word for word in arguments if word.endswith(".yaml")])
        if len(commands) == 2:
            assert not (Path(commands[0][0]).parent / "log.jsonl").exists(), "the first was not taken back"
        return made_up(quadratic)(arguments, output)

    grid = opened(root, tmp_path)
    with pytest.raises(RunStopped):
        Executor(grid, stopped, together=3).execute()
    assert Executor(grid, whole, together=2).execute()  # of what begins now
    assert len(commands[0]) == 3
    assert commands[1] == commands[0]
    assert max(map(len, commands[2:])) == 2
    assert not list((grid.folder / ".passes").iterdir())


def test_cells_go_back_to_the_last_step_that_all_have(root: Path, tmp_path: Path) -> None:
    grid = opened(root, tmp_path)
    executor = Executor(grid, here, together=2)
    outcome, _ = read_search(grid)
    group = executor._group([cell for cell, _ in next_cells(grid, outcome)])
    executor._train_together(Pass(group, 1))
    executor._train_together(Pass(group, 2))
    first, second = group
    expected = [cell.losses() for cell in group]
    remove_folder(checkpoints(second.folder)[-1])  # as if it had been killed as it saved
    begin_pass(Pass(group, 2))
    assert interrupted_passes(grid, group) == [(group, 2)]
    take_back(group)
    assert [[step_of(path) for path in checkpoints(cell.folder)] for cell in group] == [[1], [1]]
    executor._train_together(Pass(group, 2))
    assert [cell.losses() for cell in group] == expected
    begin_pass(Pass(group, 2))
    assert interrupted_passes(grid, group) == []
    shutil.rmtree(first.folder)
    begin_pass(Pass(group, 2))
    take_back(group)
    assert not second.folder.exists()


def test_cells_that_cannot_share_a_pass_are_trained_alone(root: Path, tmp_path: Path, unsealed: None) -> None:
    text = STUDY.replace("settings: {{", "settings: {{train.compile: true, ")
    grid = opened(root, tmp_path, text)
    executor = Executor(grid, made_up(quadratic), together=4)
    assert len(executor._group([cell for cell, _ in next_cells(grid, read_search(grid)[0])])) == 1


class Counting:
    """A runner that notes what it is asked, and how many run at a time."""

    def __init__(self) -> None:
        self.running = self.most = 0
        self.asked: list[tuple[str, int]] = []
        self.lock = threading.Lock()

    def __call__(self, arguments: Sequence[str], output: Path) -> int:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
            first, shared = "/".join(output.parts[-4:-1]), sum(word.endswith(".yaml") for word in arguments)
            self.asked.append((first, shared))
        time.sleep(0.05)
        status = made_up(quadratic)(arguments, output)
        with self.lock:
            self.running -= 1
        return status


def test_commands_that_run_at_a_time_share_passes_as_one_after_another(
    root: Path, tmp_path: Path, unsealed: None
) -> None:
    runs, found = [Counting(), Counting()], []
    for parallel, run in zip((1, 3), runs, strict=True):
        grid = opened(root, tmp_path / str(parallel))
        assert Executor(grid, run, together=2, parallel=parallel).execute()
        assert run.most == parallel
        write_report(read_results(grid))
        found.append(cells_without_times(grid.folder))
    assert sorted(runs[0].asked) == sorted(runs[1].asked)
    assert found[0] == found[1]


def test_a_command_that_fails_ends_those_beside_it(root: Path, tmp_path: Path, unsealed: None) -> None:
    stopped, of_first = threading.Event(), iter([-9])

    def run(arguments: Sequence[str], output: Path) -> int:
        if status := next(of_first, 0):
            return status
        assert stopped.wait(60), "it was not told to end"
        return RunStopped.status

    grid = opened(root, tmp_path)
    with pytest.raises(UserError, match="signal 9"):
        Executor(grid, run, parallel=2, stop=stopped.set).execute()


@pytest.mark.long
def test_a_study_of_runs_together_is_that_of_runs_alone(tmp_path: Path) -> None:
    ends = []
    for together in (1, 8):
        (folder := tmp_path / str(together)).mkdir()
        grid = opened(folder, folder / "runs")
        assert Executor(grid, here, together=together).execute()
        write_report(read_results(grid))
        ends.append(cells_without_times(grid.folder))
    assert len(ends[0]) == len(ends[1]) > 6
    for alone, shared in zip(*ends, strict=True):
        for name, value in alone.items():
            if name.startswith("loss_") and value:
                assert float(shared[name]) == pytest.approx(float(value), rel=1e-4)
            else:
                assert shared[name] == value


def test_a_training_that_fails_counts_as_the_worst(root: Path, tmp_path: Path, unsealed: None) -> None:
    def loss(label: str, rate: float, seed: int, step: int) -> float:
        return math.inf if rate >= 1e-2 and label == "lora" else quadratic(label, rate, seed, step)

    grid = opened(root, tmp_path)
    assert Executor(grid, made_up(loss)).execute()
    result = read_results(grid)
    best = result.method("lora").best
    assert best
    assert best.rate == 3.2e-3
    assert any("failed" in note and "lora 4" in note for note in report_grid(result).notes)  # two planned, two beyond


def test_time_that_is_up_leaves_the_rest_to_the_next_time(
    root: Path, tmp_path: Path, unsealed: None, caplog: pytest.LogCaptureFixture
) -> None:
    grid = opened(root, tmp_path)
    ticks = iter(range(10_000))
    assert not Executor(grid, made_up(quadratic), minutes=0.1, clock=lambda: float(next(ticks))).execute()
    begun = list(grid.folder.glob("*/*/*/log.jsonl"))
    assert 0 < len(begun) < 6
    assert Executor(grid, made_up(quadratic)).execute()


def test_only_trains_some_and_waits_with_the_finals(root: Path, tmp_path: Path, unsealed: None) -> None:
    grid = opened(root, tmp_path)
    assert not Executor(grid, made_up(quadratic), only=["lora"]).execute()
    assert {path.parts[-4] for path in grid.folder.glob("*/*/*/log.jsonl")} == {"lora"}
    assert not list(grid.folder.glob("*/*/seed-0"))
    with pytest.raises(UserError, match=r"'lara'.*Did you mean 'lora'"):
        Executor(grid, made_up(quadratic), only=["lara"])


def test_a_command_that_goes_wrong_ends_the_study_with_its_words(root: Path, tmp_path: Path) -> None:
    grid = opened(root, tmp_path)

    def run(arguments: object, output: Path) -> int:
        output.write_text("error: no space is left on the disk\n")
        return 2

    with pytest.raises(UserError, match=r"status 2: no space is left"):
        Executor(grid, run).execute()

    def traceback(arguments: object, output: Path) -> int:
        output.write_text("Traceback (most recent call last):\nKeyError: 'x'\n")
        return 1

    with pytest.raises(UserError, match="KeyError"):
        Executor(grid, traceback).execute()
    assert not list(grid.folder.glob("**/failed.txt"))
    with pytest.raises(UserError, match="signal 9.*memory"):
        Executor(grid, lambda arguments, output: -9).execute()
    with pytest.raises(RunStopped):
        Executor(grid, lambda arguments, output: 75).execute()


def test_another_grid_than_that_of_the_runs_is_refused_with_a_way_out(
    root: Path, tmp_path: Path, unsealed: None
) -> None:
    grid = opened(root, tmp_path)
    Executor(grid, made_up(quadratic)).execute()
    changes = {
        "train.steps changed from 5 to 6": ("train.steps: 5", "train.steps: 6"),
        "keep changed from 0.5 to 0.7": ("first: 0.2,", "first: 0.2, keep: 0.7,"),
        "its rates changed from .* to": ("ladder: 3", "ladder: 2"),
        r"final.seeds no longer has 1": ("[0, 1]", "[0]"),
        "settings.r changed from": ("r: 4}", "r: 8}"),
    }
    for said, (before, after) in changes.items():
        assert before in STUDY
        with pytest.raises(UserError, match=f"{said}.*another name"):
            opened(root, tmp_path, STUDY.replace(before, after))
    assert opened(root, tmp_path, STUDY.replace("[0, 1]", "[0, 1, 2]")).final_seeds == (0, 1, 2)
    opened(root, tmp_path, STUDY.replace("[0, 1]", "[0, 1, 2]"), "[lora, ssb, dora]")


def test_a_study_goes_on_from_another_folder_and_another_place_of_the_project(
    root: Path, tmp_path: Path, unsealed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = opened(root, tmp_path, STUDY.replace("train.steps: 5", "train.steps: 5, engine: ds_configs/zero0.json"))
    Executor(grid, made_up(quadratic)).execute()
    assert grid.shared["engine"] == "ds_configs/zero0.json"

    def measured(*_: object) -> list[float]:
        raise AssertionError("the ladders were centred anew")

    monkeypatch.setattr("subspace.study.grid.gradient_norms", measured)
    for folder in (root, root.parent):
        monkeypatch.chdir(folder)
        file = (root / "toy.yaml").relative_to(folder)
        assert record.open_grid(read_study(file)).contenders == grid.contenders


def test_a_finished_run_of_other_settings_is_refused(root: Path, tmp_path: Path) -> None:
    grid = opened(root, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "is_finished", lambda config: True)
        Executor(grid, made_up(quadratic)).execute()
    for file in grid.folder.glob("*/*/*/config.yaml"):
        file.write_text(file.read_text().replace("batch_size: 8", "batch_size: 4"))
    with pytest.raises(UserError, match=r"is finished, but with other settings.*remove that folder"):
        Executor(grid, made_up(quadratic)).execute()


def test_two_methods_of_a_seed_are_fed_the_same_rows(root: Path, tmp_path: Path) -> None:
    grid = opened(root, tmp_path)
    fed = {}
    for label, seed in (("lora", 0), ("ssb", 0), ("lora", 1)):
        cell = Cell(grid, label, grid.contender(label).trials[0], seed)
        cell.folder.mkdir(parents=True)
        assert here(cell.train_arguments(2), cell.folder / "output.txt") == 0
        path = checkpoints(cell.folder)[-1]
        fed[label, seed] = json.loads((path / "training.json").read_text())["fed"]
    assert fed["lora", 0] == fed["ssb", 0] != fed["lora", 1]


def test_the_progress_line_says_what_remains(
    root: Path, tmp_path: Path, unsealed: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("subspace"), "propagate", True)
    grid = opened(root, tmp_path)
    with caplog.at_level(logging.INFO):
        Executor(grid, made_up(quadratic)).execute()
    said = [line for line in caplog.messages if "steps remain" in line]
    assert f"{planned_steps(grid):,} steps remain" in said[0]
    assert "5 steps remain, about" in said[-1]


@pytest.mark.processes
def test_the_quick_study_runs_as_it_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command in the README, where nothing was prepared and from any folder: search, finals, scoring, table."""
    monkeypatch.chdir(tmp_path)
    file = "launch/studies/quick.yaml"
    assert main(["study", "run", file]) == 0
    assert "4 methods" in capsys.readouterr().out
    assert main(["study", "report", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ended"]
    assert {method["method"] for method in found["methods"]} == {"lora", "dora", "ssb", "bitfit"}
    assert all(len(method["seeds"]) == 2 and not method["failed"] for method in found["methods"])
    assert max(method["accuracy"]["value"] for method in found["methods"]) > 0.3  # of four choices

    grid = record.open_grid(read_study(file))
    assert {row["state"] for row in cells_without_times(grid.folder)} == {"finished", "paused"}
    outcome, _ = read_search(grid)
    for contender in grid.contenders:
        trained = Cell(grid, contender.label, outcome.best[contender.label], 0).facts()["adapters"]["trained"]
        assert trained == contender.trained
    best = Cell(grid, "lora", outcome.best["lora"], 100)
    log = best.log()
    steps = [line["step"] for line in log if "loss" in line]
    assert steps == [1, *range(12, 97, 12)]  # once, over three commands
    assert [line["step"] for line in log if "validation_loss" in line] == [24, 48, 72, 96]
    assert checkpoints(best.folder) == []
    before = (grid.folder / "cells.csv").read_bytes()
    assert Executor(grid, stopping_after(here, 0)).execute()  # nothing is left to run
    assert main(["study", "report", file]) == 0
    assert (grid.folder / "cells.csv").read_bytes() == before


def test_two_executions_of_one_study_do_not_mix(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = opened(root, tmp_path)
    with in_use(grid.folder):
        assert main(["study", "run", str(root / "toy.yaml")]) == 2
    assert "is in use by process" in capsys.readouterr().err
