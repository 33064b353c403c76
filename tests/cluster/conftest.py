"""Hosts, SLURM on them, and what is trained there. Where a machine cannot be made into hosts, the tests say why."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from subspace.common.paths import REPOSITORY
from tests.cluster import hosts as hosts_module
from tests.cluster import slurm as slurm_module
from tests.cluster.hosts import Hosts
from tests.cluster.slurm import Slurm
from tests.helpers.items import items
from tests.helpers.material import logged, make_material

#: Long enough that a run can be stopped in the middle: a second or two after it has begun.
STEPS = 80


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> Path:
    """The folder where commands are given on each host: launchers, the environment, what is trained and scored."""
    place = tmp_path_factory.mktemp("shared") / "place"
    place.mkdir()
    for name in ("launch", "ds_configs"):
        (place / name).symlink_to(REPOSITORY / name)
    (place / ".venv").symlink_to(sys.prefix)
    make_material(place)
    with (place / "asked.jsonl").open("w") as file:
        for item in items("openbookqa", 21):
            file.write(json.dumps({name: item[name] for name in ("question", "choices", "label")}) + "\n")
    (place / "asked.yaml").write_text("file: asked.jsonl\n")
    # Over ssh nothing else of the environment arrives.
    kept = {
        name: os.environ[name] for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "SUBSPACE_CACHE", "XDG_STATE_HOME")
    }
    (place / "environment").write_text("".join(f"{name}={value}\n" for name, value in kept.items()))
    return place


def settings(name: str, *more: str) -> list[str]:
    """Return the arguments of a training of :data:`STEPS` steps."""
    return ["run.yaml", f"name={name}", f"train.steps={STEPS}", "train.micro_batch_size=2", *more]


def reached(run: Path, step: int, state: Callable[[], str | None]) -> None:
    """Wait until a run has made a step, as long as ``state`` says nothing of its end."""
    end = time.monotonic() + 400
    while not (ended := state()) and time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):  # not there yet, or a line half written
            if logged(run, "step")[-1:] >= [step]:
                return
        time.sleep(0.1)
    raise AssertionError(f"no step {step}: {ended}")


@pytest.fixture(scope="session")
def whole(place: Path) -> Path:
    """What two processes train on one host, undisturbed."""
    command = [sys.executable, "-m", "subspace", "train", *settings("whole"), "--processes", "2"]
    subprocess.run(command, cwd=place, check=True, timeout=300)
    return place / "runs" / "whole"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts that see the checkout, the environment and the session's folder, and nothing else of /tmp."""
    if reason := hosts_module.reason_to_skip():
        pytest.skip(reason)
    shared = [tmp_path_factory.getbasetemp(), REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)]
    with Hosts(tmp_path_factory.mktemp("hosts"), shared) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def slurm(hosts: Hosts, place: Path) -> Slurm:
    """SLURM on both hosts."""
    if reason := hosts_module.reason_to_skip(slurm_module.PROGRAMS):
        pytest.skip(reason)
    slurm = Slurm(hosts, place)
    slurm.start()
    return slurm
