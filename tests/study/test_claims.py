"""Verdicts on claims: by differences of known truth, by studies on disk, and never without one."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from subspace.cli.main import main
from subspace.common.paths import REPOSITORY
from subspace.errors import UserError
from subspace.reporting.continuous import MeanDifference, paired_over_seeds
from subspace.study import claims, execute
from subspace.study.claims import (
    CONFIRMED,
    HEAD,
    NOT_RUN,
    OPEN,
    REFUTED,
    Claim,
    Evidence,
    compute_the_same,
    judge,
    judge_one_rate,
    pair_evidence,
    read_claims,
    settle,
)
from subspace.study.config import read_study
from subspace.study.execute import Executor
from subspace.study.record import open_grid
from tests.helpers.simulated_studies import simulated_study
from tests.helpers.studies import STUDY, made_up, make_study

FILE = REPOSITORY / "launch" / "studies" / "claims.yaml"


def evidence(value: float, p: float, *, objects: bool = False) -> Evidence:
    return Evidence("a - b", MeanDifference(value, 0.1, value - 0.2, value + 0.2, p), objects, 9)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([evidence(1, 0.01)], CONFIRMED),
        ([evidence(-1, 0.01)], REFUTED),
        ([evidence(1, 0.2)], OPEN),
        ([evidence(-1, 0.2)], OPEN),
        ([evidence(1, 0.001), evidence(1, 0.04)], CONFIRMED),
        ([evidence(1, 0.03), evidence(1, 0.04)], OPEN),  # by Holm, .06 both
        ([evidence(1, 0.001), evidence(1, 0.2)], OPEN),  # all of it is claimed
        ([evidence(1, 0.001), evidence(-1, 0.001)], REFUTED),  # and one half is wrong
        ([evidence(1, 0.2), evidence(-1, 0.001)], REFUTED),
        ([evidence(1, 0.001, objects=True)], OPEN),
        ([evidence(-1, 0.001, objects=True)], OPEN),
        ([], OPEN),
    ],
)
def test_a_verdict_is_confirmed_refuted_or_neither(found: Sequence[Evidence], verdict: str) -> None:
    assert judge(found) == verdict


@pytest.mark.parametrize(
    ("reversed_pairs", "verdict"),
    [
        ([(3, 10), (2, 10)], REFUTED),
        ([(0, 10), (0, 12)], CONFIRMED),
        ([(0, 10), (4, 10)], OPEN),  # it depends on the rate
        ([(1, 20)], CONFIRMED),
        ([(0, 0)], OPEN),  # nothing was told apart
        ([], OPEN),
    ],
)
def test_one_rate_for_all_is_judged_by_the_pairs_that_it_reverses(
    reversed_pairs: Sequence[tuple[int, int]], verdict: str
) -> None:
    assert judge_one_rate(reversed_pairs) == verdict


def verdict(gain: float, draw: np.random.Generator, claim: Claim) -> str:
    result = simulated_study(draw, {"old": 0.0, "new": gain}, 3, [60, 60])
    return judge([pair_evidence(result, result.method(one), result.method(two)) for one, two in claim.better])


def test_verdicts_are_seldom_wrong_and_find_what_is_there() -> None:
    """Of 150 studies each: no difference, one in the claim's direction, and one against it."""
    claim = Claim("", "", better=(("new", "old"),))
    draw = np.random.default_rng(0)
    none, above, below = ([verdict(gain, draw, claim) for _ in range(150)] for gain in (0.0, 0.6, -0.6))
    wrong = 150 - none.count(OPEN)
    assert stats.binomtest(wrong, 150, 0.05, alternative="greater").pvalue > 0.05
    assert above.count(CONFIRMED) > 120
    assert below.count(REFUTED) > 120
    assert not above.count(REFUTED) + below.count(CONFIRMED)


def test_what_is_not_resolved_says_how_many_seeds_would_do() -> None:
    draw = np.random.default_rng(3)
    result = simulated_study(draw, {"old": 0.0, "new": 0.15}, 2, [200])
    found = pair_evidence(result, result.method("new"), result.method("old"))
    finding = claims._finding(result, [found], searched=False)
    assert finding.verdict == OPEN
    assert found.needed
    assert finding.words == f"not resolvable with 200 items and 2 seeds (needs {found.needed})"
    assert f"new - old: {found.difference.value:+.3f} [" in finding.ours
    many = simulated_study(draw, {"old": 0.0, "new": 0.0}, 2, [20])
    few = pair_evidence(many, many.method("new"), many.method("old"))
    assert "(needs more items)" in claims._finding(many, [few._replace(needed=None)], searched=False).words


def test_rates_on_a_ladder_are_known_to_a_step_only() -> None:
    """However many seeds agree, the best rate lies somewhere about its rung."""
    equal, apart = (paired_over_seeds([-3.0] * 99, [value] * 99, rounding=0.5) for value in (-3.0, -2.0))
    mixed = paired_over_seeds([-3.0] * 8, [-2.5, -3.0, -3.5, -2.5, -2.5, -3.0, -3.0, -2.5], rounding=0.5)
    assert (equal.low, equal.high) == pytest.approx((-0.4, 0.4), abs=0.001)
    assert mixed.p > 0.05
    assert apart.low == pytest.approx(0.6, abs=0.001)
    assert paired_over_seeds([-3.0] * 9, [-1.0] * 9).high == math.inf  # nothing varied, so nothing is known


def test_methods_that_compute_the_same_are_told_from_others() -> None:
    lora, parallel = {"name": "lora+mpc-n", "r": 8, "alpha": 8}, {"name": "parallel", "bottleneck": 8}
    assert compute_the_same(lora, parallel)
    assert not compute_the_same({"name": "lora", "r": 8, "alpha": 8}, parallel)
    assert not compute_the_same(lora, {**parallel, "scale": 2.0})


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of two methods: ssb is better by a twentieth, and its best rate is ten times as high."""
    root = tmp_path_factory.mktemp("claims")
    text = STUDY.replace("{runs}", str(root / "runs")).replace(
        "{{ladder: 3, step: 3.1623}}", "[1.0e-3, 0.01, 0.1, 1.0]"
    )
    text = text.replace("{{halving: {{first: 0.2, rungs: [0.4]}}}}", "{{seeds: [100, 101], halving: null}}")
    file = make_study(root, "[lora, ssb]", text.replace("[0, 1]", "[0, 1, 2]"))
    best = {"lora": -2.0, "ssb": -1.0}

    def loss(label: str, rate: float, seed: int, step: int) -> float:
        luck = 0.002 * math.sin(seed + len(label))
        return 1 + (math.log10(rate) - best[label]) ** 2 - 0.05 * (label == "ssb") + luck

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "is_finished", lambda config: True)
        assert Executor(open_grid(read_study(file), write=True), made_up(loss)).execute()
    return file


def test_a_claim_is_settled_by_its_study(studied: Path) -> None:
    def finding(**values: object) -> claims.Finding:
        return settle(Claim("", "", study=studied.name, **values), studied.parent)  # type: ignore[arg-type]

    right = finding(better=(("ssb", "lora"),))
    assert right.verdict == CONFIRMED
    assert right.ours.startswith("ssb - lora: +0.05")
    assert right.ours.endswith("nats of held-out loss")
    assert finding(better=(("lora", "ssb"),)).verdict == REFUTED
    assert finding(better=(("ssb or lora", "lora"),)).verdict == CONFIRMED  # the search found ssb better
    lower = finding(lower_rate=("lora", "ssb"))
    assert lower.verdict == CONFIRMED
    assert "lora's best rate lies below ssb's: +1.000 [+0." in lower.ours
    assert finding(lower_rate=("ssb", "lora")).verdict == REFUTED
    assert finding(lower_rate=("lora", "lora")).words == "not resolvable with 2 seeds"
    with pytest.raises(UserError, match=r"compares no 'sbs'. Did you mean 'ssb'"):
        finding(better=(("sbs", "lora"),))


def test_a_claim_without_its_study_has_no_verdict(studied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = studied.parent
    make_study(root, "[lora, dora]", STUDY.replace("{runs}", str(root / "other")), name="unrun")
    file = root / "claims.yaml"
    file.write_text(
        "A: {claim: first, published: '1', study: unrun.yaml, better: [[dora, lora]], hours: 2}\n"
        "B: {claim: second, published: '2', study: toy.yaml, better: [[ssb, lora]], hours: 2}\n"
        "C: {claim: third, published: '3', untested: nothing is there}\n"
    )
    assert main(["study", "claims", str(file)]) == 0
    capsys.readouterr()
    text = (root / "CLAIMS.md").read_text()
    first, second, third = (line for line in text.splitlines() if line.startswith(("| A", "| B", "| C")))
    assert "subspace study run" in first
    assert "about 2 h" in first
    assert NOT_RUN in first
    assert CONFIRMED in second
    assert "nothing is there" in third
    for folder in (root / "runs" / "toy" / "ssb").glob("*/seed-0"):
        (folder / "environment.json").unlink()
    assert "to the end, " in settle(read_claims(file)["B"], root).words
    assert main(["study", "claims", str(root / "none.yaml")]) == 2


def test_claims_are_written_in_the_form_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, text = tmp_path / "claims.yaml", "A: {claim: first, published: '1 < 2', untested: nothing is there}\n"
    file.write_text(text)
    row = {
        "claim": "A",
        "what it says": "first",
        "published": "1 < 2",
        HEAD[3]: "-",
        "verdict": "not run: nothing is there",
    }
    assert main(["study", "claims", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [row]
    assert main(["study", "claims", str(file), "--markdown"]) == 0
    assert f"| {' | '.join(row.values())} |" in capsys.readouterr().out.splitlines()
    assert main(["study", "claims", str(file), "--output", str(tmp_path / "claims.csv")]) == 0
    written = csv.DictReader((tmp_path / "claims.csv").read_text().splitlines())
    assert list(written) == [row | {HEAD[3]: "'-"}]  # not a formula
    assert main(["study", "claims", str(file), "--format", "latex"]) == 0
    assert r"\begin{tabular}" in capsys.readouterr().out
    (tmp_path / "CLAIMS.md").unlink()
    assert main(["study", "claims", str(file), "--format", "html"]) == 2
    assert "writes no HTML" in capsys.readouterr().err
    assert not (tmp_path / "CLAIMS.md").exists()


def test_an_earlier_verdict_stands_where_the_study_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it was written on another machine, a claim of other words not; the table says which ones they are."""
    study = STUDY.replace("{runs}", str(tmp_path / "runs"))
    make_study(tmp_path, "[lora, dora]", study, name="unrun")
    file, out = tmp_path / "claims.yaml", tmp_path / "CLAIMS.md"
    lines = [
        f"{name}: {{claim: '{name} | first', published: '1', study: unrun.yaml, better: [[dora, lora]], hours: 2}}\n"
        for name in ("A", "B")
    ]
    file.write_text("".join(lines))
    assert main(["study", "claims", str(file)]) == 0
    first, second = (line for line in out.read_text().splitlines() if line.startswith(("| A", "| B")))
    settled = f"| A | A \\| first | 1 | dora - lora: +0.100 [+0.050, +0.150] log-odds | {CONFIRMED} |"
    assert first.startswith(settled[:20])
    out.write_text(
        out.read_text().replace(first, settled).replace(second, settled.replace("A", "B").replace(" 1 ", " 2 "))
    )
    for _ in range(2):
        assert main(["study", "claims", str(file)]) == 0
        found = out.read_text()
        assert settled in found.splitlines()
        assert second in found.splitlines()
        assert "- A: as an earlier table says" in found
    capsys.readouterr()


def test_the_shipped_claims_are_of_studies_that_are_there() -> None:
    """Their labels are compared, their studies shipped, and what was written says what the list says."""
    written = (FILE.with_name("CLAIMS.md")).read_text()
    found = read_claims(FILE)
    assert list(found) == [f"C{number}" for number in range(1, 10)]
    for name, claim in found.items():
        assert f"| {name} | {claim.claim}" in written
        if not claim.study:
            assert claim.same or claim.untested
            continue
        study = read_study(FILE.with_name(claim.study))
        labels = {method.label for method in study.methods}
        named = [label for pair in (*claim.better, claim.lower_rate) for side in pair for label in side.split(" or ")]
        assert set(named) <= labels
        assert named or claim.one_rate
        assert claim.hours > 0
