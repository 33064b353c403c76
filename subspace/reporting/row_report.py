"""``subspace data FILE``: what a user's own data holds, row by row, without a tokenizer, a model or a suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from subspace.common.tables import Grid
from subspace.data.config import DataConfig
from subspace.data.rows import BadRow
from subspace.data.sources.bad_rows import DROP, BadRows
from subspace.data.sources.shapes import Seen
from subspace.data.tasks import find_mixture


@dataclass(frozen=True)
class SourceReport:
    """Counts of one source: its rows by their shapes, the bad ones by reason, and keys that are not used."""

    name: str
    files: int
    rows: int
    shapes: Mapping[str, int]
    bad: Mapping[str, int]
    first_bad: tuple[str, ...]
    unused: Mapping[str, int]
    notices: tuple[str, ...]


@dataclass(frozen=True)
class RowReport:
    """Counts of all sources of a mixture that are a user's own; ``bad_rows`` is the setting."""

    sources: tuple[SourceReport, ...]
    bad_rows: str

    @property
    def refused(self) -> bool:
        """True if training would refuse to start over these rows."""
        return any(source.bad and (self.bad_rows != DROP or not source.shapes) for source in self.sources)

    @property
    def grid(self) -> Grid:
        """The report as a table."""
        rows, notes = [], []
        for source in self.sources:
            bad = sum(source.bad.values())
            rows.append((source.name, "rows", f"{source.rows:,}"))
            rows += [("", f"of the shape: {shape}", f"{count:,}") for shape, count in source.shapes.items()]
            if bad:
                rows.append(("", "left out" if self.bad_rows == DROP else "refused", f"{bad:,}"))
                rows += [("", f"  {reason}", f"{count:,}") for reason, count in source.bad.items()]
            rows += [("", f"with the key {key}, which is not used", f"{n:,}") for key, n in source.unused.items()]
            notes += [*source.notices, *source.first_bad]
        if self.refused:
            notes.append("training refuses to start over them: mend them, or leave them out by data.bad_rows=drop")
        return Grid("rows of your own", ("data", "what", "rows"), tuple(rows), tuple(notes), left=2)

    def as_dict(self) -> list[dict[str, Any]]:
        """Return the report as JSON values."""
        return [asdict(source) for source in self.sources]


def report_rows(data: DataConfig) -> RowReport:
    """Return counts of the sources in the mixture that are a user's own; none if it has tasks only.

    Raises:
        UserError: one is not there, or damaged.
    """
    reports = []
    for part in {part.name: part for part in find_mixture(data.mixture).parts if part.data}.values():
        source, seen, bad = part.source(data.columns), Seen(), BadRows()
        for row in source.rows(seen):
            if isinstance(row, BadRow):
                bad.add(row)
        reports.append(
            SourceReport(
                source.name,
                len(source.files),
                seen.rows,
                dict(seen.shapes.most_common()),
                dict(bad.reasons.most_common()),
                tuple(map(str, bad.first)),
                dict(seen.unused.most_common()),
                source.notices,
            )
        )
    return RowReport(tuple(reports), data.bad_rows)
