"""Which rows each optimizer step trains on, and which of them a process computes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from subspace.errors import UserError

GROUPED_STEPS = 64  # steps whose rows are sorted by length together: more pads less, fewer shuffles better

Integers = npt.NDArray[np.int64]


def draw_steps(num_rows: int, *, batch: int, epochs: float = 1.0, steps: int | None = None, seed: int = 0) -> Integers:
    """Return the rows that a run's steps take from the shuffled data, in the order of the shuffle: ``(steps, batch)``.

    Every epoch is a fresh shuffle of all rows, and the epochs follow one another without a seam: a step that begins in
    one may end in the next. So every step has exactly ``batch`` rows, every epoch has every row once, and only what
    does not fill a step at the very end is left over. This is known before any row is encoded.

    Args:
        num_rows: rows to train on.
        batch: rows of a step, over all processes.
        epochs: how often every row is fed, where ``steps`` is None.
        steps: how many steps, whatever the epochs.
        seed: of the shuffles.

    Raises:
        UserError: there are no rows.
    """
    if not num_rows:
        raise UserError("there are no rows to train on")
    count = max(1, int(epochs * num_rows / batch)) if steps is None else steps
    passes = -(-count * batch // num_rows)
    shuffled = [np.random.default_rng((seed, epoch)).permutation(num_rows) for epoch in range(passes)]
    return np.concatenate(shuffled)[: count * batch].reshape(count, batch)


class StepPlan:
    """Which rows each optimizer step trains on: ``plan[k]`` are those of step k, longest first, over all processes.

    The rows are those of ``draw_steps``. With ``group_by_length``, the rows of 64 successive steps are dealt out to
    these steps by length. Only the lengths of rows that a step takes matter.
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
        drawn = draw_steps(len(lengths), batch=batch, epochs=epochs, steps=steps, seed=seed)
        if group_by_length:
            groups = range(0, len(drawn), GROUPED_STEPS)
            drawn = np.concatenate([_deal(drawn[at : at + GROUPED_STEPS], lengths, (seed, at, 0)) for at in groups])
        longest_first = np.argsort(-lengths[drawn], axis=1, kind="stable")
        self._rows = np.take_along_axis(drawn, longest_first, axis=1)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, step: int) -> list[int]:
        return [int(row) for row in self._rows[step]]


def _deal(steps: Integers, lengths: npt.NDArray[np.int64], seed: tuple[int, int, int]) -> Integers:
    """Return the same rows in steps of rows of like length, the steps in a random order.

    ``seed`` is three numbers, so that this is never the draw of an epoch, which has two.
    """
    rows = steps.ravel()
    by_length = rows[np.argsort(lengths[rows], kind="stable")].reshape(steps.shape)
    return np.random.default_rng(seed).permutation(by_length)


def shard_batch(numbers: Sequence[int], rank: int, ranks: int, accumulate: int) -> list[list[int]]:
    """Return this rank's micro-batches of a step's rows.

    The rows come longest first. Rows of like length are fed at the same time, so that no rank waits for another.
    """
    if len(numbers) < ranks * accumulate:
        raise UserError(
            f"a step of {len(numbers)} rows cannot be shared by {ranks} processes in {accumulate} micro-batches each. "
            f"Make train.batch_size at least {ranks * accumulate}"
        )
    together = np.array_split(np.asarray(numbers), accumulate)
    return [[int(number) for number in part[rank::ranks]] for part in together]
