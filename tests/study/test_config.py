"""The file of a study: its short forms, what is refused with the nearest, and the grids of the shipped ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from subspace.adapters.registry import list_methods
from subspace.cli.main import main
from subspace.common.paths import REPOSITORY
from subspace.errors import UserError
from subspace.study.cells import Cell, trial_name
from subspace.study.config import read_study
from subspace.study.grid import resolve
from subspace.study.search import Trial
from tests.helpers.studies import STUDY, make_study

CLAIMS = "claims"  # a list of claims, and no study
SHIPPED = sorted(file for file in (REPOSITORY / "launch" / "studies").glob("*.yaml") if file.stem != CLAIMS)


def changed(root: Path, *changes: tuple[str, str]) -> Path:
    text = STUDY
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    return make_study(root, text=text)


def test_the_short_forms_mean_the_long_ones(root: Path) -> None:
    file = changed(root, ("{{like: lora, r: 4}}", "20000"), ("{{ladder: 3, step: 3.1623}}", "[1e-3, 1e-2]"))
    study = read_study(file)
    assert study.budget.parameters == 20000
    assert study.rates.list == (1e-3, 1e-2)
    assert [method.label for method in study.methods] == ["lora", "ssb"]
    assert study.reference == "lora"
    assert study.base == str(root / "run.yaml")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("budget:", "budgets:", "study has no setting 'budgets'. Did you mean 'budget'"),
        ("first: 0.2", "firsts: 0.2", "halving has no setting 'firsts'. Did you mean 'first'"),
        ("[0, 1]", "[0, 100]", "seed 100 is used by the search and by the finals"),
        ("[0, 1]", "[]", "final.seeds"),
        ("validation_loss", "perplexity", "outcome.primary is 'perplexity'"),
        ("ladder: 3", "ladder: 0", "rates.ladder is 0"),
        ("3.1623", "1.0", "rates.step is 1.0"),
        ("rates: {{ladder: 3, step: 3.1623}}", "rates: [1.0, 2.0e+6]", "rates above 0, to 1e+06"),
        ("first: 0.2", "first: 0", "search.halving"),
        ("search: {{", "search: {{trials: 4, ", "search.trials is 4"),
        ("search: {{", "search: {{on: test, ", "search.on is 'test'"),
        ("budget:", "reference: dora\nbudget:", "reference is 'dora'"),
        ("methods: {methods}", "methods: [lora, lora]", "lora is compared twice"),
        ("methods: {methods}", "methods: lora", "takes a list"),
        ("methods: {methods}", "methods: [{{r: 8}}]", "takes names"),
        ("methods: {methods}", "methods: [{{name: lora, label: a/b}}]", "names a folder"),
    ],
)
def test_a_file_that_says_nonsense_is_refused(root: Path, before: str, after: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        read_study(changed(root, (before, after)))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("methods: {methods}", "methods: [lora, loar]", "no method is called 'loar'. Did you mean 'lora'"),
        ("methods: {methods}", "methods: [{{name: lora, rr: 8}}]", "method lora has no setting 'rr'"),
        ("train.steps: 5", "train.epochs: 3, train.steps: null", "a study are steps"),
        ("data.validation: 12", "data.validation: 0", "held-out rows judge a search"),
        ("train.steps: 5", "train.seed: 5", "train.seed, which it varies itself"),
        ("train.steps: 5", "train.stepz: 5", "Did you mean"),
        ("{{primary: validation_loss}}", "{{}}\nname: x", "llm-adapters does not give"),
        ("budget:", "axes: {{r: [2, 4]}}\nbudget:", "axes has r, which is the size"),
        ("step: 3.1623", "step: 1.0e+9", "the ladder of lora reaches"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(root: Path, before: str, after: str, said: str) -> None:
    changes = [(before, after)]
    if "llm-adapters" in said:
        changes.append(("train.steps: 5", "train.steps: 5, evaluate.protocol: llm-adapters"))
    with pytest.raises(UserError) as error:
        resolve(read_study(changed(root, *changes)), centred=False)
    assert said in str(error.value)


def test_sizes_meet_the_budget_or_are_marked(root: Path) -> None:
    methods = "[lora, flora, pissa, ssb, bitfit, {name: prefix, n: 3}]"
    grid = resolve(read_study(make_study(root, methods)), centred=False)
    for contender in grid.contenders:
        assert bool(contender.off) == (abs(contender.trained - grid.budget) > 0.02 * grid.budget)
    off = {contender.label: contender.off for contender in grid.contenders}
    assert off["lora"] == off["pissa"] == ""
    assert "as large as it is" in off["ssb"]
    assert "as given" in off["prefix"]


def test_every_method_has_equally_many_different_trials_over_axes(root: Path) -> None:
    """LoRA has alpha, SSB has not: its trials are rates."""
    file = changed(root, ("budget:", "axes: {{alpha: [4, 8, 16]}}\nbudget:"), ("search: {{", "search: {{trials: 6, "))
    grid = resolve(read_study(file), centred=False)
    assert {c.label: len(set(c.trials)) for c in grid.contenders} == {"lora": 6, "ssb": 6}
    lora, ssb = (grid.contender(label).trials for label in ("lora", "ssb"))
    assert Counter(trial.rate for trial in lora) == dict.fromkeys({trial.rate for trial in lora}, 2)
    assert Counter(trial.axes for trial in lora) == dict.fromkeys({trial.axes for trial in lora}, 2)
    assert all(not trial.axes for trial in ssb)
    assert (min(ssb).rate, max(ssb).rate) == (min(lora).rate, max(lora).rate)
    assert grid == resolve(read_study(file), centred=False)
    cell = Cell(grid, "lora", lora[0], 0)
    assert cell.config().method[0].settings.alpha == dict(lora[0].axes)["alpha"]  # type: ignore[attr-defined]


def test_ladders_are_centred_by_the_gradient_on_rates_that_methods_share(root: Path) -> None:
    grid = resolve(read_study(make_study(root, "[lora, ssb, full]")))
    at = {contender.label: contender for contender in grid.contenders}
    assert at["full"].gradient > at["lora"].gradient > at["ssb"].gradient > 0
    assert at["full"].exponent <= at["lora"].exponent == 0 < at["ssb"].exponent
    assert [trial.rate for trial in at["lora"].trials] == [0.0032, 0.01, 0.032]
    assert {trial.rate for trial in at["lora"].trials} & {trial.rate for trial in at["ssb"].trials}


def test_folders_of_trials_are_readable_and_differ() -> None:
    assert trial_name(Trial(3.2e-4)) == "rate-3.2e-4"
    assert (
        trial_name(Trial(1e-3, (("train.batch_size", 8), ("alpha", 1e-05)))) == "rate-1e-3_batch_size-8_alpha-1.0e-05"
    )


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_study_is_read(file: Path) -> None:
    study = read_study(f"launch/studies/{file.name}")
    assert study.base.endswith("toy/run.yaml" if file.stem == "quick" else "quickstart.yaml")
    if file.stem == "methods":
        assert {method.name for method in study.methods} == {*list_methods()}


@pytest.mark.long
@pytest.mark.model
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_study_has_a_grid(file: Path) -> None:
    grid = resolve(read_study(file), centred=False)
    assert len({len(contender.trials) for contender in grid.contenders}) == 1
    for contender in grid.contenders:
        Cell(grid, contender.label, contender.trials[0], 0).config()


def test_the_plan_says_what_a_study_costs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(make_study(root))
    assert main(["study", "plan", file]) == 0
    said = capsys.readouterr().out
    # Of each method three to step 1, two to step 2, one to the end, and two finals.
    assert "6 trials, judged on held-out rows after 1, 2, 5 steps; 4 finals of 5" in said
    assert "36 steps in all" in said
    with pytest.raises(UserError, match="scores no items") as error:
        main_error(["study", "plan", file, "--difference", "0.5"])
    assert error.value.status == 2


@pytest.mark.parametrize("form", ["markdown", "latex", "csv", "html"])
def test_a_plan_has_two_forms(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    plan = ["study", "plan", str(make_study(root))]
    assert main([*plan, "--format", form, "--output", str(tmp_path / "plan")]) == 2
    assert f"study plan was asked for {form}, but it is printed for a terminal or as json" in capsys.readouterr().err
    assert main([*plan, "--json", "--output", str(tmp_path / "plan.json")]) == 0
    assert [*tmp_path.iterdir()] == [tmp_path / "plan.json"]
    assert json.loads((tmp_path / "plan.json").read_text())


def main_error(arguments: list[str]) -> None:
    """Run a command and let its error through."""
    from subspace.cli.main import parse

    command, options = parse(arguments)
    command.run(options)


def test_a_wrong_action_is_refused_with_the_nearest(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "plam", str(make_study(root))]) == 2
    assert "Did you mean 'plan'" in capsys.readouterr().err
