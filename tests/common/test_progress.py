"""What the package has to say goes to its logger; the command line shows it on standard error."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import time
from collections.abc import Iterator

import pytest

from subspace.common import progress
from subspace.common.progress import no_progress, show_notices, show_progress
from subspace.distributed import watchdog


@pytest.fixture
def package() -> Iterator[logging.Logger]:
    """Give the package's logger as a program finds it that uses the package as a library."""
    package = logging.getLogger("subspace")
    before = package.handlers[:], package.level, package.propagate
    package.handlers, package.propagate = [], True
    package.setLevel(logging.NOTSET)
    yield package
    package.handlers, package.propagate = before[0], before[2]
    package.setLevel(before[1])


def test_a_library_call_shows_nothing(package: logging.Logger, capfd: pytest.CaptureFixture[str]) -> None:
    with show_progress("reading", 10, "rows") as at:
        at(5)
    assert capfd.readouterr() == ("", "")


def test_a_program_may_route_what_is_said(package: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "subspace")
    with show_progress("reading", 10, "rows"):
        pass
    assert [record.getMessage() for record in caplog.records] == ["reading ...", "reading: done in 0 s"]


def test_the_command_line_shows_each_line_once(package: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    show_notices()
    show_notices()
    with show_progress("reading", 10, "rows"):
        pass
    assert capsys.readouterr().err == "reading ...\nreading: done in 0 s\n"


def test_lines_go_where_standard_error_is_led_meanwhile(package: logging.Logger) -> None:
    show_notices()
    above_the_bar = io.StringIO()
    with contextlib.redirect_stderr(above_the_bar):
        logging.getLogger("subspace.training").info("a note")
    assert above_the_bar.getvalue() == "a note\n"


def test_a_line_now_and_then_says_how_far_it_is(
    package: logging.Logger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    show_notices()
    clock = iter([0.0, 5.0, 20.0, 90.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with show_progress("downloading", 4e6, "bytes") as at:
        at(1e6)
        at(2e6, "slowly")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "downloading ...",
        "downloading: 2 of 4 MB, 20 s left  slowly",
        "downloading: done in 1 min 30 s",
    ]


def test_no_progress_takes_the_same_calls(capsys: pytest.CaptureFixture[str]) -> None:
    with no_progress("reading", 10, "rows") as at:
        at(5, "half")
    assert capsys.readouterr() == ("", "")
    assert progress.SECONDS_BETWEEN_LINES > 0


def test_a_sign_of_life_is_due_where_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    signs = progress.SignsOfLife()
    signs.last = 100.0
    signs.note("the loading of the model")
    monkeypatch.setattr(signs, "_since", 95.0)
    assert signs.due(109.9) is None
    assert signs.due(110.0) == "the loading of the model: still at it, for 15 s"
    signs.hidden += 1  # a bar
    assert signs.due(110.0) is None


def test_a_program_goes_on_saying_what_it_is_at(
    package: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    monkeypatch.setattr(progress, "signs", progress.SignsOfLife())
    show_notices()
    progress.signs.start("mine.yaml: loading libraries")
    until_said("mine.yaml: loading libraries: still at it, for 0 s", capsys)
    progress.signs.note("the loading of the model")
    until_said("the loading of the model: still at it, for 0 s", capsys)
    assert progress.signs.last > 0  # the line puts off the next one
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "signs of life"]
    progress.signs.stop()
    thread.join(10)
    assert not thread.is_alive()


def until_said(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = ""
    for _ in range(2000):
        said += capsys.readouterr().err
        if f"{line}\n" in said:
            return
        time.sleep(0.005)
    raise AssertionError(f"nothing but {said!r} was said")


def test_what_a_run_waits_for_is_what_its_signs_of_life_say(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[str] = []
    monkeypatch.setattr(progress.signs, "note", noted.append)
    watchdog.beat("the meeting of all processes")
    watchdog.beat(3)  # steps show themselves
    assert noted == ["the meeting of all processes"]
