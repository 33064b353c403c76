"""What a study costs beside its runs one by one: CPU seconds on the toy model, and whether both find the same.

``python -m tests.bench.bench_study`` (five minutes of a core). The same grid three times, in turns:

- one by one: every trial to its end and every final by a `subspace train` of its own, as a loop in a shell would;
- without halving: `subspace study run`, every trial to its end;
- study: `subspace study run` as it is.

CPU seconds are those of all processes that a command starts, also of those that outlive it for a moment.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from subspace.study.cells import final_cells, read_search, search_cells
from subspace.study.config import read_study
from subspace.study.grid import Grid
from subspace.study.record import open_grid

PR_SET_CHILD_SUBREAPER = 36
STUDY = """base: launch/studies/toy/run.yaml
runs: {runs}
settings: {{train.steps: {steps}, train.batch_size: 8, data.validation: 60}}
budget: {{like: lora, r: 4}}
methods: [lora, dora, ssb, bitfit]
rates: [1.0e-3, 3.2e-3, 1.0e-2, 3.2e-2, 1.0e-1]
search: {{halving: {halving}}}
final: {{seeds: [0, 1]}}
outcome: {{primary: validation_loss}}
"""
HALVING = "{first: 0.2, keep: 0.5}"


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of all processes that some work starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)  # orphans come to this process, and their seconds with them
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def command(*arguments: str) -> None:
    """Run ``subspace`` in a process."""
    subprocess.run([sys.executable, "-m", "subspace", *arguments], check=True, capture_output=True)


def opened(folder: Path, name: str, halving: str, steps: int) -> tuple[Path, Grid]:
    """Write a study's file; return it and its grid."""
    file = folder / f"{name}.yaml"
    file.write_text(STUDY.format(runs=folder, steps=steps, halving=halving))
    return file, open_grid(read_study(file), write=True)


def one_by_one(grid: Grid) -> None:
    """Train every trial and every final of a grid, each by a command of its own; ladders grow as in a study."""
    while not (found := read_search(grid)[0]).ended:
        for cell in search_cells(grid, found):
            if not cell.ended:
                command(*cell.train_arguments())
    for cell in final_cells(grid, found):
        command(*cell.train_arguments())


def found(grid: Grid) -> str:
    """Return each method's best rate, and the method whose finals are best."""
    outcome = read_search(grid)[0]
    losses: dict[str, list[float]] = {}
    for cell in final_cells(grid, outcome):
        losses.setdefault(cell.method, []).append(cell.losses()[grid.steps])
    best = min(losses, key=lambda label: sum(losses[label]))
    return f"{best} first; " + ", ".join(f"{label} {trial.rate:.2g}" for label, trial in outcome.best.items())


def main() -> None:
    """Measure in turns and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seconds: dict[str, list[float]] = {}
    for number in range(options.rounds):
        for name, halving in (("one by one", "null"), ("without halving", "null"), ("study", HALVING)):
            with tempfile.TemporaryDirectory() as folder:
                file, grid = opened(Path(folder), name.replace(" ", "-"), halving, options.steps)
                alone = name == "one by one"
                taken = cpu_seconds(lambda: one_by_one(grid) if alone else command("study", "run", str(file)))  # noqa: B023
                seconds.setdefault(name, []).append(taken)
                print(f"{number} {name:<16} {taken:7.1f} CPU s  {found(grid)}", flush=True)
    least = {name: min(taken) for name, taken in seconds.items()}
    for name, taken in least.items():
        print(f"{name:<16} {taken:7.1f} CPU s, {taken / least['one by one']:.2f} of one by one")


if __name__ == "__main__":
    main()
