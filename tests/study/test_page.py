"""A study's page: every number has its mark, every text is escaped, and nothing is needed that is not in it."""

from __future__ import annotations

import html
import math
import re
from typing import Any

import pytest

from subspace.study.page.page import study_page
from subspace.study.report import report_grid, sentences
from tests.helpers.made_studies import HOSTILE, METHODS, Made, made_study, renamed
from tests.helpers.pages import check_page, marks


@pytest.fixture(scope="module")
def many() -> Made:
    return made_study()


def test_a_page_of_many_methods_has_all_marks(many: Made) -> None:
    result, _, curves = many
    page = study_page(*many)
    check_page(page)
    found = marks(page)
    losses, rungs = result.losses, result.grid.rules.rungs
    first = sum(step == rungs[0] for _, _, step in losses)
    finals = {row["method"] for row in curves}
    steps = {row["step"] for row in curves}
    assert found == {
        "effects-1": [len(METHODS)] * 2,
        "effects-2": [len(METHODS)] * 2,
        "rates-1": [first] * 3,
        "rates-2": [2 * len(METHODS)] * 2,
        "rates-3": [len(result.taus)] * 2,
        "rates-4": [sum(label == m.contender.label for label, _, _ in losses) for m in result.methods],
        "training-1": [len(finals) * len(steps)] * 3,
        "training-2": [3 * len(steps)] * len(METHODS),
        **{f"costs-{number}": [len(METHODS)] * 2 for number in range(1, 5)},
    }
    assert page.count("data-chosen=") == 4 * len(METHODS)
    assert page.count('data-chosen="high"') == 4 * sum(m.edge == "high" for m in result.methods) > 0


def test_what_was_found_stands_in_words(many: Made) -> None:
    result = many[0]
    text = html.unescape(study_page(*many))
    for note in sentences(result):
        assert note in text
    rate, _, first = min(result.taus, key=lambda tau: tau[1])
    assert f"At {rate:.2g} for all, {first} would be first; tuned, it is {result.methods[0].contender.label}." in text
    assert "The finals' losses are" in text
    assert "Smallest difference that these 78 runs could show against lora" in text
    for row in report_grid(result).rows:
        assert all(cell in text for cell in row)


def test_every_chart_has_its_numbers_and_a_summary(many: Made) -> None:
    found = check_page(study_page(*many))
    figures = found.all("figure")
    in_figures = [tag for tag, _, around in found.elements if "figure" in around]
    assert in_figures.count("details") == in_figures.count("table") == len(figures)
    assert in_figures.count("desc") == in_figures.count("svg") - sum("aria-hidden" in a for a in found.all("svg"))
    page = study_page(*many)
    assert all(len(text) > 5 for text in re.findall(r"<desc[^>]*>(.*?)</desc>", page))


@pytest.mark.parametrize(
    "about",
    [
        {"labels": ["lora", "ssb"]},
        {"labels": ["lora", "ssb"], "seeds": 1},
        {"labels": METHODS[:5], "scored": False},
        {"labels": METHODS[:3], "scored": False, "seeds": 1},
        {"labels": METHODS[:6], "ended": False},
    ],
    ids=["two", "one seed", "losses", "losses of one seed", "begun"],
)
def test_small_and_unfinished_studies_have_a_page(about: dict[str, Any]) -> None:
    made = made_study(**about)
    page = study_page(*made)
    check_page(page)
    assert "rates-1" in marks(page)
    assert ("effects-1" in marks(page)) == made[0].outcome.ended
    assert not re.search(r'(?:points|d|x|y|cx|cy|width|height|viewBox)="[^"]*(?:nan|inf)', page)


def test_one_seed_of_losses_says_nothing_of_a_front() -> None:
    page = study_page(*made_study(METHODS[:3], scored=False, seeds=1))
    assert "one seed says nothing of how surely" in page
    assert "share of bootstrap draws" not in page


def test_names_of_any_kind_are_text(many: Made) -> None:
    page = study_page(*renamed(many, dict(zip(METHODS, HOSTILE, strict=False))), [(HOSTILE[0], HOSTILE[1])])
    found = check_page(page)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page)
    text = "".join(found.text)
    assert "<script>alert(1)</script>" in text
    assert "{{ 7 * 7 }}" in text
    assert "W" * 200 in text
    assert marks(page) == marks(study_page(*many))
    for label in HOSTILE[:3]:
        assert label not in page
        assert html.escape(label, quote=False) in page.replace("&#34;", '"').replace("&#39;", "'")


def test_a_failed_training_stands_at_the_top() -> None:
    result, cells, curves = made_study(METHODS[:8])
    assert any(math.isinf(loss) for loss in result.losses.values())
    page = study_page(result, cells, curves)
    assert re.search(r'data-mark="cross"><title>\S+: failed at', page)
    assert ">failed<" in page


def test_the_same_study_gives_the_same_page() -> None:
    made = made_study(METHODS[:4])
    assert study_page(*made) == study_page(*made_study(METHODS[:4]))


def test_its_size_is_that_of_a_picture(many: Made) -> None:
    assert len(study_page(*many).encode()) < 1_000_000


def test_the_table_for_latex_has_only_what_latex_knows(many: Made) -> None:
    latex = report_grid(many[0]).latex()
    rows = [line for line in latex.splitlines() if not line.startswith("%")]
    assert "$\\uparrow$" in latex
    assert all(row.isascii() for row in rows)
    assert latex.count("\\toprule") == latex.count("\\bottomrule") == 1
