"""Sampling of the rows of each optimizer step, and their assignment to ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from subspace.errors import UserError

GROUPED_STEPS = 64  # steps whose rows are sorted by length together: more reduces padding, fewer shuffles better

Integers = npt.NDArray[np.int64]


def draw_steps(num_rows: int, *, batch: int, epochs: float = 1.0, steps: int | None = None, seed: int = 0) -> Integers:
    """Return the rows that a run's steps take from the shuffled data, in the order of the shuffle: ``(steps, batch)``.

    Every epoch is a new shuffle of all rows, and the epochs are concatenated, so a step may span two of them. Every
    step has exactly ``batch`` rows, every epoch has every row once, and only rows that do not fill a last step are left
    over. The result is known before any row is encoded.

    Args:
        num_rows: number of rows to train on.
        batch: rows of a step, over all processes.
        epochs: passes over all rows, used if ``steps`` is None.
        steps: number of steps, whatever the epochs.
        seed: seed of the shuffles.

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
    """Rows of each optimizer step: ``plan[k]`` has those of step k, longest first, over all processes.

    The rows are those of ``draw_steps``. With ``group_by_length``, the rows of 64 successive steps are regrouped by
    length among these steps. Only the lengths of rows that a step takes matter.
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
            drawn = np.concatenate([_regroup(drawn[at : at + GROUPED_STEPS], lengths, (seed, at, 0)) for at in groups])
        longest_first = np.argsort(-lengths[drawn], axis=1, kind="stable")
        self._rows = np.take_along_axis(drawn, longest_first, axis=1)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, step: int) -> list[int]:
        return [int(row) for row in self._rows[step]]


def _regroup(steps: Integers, lengths: npt.NDArray[np.int64], seed: tuple[int, int, int]) -> Integers:
    """Return the same rows regrouped into steps of similar length, with the steps in random order.

    ``seed`` has three numbers, so that it never equals the seed of an epoch, which has two.
    """
    rows = steps.ravel()
    by_length = rows[np.argsort(lengths[rows], kind="stable")].reshape(steps.shape)
    return np.random.default_rng(seed).permutation(by_length)


def shard_batch(numbers: Sequence[int], rank: int, ranks: int, accumulate: int) -> list[list[int]]:
    """Return this rank's micro-batches of a step's rows.

    ``numbers`` are sorted by length, longest first. Ranks process rows of similar length at the same time, so that none
    waits for another.

    Raises:
        UserError: there are fewer rows than micro-batches.
    """
    if len(numbers) < ranks * accumulate:
        raise UserError(
            f"a step of {len(numbers)} rows cannot be shared by {ranks} processes in {accumulate} micro-batches each. "
            f"Make train.batch_size at least {ranks * accumulate}"
        )
    together = np.array_split(np.asarray(numbers), accumulate)
    return [[int(number) for number in part[rank::ranks]] for part in together]
