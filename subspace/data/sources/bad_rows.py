"""Rows that cannot be trained on: all of a source are counted by reason, and refused or left out together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from subspace.data.rows import BadRow
from subspace.errors import UserError

REFUSE, DROP = "refuse", "drop"
SHOWN = 3


@dataclass
class BadRows:
    """Bad rows of a source: their number by reason, and the first ``SHOWN``."""

    reasons: Counter[str] = field(default_factory=Counter)
    first: list[BadRow] = field(default_factory=list)

    def add(self, row: BadRow) -> None:
        """Count a row."""
        self.reasons[row.reason] += 1
        if len(self.first) < SHOWN:
            self.first.append(row)

    def __len__(self) -> int:
        return self.reasons.total()

    def as_dict(self) -> dict[str, Any]:
        """Return the counts and the first rows as JSON values, for ``BadRows.from_dict``."""
        return {"reasons": dict(self.reasons), "first": [[row.where, row.reason, row.detail] for row in self.first]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BadRows:
        """Return what ``as_dict`` was called on."""
        return cls(Counter(values["reasons"]), [BadRow(*row) for row in values["first"]])

    def settle(self, name: str, rows: int, choice: str) -> list[str]:
        """Return a notice about the rows that are left out, if there are any.

        Args:
            name: the source's.
            rows: how many it has, the bad ones included.
            choice: ``data.bad_rows``.

        Raises:
            UserError: the choice is to refuse them; or nothing else is there.
        """
        if not self:
            return []
        if choice == DROP and len(self) < rows:
            return [f"{len(self):,} of {rows:,} rows of {name} are left out: {self._counts()}. {self._examples()}"]
        if rows == 1:
            raise UserError(f"{self.first[0]}. It is the only row")
        if len(self) == 1:
            raise UserError(f"{self.first[0]}. Mend the row, or leave it out: data.bad_rows=drop")
        hint = ". Mend them, or leave them out: data.bad_rows=drop" if len(self) < rows else ""
        if any("the tokenizer's chat template" in reason for reason in self.reasons):
            hint += ". Another template writes them with data.chat_template=FILE"
        found = f"{len(self):,} of {rows:,} rows cannot be trained on: {self._counts()}"
        raise UserError(f"{name}: {found}. {self._examples()}{hint}")

    def _counts(self) -> str:
        return "; ".join(f"{reason} ({count:,})" for reason, count in self.reasons.most_common())

    def _examples(self) -> str:
        shown = "; ".join(map(str, self.first))
        return f"The first {len(self.first)}: {shown}" if len(self) > 1 else shown
