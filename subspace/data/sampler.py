"""Sampling of rows: which are trained on, which are held out, and which make each step, micro-batch by micro-batch.

The rows of a run are the beginning of an endless sequence: every epoch is a new shuffle of all rows, and the epochs
follow one another without a seam, so that a step may span two of them. A run takes a number of rows from it, in steps
of ``batch`` rows; what is left for the last step makes a smaller one. A longer run begins as a shorter one, but for
that last step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from subspace.data.tasks import MixturePart
from subspace.errors import UserError

GROUPED_STEPS = 64  # steps whose rows are sorted by length together: more reduces padding, fewer shuffles better

Integers = npt.NDArray[np.int64]

HELD_OUT = 120
"""Rows held out where a validation is due and no number is given, of a tenth of the rows at most."""


def count_rows(num_rows: int, *, batch: int, epochs: float = 1.0, steps: int | None = None) -> int:
    """Return how many rows a run takes, each as often as it takes it.

    Args:
        num_rows: number of rows to train on.
        batch: rows of a step, over all processes.
        epochs: passes over all rows, used if ``steps`` is None.
        steps: number of full steps, whatever the epochs.

    Raises:
        UserError: there are no rows, or the epochs are less than one row.
    """
    if not num_rows:
        raise UserError("there are no rows to train on")
    if steps is not None:
        return steps * batch
    if not (taken := round(epochs * num_rows)):
        raise UserError(
            f"train.epochs={epochs:g} of {num_rows:,} rows are less than one row, so nothing would be trained. Set "
            "train.epochs=1, or train.steps for a number of steps"
        )
    return taken


def draw_steps(
    num_rows: int,
    *,
    batch: int,
    epochs: float = 1.0,
    steps: int | None = None,
    seed: int = 0,
    group_by_length: bool = True,
) -> Integers:
    """Return the rows whose lengths :class:`StepPlan` must know, in the order of the shuffles, full steps of them.

    The result is known before any row is encoded. With ``group_by_length`` it ends with a block of steps that are
    grouped together, of which the run may need the first ones only.

    Args:
        num_rows: number of rows to train on.
        batch: rows of a step, over all processes.
        epochs: passes over all rows, used if ``steps`` is None.
        steps: number of steps, whatever the epochs.
        seed: seed of the shuffles.
        group_by_length: whether steps are grouped by length.

    Raises:
        UserError: there are no rows to train on.
    """
    wanted = -(-count_rows(num_rows, batch=batch, epochs=epochs, steps=steps) // batch)
    blocks = _blocks(num_rows, batch, wanted) if group_by_length else iter(())
    return _shuffled(num_rows, batch * max([wanted, *(end for _, end in blocks)]), seed)


class StepPlan:
    """Rows of each optimizer step: ``plan[k]`` has those of step k, longest first, over all processes.

    With ``group_by_length``, the rows of up to 64 successive steps are regrouped by length among these steps. Steps are
    grouped within an epoch, wherever the run ends, so that a longer run has the same steps; one that spans two epochs
    is left as it is. Only the lengths of the rows of :func:`draw_steps` matter.

    Args:
        lengths: the number of tokens of each row.
        batch: rows of a step, over all processes.
        epochs: passes over all rows, used if ``steps`` is None.
        steps: number of steps, whatever the epochs.
        seed: seed of the shuffles.
        group_by_length: whether steps are grouped by length.
        former: plan as up to version 0.1, for its checkpoints: without a smaller last step, and with steps grouped
            among all of the run.
    """

    def __init__(
        self,
        lengths: npt.ArrayLike,
        batch: int,
        epochs: float = 1.0,
        steps: int | None = None,
        seed: int = 0,
        group_by_length: bool = True,
        *,
        former: bool = False,
    ) -> None:
        lengths = np.asarray(lengths)
        self.batch, self.num_rows, self.former = batch, len(lengths), former
        if former and steps is None:
            steps = max(1, int(epochs * len(lengths) / batch))
        self.taken = count_rows(len(lengths), batch=batch, epochs=epochs, steps=steps)
        wanted = -(-self.taken // batch)
        blocks = list(_former_blocks(wanted) if former else _blocks(len(lengths), batch, wanted))
        drawn = _shuffled(len(lengths), batch * max([wanted, *(end for _, end in blocks)]), seed).reshape(-1, batch)
        for begin, end in blocks if group_by_length else ():
            drawn[begin:end] = _regroup(drawn[begin:end], lengths, (seed, begin, 0))
        self._rows = drawn[:wanted]
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, step: int) -> list[int]:
        step = range(len(self))[step]
        rows = self._rows[step][: self.taken - step * self.batch]
        return [int(row) for row in rows[np.argsort(-self._lengths[rows], kind="stable")]]

    def rows_until(self, steps: int) -> int:
        """Return how many rows the first ``steps`` steps take."""
        return min(steps * self.batch, self.taken)

    @property
    def ends_small(self) -> bool:
        """Whether the last step has fewer rows than the others, of which there are some."""
        return len(self) > 1 and self.taken < len(self) * self.batch

    @property
    def all_rows(self) -> Integers:
        """The rows of all steps, each as often as it is taken."""
        return self._rows.ravel()[: self.taken]


def _shuffled(num_rows: int, count: int, seed: int) -> Integers:
    """Return the first rows of the endless sequence of shuffles."""
    passes = -(-count // num_rows)
    shuffled = [np.random.default_rng((seed, epoch)).permutation(num_rows) for epoch in range(passes)]
    return np.concatenate(shuffled)[:count]


def _blocks(num_rows: int, batch: int, steps: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the end of the steps that are grouped together, of all blocks that begin before ``steps``.

    They depend on the data and the batch alone. Of each epoch they are its whole steps, 64 at a time.
    """
    epoch = 0
    while (first := -(-epoch * num_rows // batch)) < steps:
        end = (epoch + 1) * num_rows // batch
        for begin in range(first, min(end, steps), GROUPED_STEPS):
            yield begin, min(begin + GROUPED_STEPS, end)
        epoch += 1


def _former_blocks(steps: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, steps, GROUPED_STEPS):
        yield begin, min(begin + GROUPED_STEPS, steps)


def _regroup(steps: Integers, lengths: npt.NDArray[np.int64], seed: tuple[int, int, int]) -> Integers:
    """Return the same rows regrouped into steps of similar length, with the steps in random order.

    ``seed`` has three numbers, so that it never equals the seed of an epoch, which has two.
    """
    rows = steps.ravel()
    by_length = rows[np.argsort(lengths[rows], kind="stable")].reshape(steps.shape)
    return np.random.default_rng(seed).permutation(by_length)


def shard_batch(numbers: Sequence[int], rank: int, ranks: int, accumulate: int) -> list[list[int]]:
    """Return this rank's micro-batches of a step's rows, ``accumulate`` of them; some are empty in a small step.

    ``numbers`` are sorted by length, longest first. Ranks process rows of similar length at the same time, so that none
    waits for another.
    """
    together = np.array_split(np.asarray(numbers), accumulate)
    return [[int(number) for number in part[rank::ranks]] for part in together]


def take_rows(available: int, part: MixturePart, draw: np.random.Generator) -> Integers:
    """Return the rows that a mixture takes of a part: whole repetitions, and a random draw for the remainder."""
    first = np.arange(available)[: part.first]
    wanted = round(part.weight * len(first)) if part.rows is None else part.rows
    repetitions, rest = divmod(wanted, len(first)) if len(first) else (0, 0)
    return np.concatenate([*[first] * repetitions, np.sort(draw.permutation(first)[:rest])]).astype(np.int64)


def hold_out(
    order: Integers, keys: Integers, count: int | None, name: str, draw: np.random.Generator
) -> tuple[Integers, Integers]:
    """Return the rows to train on and to hold out; duplicates are never held out, since a copy would be trained on.

    Without a ``count``, these are :data:`HELD_OUT` rows, of a tenth of them at most, but one at least.
    """
    _, inverse, times = np.unique(keys[order], return_inverse=True, return_counts=True)
    once = np.flatnonzero(times[inverse] == 1)
    if count is None:
        count = max(1, min(HELD_OUT, len(order) // 10, len(once)))
        if count > len(once) or count >= len(order):
            raise UserError(
                f"a validation is due, for which no row of {name} can be held out: of its {len(order):,} rows "
                f"{len(once):,} occur only once, and some must remain to train on. Set train.validate_every=0, and "
                "neither train.patience nor train.save_final=best"
            )
    if count > len(once) or count >= len(order):
        raise UserError(
            f"data.validation={count} rows were to be held out of {name}, but of its {len(order):,} rows {len(once):,} "
            "occur only once, and some must remain to train on. Make data.validation smaller"
        )
    held_out = np.sort(draw.permutation(once)[:count])
    return np.delete(order, held_out), order[held_out]
