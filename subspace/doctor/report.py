"""The report: a line for each check, as a table or JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from subspace.common.tables import Grid
from subspace.doctor.base import FAILED, OK, STATES, WARNING, Finding, Seen
from subspace.doctor.checks import CHECKS

#: Exit status if a check failed.
FAILURE = 2


@dataclass(frozen=True)
class Line:
    """One check with what it found."""

    name: str
    asks: str
    findings: tuple[Finding, ...]

    @property
    def state(self) -> str:
        """The worst state of its findings."""
        return max((finding.state for finding in self.findings), key=STATES.index)

    @property
    def worst(self) -> list[Finding]:
        """The findings worth a line: failures and warnings, or what is well if there are none."""
        bad = [finding for finding in self.findings if finding.state in (WARNING, FAILED)]
        return sorted(bad, key=lambda finding: -STATES.index(finding.state)) or list(self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"name": self.name, "asks": self.asks, "state": self.state, "findings": list(map(asdict, self.worst))}


@dataclass(frozen=True)
class Report:
    """What all checks found, and the facts that they judged."""

    lines: tuple[Line, ...]
    seen: Seen

    @classmethod
    def of(cls, seen: Seen) -> Report:
        """Return the report of all checks."""
        return cls(tuple(Line(check.name, check.asks, tuple(check.findings(seen))) for check in CHECKS), seen)

    @property
    def status(self) -> int:
        """The exit status: 0, or 2 if a check failed."""
        return FAILURE if any(line.state == FAILED for line in self.lines) else 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values: each check, and the facts of each rank."""
        return {
            "status": self.status,
            "hosts": list(self.seen.hosts),
            "checks": [line.as_dict() for line in self.lines],
            "facts": list(self.seen.facts),
        }

    @property
    def grid(self) -> Grid:
        """The table: a line for each check, and one more for each further finding of it."""
        rows: list[tuple[str, ...]] = []
        for line in self.lines:
            for number, finding in enumerate(line.worst):
                rows.append(("" if number else line.name, finding.state, finding.found, finding.advice))
        head = ("check", "", "found", "what to do")
        columns = len(head) if any(row[-1] for row in rows) else len(head) - 1
        return Grid("", head[:columns], tuple(row[:columns] for row in rows), (self.verdict,), left=columns)

    @property
    def verdict(self) -> str:
        """One sentence on the whole."""
        named = {state: [line.name for line in self.lines if line.state == state] for state in STATES}
        told = [
            f"{len(named[state])} {state}: {', '.join(named[state])}" for state in (FAILED, WARNING) if named[state]
        ]
        return "; ".join(told) or f"{len(named[OK])} checks are ok"
