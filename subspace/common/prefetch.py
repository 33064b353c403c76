"""Preparation of the next item while the present one is used."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(calls: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """Yield the result of each call in order, each computed by a thread while the one before it is used.

    One call is ahead, and none beyond the last. An error is raised where its result would have been yielded. Use it in
    ``contextlib.closing``: the thread ends with the iterator.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        ahead: Future[T] | None = None
        for call in calls:
            present, ahead = ahead, thread.submit(call)
            if present is not None:
                yield present.result()
        if ahead is not None:
            yield ahead.result()
