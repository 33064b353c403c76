"""CUDA on machines without a GPU: every method, and runs through DeepSpeed, on the device of ``device.cpp``.

One process does all of it, since that takes a torch which has found CUDA when it was imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from subspace.adapters.registry import list_methods
from subspace.common.paths import REPOSITORY
from subspace.distributed import launcher
from tests.fake_cuda.device import reason_not_to
from tests.helpers.material import make_material

pytestmark = [
    pytest.mark.skipif(reason_not_to() is not None, reason=str(reason_not_to())),
    pytest.mark.processes,
]

Job = list[Any]
Outcomes = dict[str, dict[str, Any]]

METHODS = list_methods()
QUANTIZED = ("nf4", "nf4-double", "int8")
#: On quantised bases these train a few singular values: all of them would be held in 16 bits, which they refuse.
FEW = {"svdiff": {"p": 4}, "sam-parser": {"p": 4}}

PLAIN: list[Job] = [["method", "bf16", name] for name in METHODS]
DROPPED: list[Job] = [
    ["method", "bf16", name, {"dropout": 0.1}]
    for name, cls in METHODS.items()
    if "dropout" in cls.Config.__dataclass_fields__
]
PACKED: list[Job] = [
    ["method", base, name, FEW.get(name, {})] for base in QUANTIZED for name in METHODS if name != "full"
]
#: Tried on every base; the others with ``-m long``. One whose branch is low-rank, one with a norm of W, one by hooks.
ALWAYS = {"lora", "dora", "houlsby"}
FIRST = [job for job in PACKED if job[2] in ALWAYS] + [["method", "bf16", "lora", {"dropout": 0.1}]]
REST = [job for job in PACKED + DROPPED if job not in FIRST]
STAGES = (1, 3)


def by_name(job: Job) -> str:
    return "-".join([*map(str, job[1:3]), *map(str, job[3] if len(job) > 3 else ())])


def outcomes_of(jobs: list[Job], ranks: int = 1) -> list[Outcomes]:
    """Let a worker on each rank do the jobs; return what came of each, by the job as JSON, for each rank."""
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launcher.free_port())}
    command = [sys.executable, "-m", "tests.fake_cuda.worker"]
    started = []
    for rank in range(ranks):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(command, env=own, cwd=REPOSITORY, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        )
    for process in started:
        assert process.stdin is not None
        process.stdin.write(json.dumps(jobs))
        process.stdin.close()
        process.stdin = None
    found = []
    for process in started:
        out, errors = process.communicate()
        lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"job"')]
        assert process.returncode == 0, errors[-3000:]
        assert len(lines) == len(jobs), errors[-3000:]
        found.append({json.dumps(line["job"]): line for line in lines})
    return found


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    jobs = [["rules"], ["plainly"], ["method", "nf4", "full"], *PLAIN, *FIRST, *(["train", stage] for stage in STAGES)]
    return outcomes_of(jobs)[0]


@pytest.fixture(scope="module")
def rest() -> Outcomes:
    return outcomes_of([*REST, ["train", 0], ["train", 2]])[0]


def found(outcomes: Outcomes, *job: Any) -> Any:
    outcome = outcomes[json.dumps(job)]
    assert "error" not in outcome, outcome["trace"]
    return outcome["found"]


def test_the_device_refuses_what_cuda_refuses(outcomes: Outcomes) -> None:
    assert found(outcomes, "rules") == []


@pytest.mark.parametrize("job", PLAIN + FIRST, ids=by_name)
def test_a_method_trains_and_evaluates_on_cuda(outcomes: Outcomes, job: Job) -> None:
    assert found(outcomes, *job) == []


@pytest.mark.long
@pytest.mark.parametrize("job", REST, ids=by_name)
def test_a_method_trains_and_evaluates_on_every_base_on_cuda(rest: Outcomes, job: Job) -> None:
    assert found(rest, *job) == []


def test_full_fine_tuning_says_why_it_takes_no_quantised_base(outcomes: Outcomes) -> None:
    assert "UserError" in outcomes[json.dumps(["method", "nf4", "full"])]["error"]


def test_the_plain_loop_that_the_matrix_is_held_against_trains_on_cuda(outcomes: Outcomes) -> None:
    losses = found(outcomes, "plainly")
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_trains_on_cuda(outcomes: Outcomes, stage: int) -> None:
    check_training(found(outcomes, "train", stage))


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 2])
def test_deepspeed_trains_on_cuda_at_the_other_stages(rest: Outcomes, stage: int) -> None:
    check_training(found(rest, "train", stage))


@pytest.mark.long
def test_a_rank_has_its_own_device_and_objects_travel_through_the_host() -> None:
    """On two ranks, each with a GPU: what scoring and resuming exchange before there is an engine."""
    ranks = outcomes_of([["objects"]], ranks=2)
    for number, outcomes in enumerate(ranks):
        each = found(outcomes, "objects")
        assert each["told"] == 0
        assert each["gathered"] == [{"rank": 0, "device": 0}, {"rank": 1, "device": 1}]
        assert each["sum"] == 2
        own = f"cuda:{number}"
        assert each["collectives"] == [["barrier", own], ["allreduce", own]]  # and no bytes of objects


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_on_a_device_each(stage: int, tmp_path: Path) -> None:
    job = ["train", stage, str(make_material(tmp_path).parent)]
    first, second = (found(outcomes, *job) for outcomes in outcomes_of([job], ranks=2))
    for number, run in enumerate((first, second)):
        assert {device for _, device in run["collectives"]} == {f"cuda:{number}"}
    assert first["losses"][-1] < first["losses"][0] - 0.5


def check_training(run: dict[str, Any]) -> None:
    """Check that a run learnt, that it used the device for its collectives, and that its steps wait seldom."""
    assert run["losses"][-1] < run["losses"][0] - 0.5
    assert run["finite"]
    assert {device for _, device in run["collectives"]} == {"cuda:0"}
    # In ten steps one wait for the losses and gradients, and one for the norm that is logged; none for a copy.
    assert sum(run["reads"].values()) <= 0.2, run["reads"]
