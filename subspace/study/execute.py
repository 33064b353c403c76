"""The execution of a study: one cell after another, each by the command that would train it alone, or several at once.

Cells of one seed that are due up to the same step are trained together, in passes that they share: the outcomes are
those of one after the other, sooner. Several commands may run at a time, each on a device of its own.

Where a study stands is read from the folders of its cells before every step, so the same command goes on after a kill
at any moment. A cell that fails by itself, as by a loss that is not finite, loses its place in the search; whatever
else goes wrong ends the study with the command's own words.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from subspace.common.files import remove_folder, write_file
from subspace.config import read_config, write_config
from subspace.distributed.device import device
from subspace.errors import RunFailed, RunStopped, UserError, nearest
from subspace.evaluation.retention import select_passages
from subspace.resolve import ResolvedRun, resolve_run
from subspace.resumption import is_finished
from subspace.study.cells import CELL_FILE, FAILED_FILE, OUTPUT_FILE, Cell, final_cells, read_search, search_cells
from subspace.study.config import ANSWER_LOGPROB, RETENTION
from subspace.study.grid import Grid
from subspace.study.search import Outcome
from subspace.study.shared_pass import Pass, begin_pass, end_pass, interrupted_passes, take_back
from subspace.together import check_together

logger = logging.getLogger(__name__)

#: Runs the command with these arguments, its output appended to the file, and returns its exit status.
Run = Callable[[Sequence[str], Path], int]


@dataclass
class Executor:
    """Trains and scores what a study lacks.

    Attributes:
        grid: the study's.
        run: starts a command, and waits for its end.
        only: methods to which the cells are limited; empty for all.
        minutes: after so many no other cell is begun; None for no limit.
        together: how many cells are trained in one pass at most.
        parallel: how many commands run at a time; ``run`` is called from as many threads.
        stop: tells the commands that run to end.
        clock: seconds, for ``minutes`` and the progress line.
    """

    grid: Grid
    run: Run
    only: Sequence[str] = ()
    minutes: float | None = None
    together: int = 1
    parallel: int = 1
    stop: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    confirmed: set[Path] = field(default_factory=set)
    resolved: dict[Path, ResolvedRun] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.began, self.steps_before = self.clock(), 0
        known = [contender.label for contender in self.grid.contenders]
        for name in self.only:
            if name not in known:
                raise UserError(f"--only names {name!r}, which the study does not compare. {nearest(name, known)}")

    def execute(self) -> bool:
        """Do all that is due; return False if time ran out, or ``only`` leaves something to be done."""
        self.steps_before = remaining_steps(self.grid, read_search(self.grid)[0])
        while True:
            outcome, _ = read_search(self.grid)
            self._confirm(outcome)
            passes = interrupted_passes(self.grid, self._all_cells(outcome))
            if passes and not self._out_of_time():
                for cells, _ in passes:
                    logger.info(f"{len(cells)} runs were interrupted in passes that they share, and go on together")
                    take_back(cells)
            if not passes:
                tidy(self.grid, outcome)
                passes = self._passes(next_cells(self.grid, outcome, self.only))
            if not passes:
                break
            if not self._run_all([partial(self._train_pass, one) for one in passes]):
                logger.info(f"time is up: {self._remaining()}. The same command goes on")
                return False
        if not outcome.ended or (self.only and remaining_steps(self.grid, outcome)):
            logger.info(f"nothing is left for {', '.join(self.only)}: {self._remaining()}")
            return False
        return self._score(outcome)

    def _run_all(self, jobs: Sequence[Callable[[], None]]) -> bool:
        """Do jobs, ``parallel`` of them at a time; return False if time ran out before the last one began."""

        def do(job: Callable[[], None]) -> bool:
            if self._out_of_time():
                return False
            job()
            return True

        if self.parallel == 1:
            return all(map(do, jobs))
        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                ended = as_completed([pool.submit(do, job) for job in jobs])
                return min([future.result() for future in ended], default=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise

    def _confirm(self, outcome: Outcome) -> None:
        """Raise UserError for a finished cell whose settings are not those of now, once for each."""
        for cell in self._all_cells(outcome):
            if cell.folder not in self.confirmed and cell.ended:
                if not is_finished(cell.config()):
                    raise UserError(
                        f"{cell.folder} is finished, but with other settings than the study has now. Undo the change, "
                        f"give the study another name, or remove that folder to train it again"
                    )
                self.confirmed.add(cell.folder)

    def _all_cells(self, outcome: Outcome) -> list[Cell]:
        return [*search_cells(self.grid, outcome), *final_cells(self.grid, outcome)]

    def _passes(self, due: Sequence[tuple[Cell, int]]) -> list[Pass]:
        """Return the passes that are next: of all cells that are due up to the earliest step.

        Later ones wait, so that which cells share a pass does not depend on which of the others has ended first.
        """
        until = min((step for _, step in due), default=0)
        waiting = [cell for cell, step in due if step == until]
        passes = []
        while waiting:
            passes.append(Pass(self._group(waiting), until))
            taken = {cell.folder for cell in passes[-1].cells}
            waiting = [cell for cell in waiting if cell.folder not in taken]
        return passes

    def _group(self, waiting: Sequence[Cell]) -> list[Cell]:
        """Return the first of these cells, and those that can be trained in one pass with it."""
        group = [first := waiting[0]]
        for cell in waiting[1:]:
            if len(group) < self.together and cell.seed == first.seed:
                with suppress(UserError):
                    check_together([self._resolved(first), self._resolved(cell)])
                    group.append(cell)
        return group

    def _resolved(self, cell: Cell) -> ResolvedRun:
        if cell.folder not in self.resolved:
            self.resolved[cell.folder] = resolve_run(cell.config(), 1, device())
        return self.resolved[cell.folder]

    def _train_pass(self, one: Pass) -> None:
        if len(one.cells) > 1:
            self._train_together(one)
        else:
            self._train(one.cells[0], one.until)

    def _train(self, cell: Cell, until: int) -> None:
        logger.info(f"{cell.method}, rate {cell.trial.rate:g}, seed {cell.seed}: to step {until}. {self._remaining()}")
        output = cell.folder / OUTPUT_FILE
        output.parent.mkdir(parents=True, exist_ok=True)
        status = self.run(cell.train_arguments(until), output)
        if status == RunFailed.status and _failed_by_itself(output):
            write_file(cell.folder / FAILED_FILE, _last_words(output) + "\n")
            logger.info(f"{cell.folder} failed, and counts as the worst: {_last_words(output)}")
            return
        if status:
            raise _failure(cell.folder, status, output)
        if until not in cell.losses():
            raise UserError(f"{cell.folder} was trained to step {until}, but its log has no held-out loss of it")

    def _train_together(self, one: Pass) -> None:
        """Train cells in one pass up to a step. One that fails by itself does not end the others."""
        names = ", ".join(f"{cell.method} {cell.trial.rate:g}" for cell in one.cells)
        first, until = one.cells[0], one.until
        logger.info(f"{names}, seed {first.seed}, in one pass: to step {until}. {self._remaining()}")
        files = []
        for cell in one.cells:
            cell.folder.mkdir(parents=True, exist_ok=True)
            files.append(cell.folder / CELL_FILE)
            write_config(cell.config(), files[-1])
        begin_pass(one)
        output = first.folder / OUTPUT_FILE
        pause = ["--until", str(until)] if until < self.grid.steps else []
        status = self.run(["train", *map(str, files), "--resume", *pause], output)
        for cell in one.cells:
            if until not in cell.losses() and (why := cell.facts().get("failure")):
                write_file(cell.folder / FAILED_FILE, f"{why}\n")
                logger.info(f"{cell.folder} failed, and counts as the worst: {why}")
        if status and not all(until in cell.losses() for cell in one.cells):
            raise _failure(first.folder, status, output)
        end_pass(one)
        if gain := first.facts().get("gain"):
            logger.info(f"that was {gain:.1f} times as fast as one run after the other")

    def _score(self, outcome: Outcome) -> bool:
        """Score all finals by one command, those of one base in shared batches."""
        cells = [cell for cell in final_cells(self.grid, outcome) if cell.ended]
        trouble = retention_trouble(self.grid)
        measure = RETENTION in self.grid.also and not trouble
        done = all(cell.scored and (cell.measured or not measure) for cell in cells)
        if self.grid.primary != ANSWER_LOGPROB or done:
            return True
        if self._out_of_time():
            logger.info("time is up: the finals are to be scored. The same command goes on")
            return False
        logger.info(f"score {len(cells)} finals")
        settings = ["evaluate.batch_adapters=true"]
        if measure:
            settings.append("evaluate.retention=wikipedia")
            settings += [f"evaluate.retention_limit={self.grid.passages}"] if self.grid.passages else []
        elif trouble:
            logger.info(f"what is kept of the base is not measured: {trouble}")
        shares = [share for number in range(self.parallel) if (share := cells[number :: self.parallel])]
        return self._run_all([partial(self._score_all, share, settings) for share in shares])

    def _score_all(self, cells: Sequence[Cell], settings: Sequence[str]) -> None:
        """Score cells by one command."""
        output = cells[0].folder / OUTPUT_FILE
        if status := self.run(["evaluate", *(str(cell.folder) for cell in cells), *settings], output):
            raise _failure(self.grid.folder, status, output)

    def _out_of_time(self) -> bool:
        return self.minutes is not None and self.clock() - self.began >= 60 * self.minutes

    def _remaining(self) -> str:
        """Return what remains in words, with the time by the steps so far."""
        left = remaining_steps(self.grid, read_search(self.grid)[0])
        taken, seconds = self.steps_before - left, self.clock() - self.began
        when = f", about {left * seconds / taken / 60:.0f} min" if taken > 0 else ""
        return f"{left:,} steps remain{when}"


def retention_trouble(grid: Grid) -> str:
    """Return why it cannot be measured what a study's runs keep of their base; empty where it can, or is not to be."""
    if RETENTION not in grid.also or grid.primary != ANSWER_LOGPROB:
        return ""
    if read_config(grid.base, list(grid.overrides)).evaluate.engine:
        return "under evaluate.engine base and adapters are one"
    try:
        select_passages(1)
    except UserError as error:
        return str(error)
    return ""


def next_cells(grid: Grid, outcome: Outcome, only: Sequence[str] = ()) -> list[tuple[Cell, int]]:
    """Return the cells to be trained next, and up to which step, in order; the finals once the search has ended."""
    due = [
        (Cell(grid, job.method, job.trial, seed), job.step)
        for job in outcome.due
        for seed in grid.search_seeds
        if not only or job.method in only
    ]
    due = [(cell, step) for cell, step in due if step not in cell.losses()]
    if not outcome.ended:
        return due
    finals = [cell for cell in final_cells(grid, outcome) if not only or cell.method in only]
    return [(cell, grid.steps) for cell in finals if not (cell.ended or cell.failed)]


def remaining_steps(grid: Grid, outcome: Outcome) -> int:
    """Return how many steps are left to be trained, if no ladder grows any more."""
    finals = [cell for cell in final_cells(grid, outcome) if not (cell.ended or cell.failed)]
    unknown = len(grid.contenders) - len(outcome.best)
    left = sum(grid.steps - _trained_steps(cell) for cell in finals) + unknown * len(grid.final_seeds) * grid.steps
    return left + len(grid.search_seeds) * _search_steps(grid, outcome)


def _search_steps(grid: Grid, outcome: Outcome) -> int:
    """Return the steps of the search that are left for one seed: what is due, and what the rungs above will need."""
    rungs, total = grid.rules.rungs, 0
    for method in outcome.trials:
        jobs = [job for job in outcome.due if job.method == method]
        if not jobs:
            continue
        number = rungs.index(jobs[0].step)
        total += len(jobs) * _rung_steps(rungs, number)
        alive = len(outcome.trials[method])
        for rung in range(len(rungs)):
            if rung > number:
                total += alive * _rung_steps(rungs, rung)
            alive = math.ceil(grid.rules.keep * alive)
    return total


def planned_steps(grid: Grid) -> int:
    """Return the steps of the whole study, if no ladder grows."""
    per_method = 0
    alive = len(grid.contenders[0].trials)
    for number in range(len(grid.rules.rungs)):
        per_method += alive * _rung_steps(grid.rules.rungs, number)
        alive = math.ceil(grid.rules.keep * alive)
    finals = len(grid.final_seeds) * grid.steps
    return len(grid.contenders) * (len(grid.search_seeds) * per_method + finals)


def _rung_steps(rungs: Sequence[int], number: int) -> int:
    return rungs[number] - (rungs[number - 1] if number else 0)


def _trained_steps(cell: Cell) -> int:
    return max((int(line["step"]) for line in cell.log()), default=0)


def tidy(grid: Grid, outcome: Outcome) -> None:
    """Remove the checkpoints of cells that will not be trained any further: of ended searches and of finals."""
    over = [cell for cell in search_cells(grid, outcome) if cell.method in outcome.best]
    over += [cell for cell in final_cells(grid, outcome) if cell.ended]
    for cell in over:
        remove_folder(cell.folder / "checkpoints")


def _failed_by_itself(output: Path) -> bool:
    """Return True if a run ended in a message of ours, not in a traceback: the status is the same."""
    return _last_words(output, whole=True).startswith("error: ")


def _failure(folder: Path, status: int, output: Path) -> UserError:
    if status in (RunStopped.status, 130):
        return RunStopped(f"{folder} was stopped by a signal; repeat the command, and the study goes on")
    if status < 0:
        why = "Was memory short? A smaller train.micro_batch_size takes less" if status == -9 else "See its output"
        return UserError(f"{folder} was ended by signal {-status}. {why}: {output}. The same command goes on")
    return UserError(f"{folder} ended with status {status}: {_last_words(output)}. All it said: {output}")


def _last_words(output: Path, *, whole: bool = False) -> str:
    """Return the last line that a command printed, without its ``error:`` unless ``whole``."""
    try:
        text = output.read_text(encoding="utf-8", errors="replace")[-4000:]
    except OSError:
        text = ""
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "nothing was printed"
    return last if whole else last.removeprefix("error: ")
