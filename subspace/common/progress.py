"""Progress reports: a bar in a terminal, occasional plain lines in a log file.

All other messages go to the loggers below ``subspace``, which a program that uses the package as a library may
configure; the command line shows them on standard error.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TextIO

from subspace.errors import printable


class ProgressCallback(Protocol):
    """Callback with the amount of the stage that is done, and a short note."""

    def __call__(self, done: float, detail: str = "") -> None: ...


Progress = Callable[[str, float, str], AbstractContextManager[ProgressCallback]]
"""Opens a stage: what is being done, how much there is to do (0: not known), and its unit (``bytes``, ``rows``)."""

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class _StandardError(logging.StreamHandler):  # type: ignore[type-arg]
    """Stream that writes to the current ``sys.stderr``, which a bar replaces in order to print lines above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    def format(self, record: logging.LogRecord) -> str:
        # What a file or a model says of itself may stand in a message.
        return printable(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        signs.last = record.created
        super().emit(record)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


class SignsOfLife:
    """Lines that say what a program is at, every ten seconds in which it says nothing else.

    So nobody takes for dead what loads libraries, waits for other processes, or reads a model from a slow disk.

    Attributes:
        last: when the last line was said.
        hidden: how many displays there are that show for themselves that the program goes on.
    """

    def __init__(self) -> None:
        self.last, self.hidden = 0.0, 0
        self._doing, self._since = "", 0.0
        self._ended: threading.Event | None = None

    def start(self, doing: str) -> None:
        """Begin, unless it has begun; ``doing`` is what the program is at."""
        if self._ended is None:
            self._ended, self.last = threading.Event(), time.time()
            self.note(doing)
            threading.Thread(target=self._run, args=(self._ended,), name="signs of life", daemon=True).start()

    def note(self, doing: str) -> None:
        """Say from now on that the program is at this."""
        if doing != self._doing:
            self._doing, self._since = doing, time.time()

    def stop(self) -> None:
        """Say no more."""
        if self._ended:
            self._ended.set()
            self._ended = None

    def due(self, now: float) -> str | None:
        """Return the line that is to be said at a time, in seconds as of :func:`time.time`; None if there is none."""
        if self.hidden or now - self.last < SECONDS_BETWEEN_LINES:
            return None
        return f"{self._doing}: still at it, for {_clock(now - self._since)}"

    def _run(self, ended: threading.Event) -> None:
        while not ended.wait(min(1.0, SECONDS_BETWEEN_LINES)):
            if line := self.due(time.time()):
                logger.info(line)


signs = SignsOfLife()


def show_notices() -> None:
    """Show the package's log messages on standard error; to be called by programs, never by a library."""
    package = logging.getLogger("subspace")
    if not package.handlers:
        package.addHandler(_StandardError())
        package.setLevel(logging.INFO)
        package.propagate = False


def no_progress(title: str, total: float = 0, unit: str = "") -> AbstractContextManager[ProgressCallback]:
    """Ignore progress; the default of library calls, and of every rank but the first."""
    return nullcontext(lambda done, detail="": None)


def show_progress(title: str, total: float = 0, unit: str = "") -> AbstractContextManager[ProgressCallback]:
    """Show a stage's progress on standard error, so that standard output stays clean for ``--json``."""
    return _bar(title, total, unit) if sys.stderr.isatty() else _lines(title, total, unit)


@contextmanager
def _bar(title: str, total: float, unit: str) -> Iterator[ProgressCallback]:
    from rich import progress
    from rich.console import Console

    amount = {"bytes": progress.DownloadColumn(), "": progress.TextColumn("")}.get(unit, progress.MofNCompleteColumn())
    bars = progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        amount,
        progress.TextColumn("{task.fields[detail]}", markup=False),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=Console(file=sys.stderr),  # itself, whatever others redirect meanwhile
    )
    with bars, _shown():
        stage = bars.add_task(title, total=total or None, detail="")
        yield lambda done, detail="": bars.update(stage, completed=done, detail=detail)
        bars.update(stage, total=total or 1, completed=total or 1)


@contextmanager
def _shown() -> Iterator[None]:
    signs.hidden += 1
    try:
        yield
    finally:
        signs.hidden -= 1


@contextmanager
def _lines(title: str, total: float, unit: str) -> Iterator[ProgressCallback]:
    begun = last = time.monotonic()

    def at(done: float, detail: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = f", {_clock((now - begun) / done * (total - done))} left" if total and done else ""
            logger.info(f"{title}: {_amount(done, total, unit)}{left}{f'  {detail}' if detail else ''}")

    logger.info(f"{title} ...")
    yield at
    logger.info(f"{title}: done in {_clock(time.monotonic() - begun)}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _amount(done: float, total: float, unit: str) -> str:
    if unit == "bytes":
        done, total, unit = done / 1e6, total / 1e6, "MB"
    of = f" of {total:,.0f}" if total else ""
    return f"{done:,.0f}{of} {unit}".rstrip() if unit else "still at it"
