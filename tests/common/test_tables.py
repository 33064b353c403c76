"""Tables in a terminal: as wide as it is, with every number."""

from __future__ import annotations

import pytest

from subspace.common.tables import Grid, print_grid

HEAD = ("task", *(f"run number {number}" for number in range(12)))
ROWS = tuple((f"suite {row}", *(f"{row}.{number}" for number in range(12))) for row in range(3))
GRID = Grid("scores", HEAD, ROWS, ("a note that is longer than most terminals are wide, with many words " * 3,), last=1)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_lost(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    print_grid(GRID)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for row in ROWS:
        assert set(row[1:]) <= set(words)
    assert sum(line.split()[:2] == ["suite", "0"] for line in lines) == {60: 4, 80: 3, 200: 1}[width]


def test_a_pipe_has_no_width(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_grid(GRID)
    lines = capsys.readouterr().out.splitlines()
    assert all(any(" ".join(row[1:]) in " ".join(line.split()) for line in lines) for row in ROWS)
