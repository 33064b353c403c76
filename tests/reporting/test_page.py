"""Charts and pages: places of texts and marks, axes, colours, and the pages of `table` and `compare`."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from subspace.cli.main import main
from subspace.reporting.page import charts, document
from subspace.reporting.page.charts import STYLES, Axis, Cloud, Curve, Dot, Point
from subspace.reporting.page.figure import SHAPES, Scale, large_number, linear, logarithmic, rate_number, ticks
from subspace.reporting.page.text import Box, fitted, place_labels, text_width
from tests.helpers.pages import check_page, marks
from tests.reporting.test_comparison import FIRST
from tests.reporting.test_tables import run

STYLE = (Path(document.__file__).parent / "style.css").read_text(encoding="utf-8")


@pytest.mark.parametrize("seed", range(20))
def test_ticks_are_round_few_and_on_the_axis(seed: int) -> None:
    draw = np.random.default_rng(seed)
    low = float(draw.normal() * 10.0 ** draw.integers(-3, 4))
    high = low + float(10 ** draw.uniform(-3, 4))
    for most in (2, 3, 6):
        scale = Scale(low, high, 0, 100)
        found = ticks(scale, most)
        assert 1 <= len(found) <= most
        assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
        positive = Scale(abs(low) + 1e-6, abs(low) + 1e-6 + high - low, 0, 100, log=True)
        assert 1 <= len(ticks(positive, most)) <= most
    assert ticks(Scale(1e-4, 3e-2, 0, 100, log=True), 3) == pytest.approx([1e-4, 1e-3, 1e-2])
    assert ticks(Scale(0.0, 1.0, 0, 100), 6) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_an_axis_holds_its_numbers_and_equal_ones() -> None:
    for scale in (linear([3, 5, 4], 0, 100), logarithmic([3, 5, 4], 0, 100), linear([2], 0, 100), linear([0], 0, 100)):
        assert scale.low < scale.high
        assert scale(scale.low) == 0
        assert scale(math.inf) == 100
    assert linear([1, 2], 10, 110)(1.5) == pytest.approx(60)
    assert logarithmic([1, 100], 0, 100)(10) == pytest.approx(50)


def test_numbers_are_written_short() -> None:
    assert [rate_number(rate) for rate in (1e-3, 3.2e-4, 0.1)] == ["1e-3", "3.2e-4", "1e-1"]
    assert [large_number(n) for n in (950, 207_360, 1_658_880, 999_999, 7e9)] == ["950", "207k", "1.66M", "1M", "7G"]


def test_a_text_is_cut_to_its_room() -> None:
    for text in ("lora", "W" * 200, "שלום" * 9, "🎉" * 30, "ﷺ" * 5, "漢字" * 20):
        for room in (20, 60, 110):
            cut = fitted(text, 11, room)
            assert text_width(cut, 11) <= max(room, text_width("…", 11))
            assert cut == text or cut.endswith("…")
    assert fitted("a\nb\u202ec", 11, 100) == "a b c"


@pytest.mark.parametrize("seed", range(5))
def test_no_label_touches_another_or_leaves_the_frame(seed: int) -> None:
    draw = np.random.default_rng(seed)
    frame = Box(30, 20, 330, 260)
    places = draw.uniform((40, 30), (320, 250), (26, 2)).tolist()
    labels = [(x, y, f"method-{number}", number < 4) for number, (x, y) in enumerate(places)]
    found = place_labels(labels, 10, frame)
    boxes = [placed.box for placed in found if placed]
    assert found[0] is not None
    assert len(boxes) > 15
    assert all(box.inside(frame) for box in boxes)
    assert not any(a.meets(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_styles_differ_in_shape_and_in_dashes() -> None:
    drawn = {SHAPES[shape](0, 0, 4) for shape in SHAPES}
    assert len(drawn) == len(SHAPES)
    assert not {"up", "cross", "left", "right"} & set(STYLES)  # what stands beyond an axis is no method
    dashes = [re.search(rf"\.curve\.c{i} {{ stroke-dasharray: ([\d ]+)", STYLE) for i in range(1, len(STYLES))]
    assert len({match[1] for match in dashes if match}) == len(STYLES) - 1


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_texts_and_marks_stand_out_from_the_paper(scheme: str) -> None:
    block = {"light": STYLE[: STYLE.index("@media")], "print": STYLE[STYLE.index("@media print") :]}
    block["dark"] = STYLE[STYLE.index("@media (prefers") : STYLE.index("* {")]
    colours = dict(re.findall(r"--(\w+): #([0-9a-f]{6})", block[scheme]))
    assert len(colours) == 18

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(name: str, paper: str) -> float:
        one, other = sorted((luminance(colours[name]), luminance(colours[paper])))
        return (other + 0.05) / (one + 0.05)

    texts, drawn = ("ink", "quiet", "link"), ("better", "worse", "same", "front", "muted", *(f"c{i}" for i in range(6)))
    wanted = {**dict.fromkeys(texts, 4.5), **dict.fromkeys(drawn, 3.0)}
    found = {(name, paper): contrast(name, paper) for name in wanted for paper in ("paper", "stripe")}
    low = {pair: value for pair, value in found.items() if value < wanted[pair[0]]}
    assert low == {}


def test_intervals_without_an_end_reach_the_end_of_the_axis() -> None:
    rows = [Dot("a", 1.0, -math.inf, math.inf), Dot("b", 0.5, 0.2, 0.8), Dot("c", None, 0, 0)]
    figure = charts.dots("", "", rows, "x", 344, zero=0.0)
    lines = [e.attributes["points"] for e in figure.elements if "interval" in e.attributes["class"]]
    ends = [float(part.split(",")[0]) for part in lines[0].split()]
    assert all(0 < end < 344 for end in ends)
    assert len(lines) == 2
    assert sum("data-mark" in e.attributes for e in figure.elements) == 2


def test_what_lies_beyond_an_axis_is_marked_there() -> None:
    curve = Curve("a", ((1e-3, 2.0), (1e-2, 9.0), (1e-1, math.inf)), 0, 0, "low")
    x, y = Axis("rate", (1e-3, 1e-1), log=True), Axis("loss", (2.0, 3.0))
    figure = charts.curves("", "", [curve], x, y, (344, 200))
    shapes = [e.attributes.get("data-mark") for e in figure.elements]
    assert [shape for shape in shapes if shape] == ["circle", "up", "cross"]
    assert [e.attributes["data-chosen"] for e in figure.elements if "data-chosen" in e.attributes] == ["low"]
    assert sum("arrow" in e.attributes["class"] for e in figure.elements) == 1


def test_up_is_better_whichever_way_a_score_goes() -> None:
    points = (Point("good", 1, 2.0, 2, 2, True, None), Point("bad", 2, 3.0, 3, 3, False, None))
    for lower in (True, False):
        chart = Cloud("", "", points, Axis("cost", (1.0, 2.0)), Axis("score", (2.0, 3.0)), lower=lower)
        heights = {
            e.title[:3]: float(re.findall(r"M\S+ ([\d.]+)", e.attributes["d"])[0])
            for e in charts.cloud(chart, (344, 300)).elements
            if "data-mark" in e.attributes
        }
        assert (heights["goo"] < heights["bad"]) == lower


# The pages of `table` and `compare`, and one way to write them.


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    both = {"boolq": {"acc": FIRST}, "piqa": {"acc": FIRST[::-1]}}
    better = {"boolq": {"acc": "1" * len(FIRST)}, "piqa": {"acc": FIRST[::-1]}}
    return [str(run(tmp_path / "one<b>", both)), str(run(tmp_path / "two", better))]


@pytest.mark.parametrize("verb", ["table", "compare"])
def test_a_page_is_written(verb: str, runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out" / "page.html"
    assert main([verb, *runs, "-o", str(file)]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"written: {file}" in shown.err
    page = file.read_text(encoding="utf-8")
    check_page(page)
    assert "<b>" not in page
    assert "one&lt;b&gt;" in page
    tasks = 3 if verb == "table" else 1  # two tasks and their mean: a chart each, or rows of one
    assert [sum(counts) for counts in marks(page).values()] == ([2] * tasks if verb == "table" else [3 * 3])
    assert main([verb, *runs, "--format", "html"]) == 0
    assert capsys.readouterr().out == page


@pytest.mark.parametrize("verb", ["table", "compare"])
@pytest.mark.parametrize("ending", ["md", "tex", "csv", "json"])
def test_the_ending_of_a_file_is_its_form(
    verb: str, ending: str, runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form = {"md": "markdown", "tex": "latex"}.get(ending, ending)
    assert main([verb, *runs, "-o", str(tmp_path / f"out.{ending}")]) == 0
    assert main([verb, *runs, "-o", str(tmp_path / "other"), "--format", form]) == 0
    capsys.readouterr()
    assert main([verb, *runs, "--format", form]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / f"out.{ending}").read_text() == (tmp_path / "other").read_text()
    begins = {"md": "**", "tex": "% ", "csv": "protocol,", "json": "["}
    assert text.startswith(begins[ending])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["-o", "x.pdf"],
            "x.pdf was given, whose ending names no form: they are .html, .md, .tex, .csv, .json",
        ),
        (["--format", "htm"], "--format htm was given, but there is no such form.* html"),
        (["--format", "html", "--json"], "--format html and --json were given. Give one of them"),
        (["--format", "terminal", "-o", "x.md"], "a terminal's tables are only printed"),
    ],
)
@pytest.mark.parametrize("verb", ["table", "compare"])
def test_a_form_that_there_is_not_is_refused(
    verb: str, more: list[str], said: str, runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, *runs, *more]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not list(Path().glob("x.*"))


def test_every_form_of_a_comparison_has_the_same_numbers(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *runs, "--json"]) == 0
    (plain,) = json.loads(capsys.readouterr().out)
    assert main(["compare", *runs, "--format", "csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["task"] for line in lines] == ["boolq", "piqa", "mean of 2"]
    for line, known in zip(lines, [*plain["tasks"], *plain["means"]], strict=True):
        assert float(line["difference"]) == known["difference"]["value"]
        assert (float(line["low"]), float(line["high"])) == (known["difference"]["low"], known["difference"]["high"])
        assert float(line["p_holm"]) == known["corrected"]
    shown = f"{100 * float(lines[0]['difference']):+.1f}"
    for form in ("markdown", "latex", "html"):
        assert main(["compare", *runs, "--format", form]) == 0
        assert shown in capsys.readouterr().out
