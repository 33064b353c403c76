"""Studies whose truth is known: a planted best rate, sizes that a run has, and equal methods, really trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from scipy import stats

from subspace.adapters import registry
from subspace.adapters.inject import remove_adapters
from subspace.adapters.registry import list_methods, register
from subspace.common.progress import no_progress
from subspace.common.settings import setting
from subspace.config import read_config
from subspace.methods.lora import LoRA
from subspace.run import inject_method
from subspace.study import execute
from subspace.study.cells import Cell, read_search
from subspace.study.config import read_study
from subspace.study.execute import Executor
from subspace.study.grid import Grid, resolve
from subspace.study.record import open_grid
from subspace.study.results import StudyResult, compared, read_results
from tests.helpers.studies import STUDY, here, made_up, make_study
from tests.helpers.tiny_models import tiny_llama


@pytest.fixture
def own_methods() -> Iterator[None]:
    """Forget what a test registers."""
    list_methods()
    before = dict(registry._methods)
    yield
    registry._methods.clear()
    registry._methods.update(before)


# A planted rate.


def register_toy_quadratic() -> None:
    @register("toy-quadratic", family="extension", num_params="r * (n_in + n_out)")
    class ToyQuadratic(LoRA):
        """Its loss, by :func:`planted`, is the squared distance in decades of its rate from ``best``."""

        @dataclass(frozen=True, kw_only=True)
        class Config(LoRA.Config):
            best: float = setting(0.0, "decimal logarithm of the best rate")


def planted(arguments: Sequence[str], output: Path) -> int:
    """Train nothing; the loss is that of a run with these settings."""
    base, words = arguments[1], [word for word in arguments[2:] if "=" in word]
    best = read_config(base, words).method[0].settings.best  # type: ignore[attr-defined]
    return made_up(lambda label, rate, seed, step: (math.log10(rate) - best) ** 2 + 1 / step)(arguments, output)


def test_a_planted_best_rate_is_found_wherever_it_lies(
    root: Path, tmp_path: Path, own_methods: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the ladder, one beyond its end, two, and further than it grows: equal trials, and the last is marked."""
    register_toy_quadratic()
    monkeypatch.setattr(execute, "is_finished", lambda config: True)
    best = {"inside": -2.0, "beside": -1.0, "two-off": -0.5, "far": 3.0, "below": -3.0}
    methods = ", ".join(f"{{name: toy-quadratic, label: {label}, best: {at}}}" for label, at in best.items())
    text = STUDY.replace("{runs}", str(tmp_path)).replace("{{ladder: 3, step: 3.1623}}", "[3.2e-3, 1.0e-2, 3.2e-2]")
    grid = open_grid(read_study(make_study(root, f"[{methods}]", text)), write=True)
    assert Executor(grid, planted).execute()
    outcome, _ = read_search(grid)
    found = {label: round(math.log10(trial.rate), 1) for label, trial in outcome.best.items()}
    assert found == {**best, "far": -0.5}
    assert dict(outcome.edges) == {"two-off": "high", "far": "high"}
    assert len({len(tried) for tried in outcome.trials.values()}) == 1


# Sizes.


def test_every_method_has_the_size_that_its_run_will_have(root: Path) -> None:
    """Counted from the shape, and from the tensors of the model: within the budget, or marked."""
    methods = "[" + ", ".join(list_methods()) + "]"
    grid = resolve(read_study(make_study(root, methods)), centred=False)
    model = tiny_llama()
    for contender in grid.contenders:
        config = read_config(grid.base, [*grid.overrides, *contender.overrides()])
        done = [inject_method(model, entry, 0, no_progress, start=True) for entry in config.method]
        assert sum(part["trained"] for part in done) == contender.trained, contender.label
        assert bool(contender.off) == (abs(contender.trained - grid.budget) > 0.02 * grid.budget), contender.label
        remove_adapters(model)
        model.requires_grad_(False)
        if contender.name == "full":
            model = tiny_llama()
    assert sum(not contender.off for contender in grid.contenders) >= 10


# Equal methods.

NULL = """base: launch/studies/toy/run.yaml
runs: {runs}
settings:
  {{train.steps: 6, train.batch_size: 8, train.warmup_steps: 1, train.log_every: 6, data.validation: 16,
  evaluate.limit: 60}}
budget: {{like: lora, r: 4}}
methods: [lora, lora-twin]
rates: [1.0e-2]
search: {{seeds: [1000], halving: null}}
final: {{seeds: {seeds}}}
"""
STUDIES, SEEDS = 40, 3


def register_twin() -> None:
    @register("lora-twin", family="extension", num_params="r * (n_in + n_out)")
    class LoRATwin(LoRA):
        """LoRA by another name, on which the seeds of its initial values depend."""


def parts(result: StudyResult) -> Iterator[StudyResult]:
    """Yield studies of so many seeds each from one whose finals have the seeds of all."""
    for number in range(STUDIES):
        places = list(range(number * SEEDS, (number + 1) * SEEDS))
        methods = []
        for method in result.methods:
            assert method.scores
            losses = tuple(method.losses[place] for place in places)
            seeds = tuple(method.seeds[place] for place in places)
            methods.append(replace(method, seeds=seeds, losses=losses, scores=method.scores.of_seeds(places)))
        found, spreads = compared(result.grid, methods)
        yield replace(result, methods=tuple(found), spreads=spreads)


@pytest.mark.long
def test_forty_trained_studies_of_one_method_seldom_call_it_better_than_itself(
    tmp_path: Path, own_methods: None
) -> None:
    """One method under two labels with other initial values: 40 studies of three seeds each, all trained and scored.

    They share the search, in which one rate leaves nothing to be chosen, and are scored by one command.
    """
    register_twin()
    file = tmp_path / "null.yaml"
    file.write_text(NULL.format(runs=tmp_path, seeds=list(range(STUDIES * SEEDS))))
    grid: Grid = open_grid(read_study(file), write=True)
    assert Executor(grid, here).execute()
    result = read_results(grid)
    one, two = result.methods
    assert one.losses != two.losses
    studies = list(parts(result))
    assert len(studies) == STUDIES
    verdicts = [study.method("lora-twin").verdict for study in studies]
    told = sum(len({method.group for method in study.methods}) > 1 for study in studies)
    for count in (verdicts.count("better"), STUDIES - verdicts.count(""), told):
        assert stats.binomtest(count, STUDIES, 0.05, alternative="greater").pvalue > 0.05
    differences = [study.method("lora-twin").against for study in studies]
    assert all(found and found.error > 0 for found in differences)  # they were trained apart
    cell = Cell(grid, "lora-twin", result.outcome.best["lora-twin"], 0)
    assert cell.facts()["adapters"]["trained"] == grid.contender("lora-twin").trained
