"""The examination: every rank collects facts, rank 0 gathers and judges them.

Nothing waits for ever. A rank that does not come or report is named after ``wait`` seconds, and so is a process group
that does not form: the process that hangs in it is ended, after the report.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from subspace.config import read_config
from subspace.distributed import launcher
from subspace.distributed.signals import write_status
from subspace.doctor.base import (
    ALONE,
    CONNECTED,
    ERROR,
    TOGETHER,
    Asked,
    Finding,
    Seen,
    attempt,
    describe,
    failed,
    is_error,
)
from subspace.doctor.checks import CHECKS
from subspace.doctor.meeting import Meeting, address
from subspace.doctor.report import Report
from subspace.errors import UserError
from subspace.planning.plan import Plan, build_plan

Show = Callable[[Report], None]


def examine(config_file: str | None, settings: Sequence[str], show: Show, *, wait: float = 30.0) -> int:
    """Examine this machine, or all machines of a launch, and return the exit status. Collective over ranks.

    Args:
        config_file: the run's configuration; None checks what needs none.
        settings: ``key=value`` that override it.
        show: called on rank 0 with the report.
        wait: seconds to wait for ranks that do not come or report.

    Raises:
        UserError: this rank, not the first, cannot reach the first.
    """
    rank = launcher.launched_rank()
    asked = Asked(rank, launcher.launched_world_size(), secrets.token_hex(4), config_file=config_file, wait=wait)
    if config_file:
        try:
            asked.config = read_config(config_file, settings)
        except UserError as error:  # a finding of this host
            asked.config_error = str(error)
    try:
        meeting = Meeting(wait)
    except (RuntimeError, OSError) as error:
        if rank:
            time.sleep(wait / 2)  # the first may wait for others, and its report says more; this one's end would end it
            raise UserError(
                f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at {address()}: {describe(error)}. "
                "Does that process run, does the name lead there, does a firewall stand between?"
            ) from None
        return _alone(asked, describe(error), show)
    return _follow(meeting, asked) if rank else _lead(meeting, asked, show)


def _alone(asked: Asked, reason: str, show: Show) -> int:
    """Report what rank 0 sees by itself if the others cannot come."""
    try:
        facts = {**_collect(ALONE, asked), **_collect(TOGETHER, asked)}
    finally:
        _end(asked)
    trouble = failed(
        f"rank 0 cannot listen at {address()}: {reason}",
        "another process may have the port: start again, or set MASTER_PORT to a free one",
    )
    absent = [None] * (asked.ranks - 1)
    return _show([socket.gethostname(), *absent], [facts, *absent], asked, show, trouble)


def _lead(meeting: Meeting, asked: Asked, show: Show) -> int:
    """Collect, gather and judge on rank 0."""
    wait = asked.wait
    meeting.announce("name", asked.name)
    meeting.post("host", socket.gethostname())
    try:
        meeting.post(ALONE, _collect(ALONE, asked))
        hosts = meeting.gather("host", wait)
        facts = meeting.gather(ALONE, wait, _present(hosts))
        asked.here, now = _present(facts), time.time()
        meeting.announce(TOGETHER, [asked.here, now])
        asked.clock = (now, now)
        meeting.post(TOGETHER, _collect(TOGETHER, asked))
        facts = _merged(facts, meeting.gather(TOGETHER, wait, asked.here))
    finally:
        _end(asked)

    complete = None not in facts
    meeting.announce(CONNECTED, complete)
    if complete:

        def give_up() -> None:
            _, *others = meeting.gather(CONNECTED, 1.0)
            hung = {check.name: {ERROR: f"not done within {wait:g} s"} for check in CHECKS if check.phase == CONNECTED}
            status = _show(hosts, _merged(facts, [hung, *(other or hung for other in others)]), asked, show)
            meeting.announce("status", status)
            _leave(status)

        with _limit(wait, give_up):
            meeting.post(CONNECTED, _collect(CONNECTED, asked))
            facts = _merged(facts, meeting.gather(CONNECTED, wait))
    status = _show(hosts, facts, asked, show)
    meeting.announce("status", status)
    meeting.post("end", True)
    meeting.gather("end", 2.0)  # this process holds the store that the others read
    return status


def _follow(meeting: Meeting, asked: Asked) -> int:
    """Collect on another rank, and return rank 0's status."""
    wait = asked.wait
    asked.name = meeting.hear("name", wait) or asked.name
    meeting.post("host", socket.gethostname())
    try:
        meeting.post(ALONE, _collect(ALONE, asked))
        if heard := meeting.hear(TOGETHER, 3 * wait):
            asked.here, then = heard
            asked.clock = (then, time.time())
        meeting.post(TOGETHER, _collect(TOGETHER, asked))
        connects = meeting.hear(CONNECTED, 2 * wait)
    finally:
        _end(asked)
    if connects:
        with _limit(2 * wait, lambda: _leave(2)):
            meeting.post(CONNECTED, _collect(CONNECTED, asked))
    status = meeting.hear("status", 3 * wait)
    meeting.post("end", True)
    return 2 if status is None else int(status)


def _present(values: Sequence[Any]) -> list[int]:
    """Return the ranks that posted something."""
    return [rank for rank, value in enumerate(values) if value is not None]


def _collect(phase: str, asked: Asked) -> dict[str, Any]:
    """Return the facts of a phase's checks; in the first one, also prepare those of later phases."""
    facts: dict[str, Any] = {}
    for check in CHECKS:
        if check.phase == phase:
            facts[check.name] = attempt(check, "collect", asked)
        elif phase == ALONE and is_error(begun := attempt(check, "begin", asked)):
            facts[check.name] = begun
    return facts


def _end(asked: Asked) -> None:
    for check in CHECKS:
        attempt(check, "end", asked)


def _merged(facts: Sequence[Any], more: Sequence[Any]) -> list[Any]:
    """Return each rank's facts of two phases; an error of the first one stays."""
    return [old and {**(new or {}), **old} for old, new in zip(facts, more, strict=True)]


def _show(hosts: Sequence[Any], facts: Sequence[Any], asked: Asked, show: Show, *troubles: Finding) -> int:
    """Judge the facts, show the report and return its status."""
    report = Report.of(Seen(hosts, facts, asked.config, asked.config_file, _plan(asked), troubles, address()))
    show(report)
    sys.stdout.flush()
    return report.status


def _plan(asked: Asked) -> Plan | None:
    """Return the run's estimate; None if there is none, the reason for which is a finding of other checks."""
    try:
        return build_plan(asked.config, processes=asked.ranks) if asked.config else None
    except Exception:
        return None


@contextmanager
def _limit(seconds: float, give_up: Callable[[], None]) -> Iterator[None]:
    """Call a function, in another thread, if the block takes longer than so many seconds."""
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave(status: int) -> None:
    """End a process whose main thread hangs in a collective."""
    sys.stdout.flush()
    if launcher.launched_rank() == 0:
        write_status(status)
    os._exit(status)
