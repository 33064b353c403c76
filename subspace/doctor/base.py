"""What a check is, what it may ask, and what it finds.

A check has two halves: ``collect`` runs on every rank and returns plain facts; ``judge`` is a pure function of the
facts of all ranks and runs on rank 0. Help, table, JSON and tests are read off the class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from subspace.config import RunConfig
    from subspace.planning.plan import Plan

#: States of a finding, the worst last.
SKIPPED, OK, WARNING, FAILED = STATES = ("skipped", "ok", "warning", "failed")
#: When a check collects: by itself; after every rank has done so; in a process group.
ALONE, TOGETHER, CONNECTED = PHASES = ("alone", "together", "connected")
#: The key of a fact that could not be collected.
ERROR = "error"

Facts = Mapping[int, Any]
"""The facts of one check by rank."""


@dataclass(frozen=True)
class Finding:
    """One thing that a check found: its state, what was found, and what to do about it."""

    state: str
    found: str
    advice: str = ""


def ok(found: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(OK, found)


def warning(found: str, advice: str) -> Finding:
    """Return a finding that a run survives."""
    return Finding(WARNING, found, advice)


def failed(found: str, advice: str) -> Finding:
    """Return a finding that a run does not survive."""
    return Finding(FAILED, found, advice)


def skipped(found: str) -> Finding:
    """Return the finding of a check that had nothing to look at, and why."""
    return Finding(SKIPPED, found)


@dataclass
class Asked:
    """What a rank knows while it collects.

    Attributes:
        name: a random name of this call, equal on all ranks.
        config: the run's configuration, if one was given and could be read here.
        config_file: its file, if one was given.
        config_error: why it could not be read here.
        here: the ranks that have collected by themselves; known in the phase ``together``.
        clock: rank 0's clock and this one at the same moment, in seconds; known in the phase ``together``.
        wait: seconds that one rank waits for others.
    """

    rank: int
    ranks: int
    name: str
    config: RunConfig | None = None
    config_file: str | None = None
    config_error: str | None = None
    here: Sequence[int] = (0,)
    clock: tuple[float, float] | None = None
    wait: float = 30.0


@dataclass(frozen=True)
class Seen:
    """What rank 0 knows when it judges.

    Attributes:
        hosts: each rank's host; None for a rank that did not come.
        facts: each rank's facts by check; None for a rank that did not report.
        config: the run's configuration, if one was given and could be read.
        plan: the estimate of that run, if it can be estimated.
        troubles: what went wrong between the ranks.
        address: where they met.
    """

    hosts: Sequence[str | None]
    facts: Sequence[Mapping[str, Any] | None]
    config: RunConfig | None = None
    config_file: str | None = None
    plan: Plan | None = None
    troubles: Sequence[Finding] = ()
    address: str = ""

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return len(self.hosts)

    @property
    def several_hosts(self) -> bool:
        """True if the processes run on more than one host."""
        return len(set(filter(None, self.hosts))) > 1

    def of(self, name: str) -> dict[int, Any]:
        """Return a check's facts by rank; a fact that could not be collected is a mapping with the key ``error``."""
        return {rank: facts[name] for rank, facts in enumerate(self.facts) if facts and name in facts}

    def by_host(self, facts: Iterable[int]) -> dict[str, list[int]]:
        """Return those ranks by host."""
        found: dict[str, list[int]] = {}
        for rank in facts:
            found.setdefault(self.hosts[rank] or "?", []).append(rank)
        return found

    def where(self, ranks: Iterable[int]) -> str:
        """Return ranks with their hosts, as ``ranks 0-3 on a``."""
        listed = sorted(ranks)
        return f"{named(listed)} on {', '.join(self.by_host(listed))}"

    def differences(self, facts: Facts, key: str) -> str | None:
        """Return who has which value of a key, if not all ranks have the same; None if they do."""
        groups = group({rank: fact.get(key) for rank, fact in facts.items()})
        if len(groups) < 2:
            return None
        return "; ".join(f"{value if value is not None else 'none'} ({self.where(ranks)})" for value, ranks in groups)


class Check(ABC):
    """A check. Its subclasses are listed in :mod:`subspace.doctor.checks`, in the order of the table."""

    #: One word, for the table and JSON.
    name: ClassVar[str]
    #: What it looks at, for ``--help``.
    asks: ClassVar[str]
    #: When :meth:`collect` is called.
    phase: ClassVar[str] = ALONE
    #: Whether it judges even if no rank could collect anything.
    always: ClassVar[bool] = False
    #: What to do if it cannot collect.
    advice: ClassVar[str] = "the check itself failed; what it was looking at is probably out of order"

    def begin(self, asked: Asked) -> None:  # noqa: B027  (most checks need no preparation)
        """Prepare what other ranks will look for. Called alone, before a :meth:`collect` of a later phase."""

    @abstractmethod
    def collect(self, asked: Asked) -> Any:
        """Return facts that JSON can represent. What it raises is reported as a failed check."""

    @abstractmethod
    def judge(self, seen: Seen, facts: Facts) -> Iterable[Finding]:
        """Yield findings from the facts of the ranks that could collect them: a pure function."""

    def end(self, asked: Asked) -> None:  # noqa: B027
        """Remove what :meth:`begin` left. Called when all ranks have collected."""

    def findings(self, seen: Seen) -> list[Finding]:
        """Return what the check finds; it never raises."""
        facts = seen.of(self.name)
        broken = {rank: fact[ERROR] for rank, fact in facts.items() if is_error(fact)}
        found = [failed(f"{text} ({seen.where(ranks)})", self.advice) for text, ranks in group(broken)]
        whole = {rank: fact for rank, fact in facts.items() if rank not in broken}
        try:
            found += self.judge(seen, whole) if whole or self.always else []
        except Exception as error:
            found.append(failed(describe(error), f"{self.advice}; --json shows the facts"))
        return found or [skipped("not reached")]


def is_error(fact: Any) -> bool:
    """Return True for a fact that could not be collected."""
    return isinstance(fact, dict) and set(fact) == {ERROR}


def attempt(check: Check, call: str, asked: Asked) -> Any:
    """Return what a method of a check returns, or what it raises as a fact."""
    try:
        return getattr(check, call)(asked)
    except Exception as error:
        return {ERROR: describe(error)}


def describe(error: BaseException) -> str:
    """Return an error as one line."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def sentences(message: str) -> tuple[str, str]:
    """Return what a UserError says is wrong, and its last sentence, which says what to do."""
    wrong, _, advice = message.rpartition(". ")
    return (wrong, advice) if wrong else (advice, "")


def group(values: Mapping[int, Any]) -> list[tuple[Any, list[int]]]:
    """Return the different values with the ranks that have each, the most frequent first."""
    groups: dict[str, tuple[Any, list[int]]] = {}
    for rank, value in values.items():
        groups.setdefault(repr(value), (value, []))[1].append(rank)
    return sorted(groups.values(), key=lambda item: -len(item[1]))


def named(ranks: Sequence[int]) -> str:
    """Return ascending ranks as ``rank 2`` or ``ranks 0-3, 6``."""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {spans(ranks)}"


def spans(numbers: Iterable[int]) -> str:
    """Return ascending numbers as ``0-3, 6``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def size(count: float) -> str:
    """Return a number of bytes as people read it."""
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, length = next((one for one in units if count >= one[1]), ("bytes", 1))
    return f"{count / length:,.0f} {unit}" if count / length >= 100 or length == 1 else f"{count / length:,.1f} {unit}"
