"""The next item is made while the present one is used: in order, one ahead, and by a thread that ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial

import pytest

from subspace.common.prefetch import prefetch


class Calls:
    """Functions that return their numbers, and wait to be allowed to if ``held``; ``made`` has those that ran."""

    def __init__(self, count: int, held: int | None = None) -> None:
        self.made: list[int] = []
        self.held, self.release = held, threading.Event()
        self.functions: list[Callable[[], int]] = [partial(self, number) for number in range(count)]

    def __call__(self, number: int) -> int:
        if number == self.held:
            assert self.release.wait(20)
        self.made.append(number)
        return number


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_results_come_in_order(count: int) -> None:
    calls = Calls(count)
    assert list(prefetch(calls.functions)) == list(range(count)) == calls.made
    assert not threads()


def test_a_result_is_had_while_the_next_is_being_made() -> None:
    calls = Calls(3, held=1)
    with closing(prefetch(calls.functions)) as results:
        assert next(results) == 0  # though call 1 cannot return yet
        calls.release.set()
        assert next(results) == 1


def test_only_one_is_ahead() -> None:
    calls = Calls(9)
    with closing(prefetch(calls.functions)) as results:
        next(results)
    assert calls.made == [0, 1]


def test_an_error_comes_in_its_turn_and_as_itself() -> None:
    def fail() -> int:
        raise LookupError("row 7 is not encoded")

    results = prefetch([lambda: 1, fail, lambda: 3])
    assert next(results) == 1
    with pytest.raises(LookupError, match="row 7"):
        next(results)
    assert not threads()


def test_the_thread_ends_with_a_run_that_fails() -> None:
    def run() -> None:
        with closing(prefetch(Calls(9).functions)) as results:
            next(results)
            assert threads()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert not threads()
