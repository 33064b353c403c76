"""The planted bugs of tests/planted_bugs.py can still be planted, in the file and at the place that they name."""

from __future__ import annotations

from subspace.common.paths import REPOSITORY
from tests.planted_bugs import BUGS


def test_every_bug_can_be_planted() -> None:
    gone = [bug.what for bug in BUGS if bug.right not in (REPOSITORY / "subspace" / bug.file).read_text()]
    assert gone == []


def test_every_bug_names_tests_that_are_there() -> None:
    named = {name for bug in BUGS for name in bug.tests.split()}
    assert [name for name in sorted(named) if not (REPOSITORY / "tests" / f"{name}.py").is_file()] == []
