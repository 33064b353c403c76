"""What a model can take: so many tokens in a row, and ids below so many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from subspace.errors import UserError

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class ModelLimits:
    """Bounds of a model; None where it has none, or none is known.

    Attributes:
        positions: tokens of a row.
        embeddings: rows of its embedding, which every token id must be below.
    """

    positions: int | None = None
    embeddings: int | None = None

    def check_ids(self, ids: datasets.Dataset, where: Callable[[int], str], token: Callable[[int], str]) -> None:
        """Raise UserError if a token id of encoded rows is beyond the embedding.

        Args:
            ids: a table with ``input_ids``.
            where: from a row of it to the row's place.
            token: from an id to its text.
        """
        if self.embeddings is None:
            return
        at = 0
        for batch in ids.data.column("input_ids").chunks:
            flat = np.asarray(batch.flatten().to_numpy(zero_copy_only=False))
            if len(flat) and int(flat.max()) >= self.embeddings:
                first = int(np.flatnonzero(flat >= self.embeddings)[0])
                begins = np.asarray(batch.offsets.to_numpy()) - batch.offsets[0].as_py()
                row = at + int(np.searchsorted(begins, first, side="right")) - 1
                number = int(flat[first])
                raise UserError(
                    f"{where(row)}: the token {token(number)!r} has the id {number:,}, and the model's embedding has "
                    f"only {self.embeddings:,} rows: a token was added to the tokenizer, but not to the model. Take "
                    "the model's own tokenizer, or a model that was resized and saved"
                )
            at += len(batch)


NO_LIMITS = ModelLimits()
