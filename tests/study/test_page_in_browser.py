"""Pages in headless Chromium: nothing fails or is fetched, no text meets another, and a keyboard is enough."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from subspace.study.page.page import study_page
from tests.helpers.browser import CHROMIUM, Browser, browser
from tests.helpers.made_studies import HOSTILE, METHODS, made_study, renamed
from tests.helpers.pages import MEASURE, SHOWN_MARKS, marks

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium: as root on Debian, apt-get install chromium"),
]
#: Widths of a phone, a tablet and a screen; and of a sheet of A4 within its margins.
WIDTHS, SHEET = (360, 768, 1280), 703


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = dict(zip(METHODS, HOSTILE, strict=False))
    studies = {
        "many": made_study(),
        "two": made_study(["lora", "ssb"]),
        "losses": made_study(METHODS[:5], scored=False),
        "begun": made_study(METHODS[:6], ended=False),
        "hostile": renamed(made_study(METHODS[:12]), names),
    }
    folder = tmp_path_factory.mktemp("pages")
    for name, made in studies.items():
        (folder / f"{name}.html").write_text(study_page(*made), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in studies}


@pytest.mark.parametrize("name", ["many", "two", "losses", "begun", "hostile"])
def test_a_page_fits_everywhere(chromium: Browser, pages: dict[str, Path], name: str) -> None:
    chromium.open(pages[name], WIDTHS[0])
    expected = {f"{panel}-{number}": count for panel, counts in marks(pages[name].read_text()).items()
                for number, count in enumerate(counts, 1)}  # fmt: skip
    panels = {drawing.rpartition("-")[0] for drawing in expected}
    for width, media in [*((width, "screen") for width in WIDTHS), (SHEET, "print")]:
        chromium.resize(width, media=media)
        assert chromium.run(MEASURE) == [], (width, media)
        shown = {key.split()[0].removesuffix("-title"): count for key, count in chromium.run(SHOWN_MARKS).items()}
        assert shown == {drawing: expected[drawing] for drawing in shown}
        assert {drawing.rpartition("-")[0] for drawing in shown} == panels
    requests = [e["params"]["request"]["url"] for e in chromium.events if e["method"] == "Network.requestWillBeSent"]
    assert requests == [pages[name].as_uri()]
    said = [e for e in chromium.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert said == []


def test_a_keyboard_reaches_everything(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["two"], 768)
    wanted = chromium.run(
        "document.querySelectorAll('a, figure, summary').length + [...document.querySelectorAll('.scroll')]"
        ".filter(e => e.getClientRects().length && !e.closest('details:not([open])')).length"
    )
    reached = []
    for _ in range(wanted):
        chromium.press("Tab")
        reached.append(
            chromium.run(
                "(() => { const e = document.activeElement; e.dataset.reached = 1; const s = getComputedStyle(e);"
                "return [e.tagName, s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2] })()"
            )
        )
    assert all(outlined for _, outlined in reached), reached
    assert chromium.run("document.querySelectorAll('[data-reached]').length") == wanted
    assert reached[0][0] == "A"  # past the head at once


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_light_or_dark_as_its_reader_is(chromium: Browser, pages: dict[str, Path], scheme: str) -> None:
    chromium.open(pages["two"], 768, scheme=scheme)
    paper = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper.removeprefix("rgb(").removesuffix(")").split(","))) > 384) == (scheme == "light")
