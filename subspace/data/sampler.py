"""Part of sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from subspace.errors import UserError

if TYPE_CHECKING:
    pass


GROUPED_STEPS = 64  # steps whose rows are sorted by length together: more pads less, fewer shuffles better


class StepPlan:
    """Which rows each optimizer step trains on: ``plan[k]`` are those of step k, longest first, over all processes.

    Every epoch is a fresh shuffle of all rows, and the epochs follow one another without a seam: a step that begins in
    one may end in the next. So every step has exactly ``batch`` rows, every epoch has every row once, and only what
    does not fill a step at the very end is left over. With ``group_by_length``, the rows of 64 successive steps are
    dealt out to them by length.
    """

    def __init__(
        self,
        lengths: npt.ArrayLike,
        batch: int,
        epochs: float = 1.0,
        steps: int | None = None,
        seed: int = 0,
        group_by_length: bool = True,
    ) -> None:
        lengths = np.asarray(lengths)
        if not len(lengths):
            raise UserError("there are no rows to train on")
        count = max(1, int(epochs * len(lengths) / batch)) if steps is None else steps
        passes = -(-count * batch // len(lengths))
        shuffled = [np.random.default_rng((seed, epoch)).permutation(len(lengths)) for epoch in range(passes)]
        order = np.concatenate(shuffled)[: count * batch].reshape(count, batch)

        if group_by_length:
            for start in range(0, count, GROUPED_STEPS):
                together = order[start : start + GROUPED_STEPS]
                by_length = together.ravel()[np.argsort(lengths[together.ravel()], kind="stable")]
                # Three numbers, so that this is never the draw of an epoch.
                together[:] = np.random.default_rng((seed, start, 0)).permutation(by_length.reshape(-1, batch))
        self._order = np.take_along_axis(order, np.argsort(-lengths[order], axis=1, kind="stable"), axis=1)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, step: int) -> list[int]:
        return [int(row) for row in self._order[step]]


def shard_batch(numbers: Sequence[int], rank: int, ranks: int, accumulate: int) -> list[list[int]]:
    """Return this rank's micro-batches of a step's rows.

    The rows come longest first. Rows of like length are fed at the same time, so that no rank waits for another.
    """
    if len(numbers) < ranks * accumulate:
        raise UserError(
            f"a step of {len(numbers)} rows cannot be shared by {ranks} processes in {accumulate} micro-batches each. "
            f"Make train.batch at least {ranks * accumulate}"
        )
    together = np.array_split(np.asarray(numbers), accumulate)
    return [[int(number) for number in part[rank::ranks]] for part in together]
