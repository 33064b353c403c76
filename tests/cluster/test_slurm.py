"""Jobs on a real SLURM of two nodes: how they end, what SLURM sees of it, and that they go on where they were."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from subspace.adapters.serialization import TENSORS
from subspace.evaluation.results import read_items
from subspace.training.checkpoint import checkpoints
from tests.cluster.conftest import reached, settings
from tests.cluster.slurm import Job, Slurm
from tests.helpers.material import logged

pytestmark = pytest.mark.cluster

TWO = ("--nodes=2", "--ntasks-per-node=1")


def submit(slurm: Slurm, *arguments: str, options: tuple[str, ...] = ()) -> Job:
    return slurm.submit(*TWO, *options, "launch/slurm.sh", *arguments)


def nothing_left(slurm: Slurm) -> bool:
    return not any(host.ranks() for host in slurm.hosts)


def told(job: Job) -> int:
    """Return how often a job has told of an error, besides what srun says."""
    return sum(line.startswith("error:") for line in job.said.splitlines())


def stopped_once(job: Job, run: Path) -> None:
    """See that a run was stopped after its last step, with a checkpoint and one message."""
    last = logged(run, "step")[-1]
    assert job.said.count("stopped:") == 1, job.said
    assert f"stopped: after step {last}, by a signal" in job.said
    assert checkpoints(run)[-1].name == f"step-{last:06d}"


def test_a_job_that_is_stopped_queued_anew_and_resumed_is_as_one_that_was_not(
    slurm: Slurm, place: Path, whole: Path
) -> None:
    run = place / "runs" / "requeued"
    job = submit(slurm, "train", *settings("requeued"), "--resume", options=("--requeue",))
    reached(run, 5, job.ended)
    assert [host.ranks() for host in slurm.hosts] == [[0], [1]]
    job.signal("USR1")
    assert job.end() == ("FAILED", "75:0"), job.said
    stopped_once(job, run)
    done = logged(run, "step")[-1]
    job.requeue()
    assert job.end() == ("COMPLETED", "0:0"), job.said
    assert f"resumes after step {done}" in job.said
    assert logged(run) == logged(whole)
    assert (run / "adapter" / TENSORS).read_bytes() == (whole / "adapter" / TENSORS).read_bytes()
    assert nothing_left(slurm)


def test_the_time_limit_is_announced_and_the_job_saves(slurm: Slurm, place: Path) -> None:
    name = "limited"
    # SLURM may send it a minute early.
    job = submit(slurm, "train", *settings(name, "train.steps=100000"), options=("--time=2", "--signal=USR1@10"))
    assert job.end() == ("FAILED", "75:0"), job.said
    stopped_once(job, place / "runs" / name)
    assert nothing_left(slurm)


def test_a_job_that_is_stopped_while_it_loads_ends_with_the_same_status(slurm: Slurm, place: Path) -> None:
    job = submit(slurm, "train", *settings("loading", "train.steps=100000"))
    end = time.monotonic() + 200
    while sum(heeds_signal(process) for host in slurm.hosts for process in host.processes()) < 2:
        assert time.monotonic() < end, job.said
        assert not job.ended(), job.said
        time.sleep(0.05)
    job.signal("USR1")
    assert job.end() == ("FAILED", "75:0"), job.said
    assert "stopped: by a signal" in job.said
    assert nothing_left(slurm)


def heeds_signal(process: psutil.Process) -> bool:
    """Whether a rank's Python has begun to heed SIGUSR1."""
    with contextlib.suppress(psutil.Error, OSError):
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        return "subspace" in process.cmdline() and bool(caught >> (signal.SIGUSR1 - 1) & 1)
    return False


def test_a_bad_setting_is_told_once(slurm: Slurm) -> None:
    job = submit(slurm, "train", *settings("bad", "train.batch_size=3"))
    assert job.end() == ("FAILED", "2:0"), job.said
    assert told(job) == 1, job.said
    assert "batch_size" in job.said


def test_a_text_arrives_as_it_is(slurm: Slurm) -> None:
    text = r"""name=a 'b' "c" $HOME `touch executed` (d|e) * \. %h;"""
    job = submit(slurm, "train", "run.yaml", text)
    assert job.end() == ("FAILED", "2:0"), job.said
    assert text.partition("=")[2] in job.said
    assert not (slurm.folder / "executed").exists()


def test_a_job_scores_what_one_process_does(slurm: Slurm, place: Path, whole: Path) -> None:
    one, two = (shutil.copytree(whole, place / "runs" / f"asked-by-{name}") for name in ("one", "two"))
    slurm.hosts[0].check(
        ".venv/bin/python", "-m", "subspace", "evaluate", str(one), "evaluate.tasks=asked.yaml", folder=place
    )
    job = submit(slurm, "evaluate", str(two), "evaluate.tasks=asked.yaml")
    assert job.end() == ("COMPLETED", "0:0"), job.said
    answers = [read_items(run / "evaluation" / "likelihood" / "asked.jsonl") for run in (one, two)]
    assert len(answers[0]) == 21
    assert answers[0] == answers[1]


def test_a_process_that_dies_ends_the_job(slurm: Slurm, place: Path) -> None:
    run = place / "runs" / "bereft"
    job = submit(slurm, "train", *settings("bereft", "train.steps=100000"), options=("--no-requeue",))
    reached(run, 5, job.ended)
    for process in slurm.hosts[1].processes():
        if "subspace" in process.cmdline():
            process.kill()
    state, status = job.end(240)
    assert state == "FAILED", (status, job.said)
    assert "error: rank 1 (host node2) ended without a word" in job.said
    assert told(job) == 1, job.said
    assert nothing_left(slurm)


def test_a_node_that_dies_ends_the_job(slurm: Slurm, place: Path) -> None:
    run, node = place / "runs" / "halved", slurm.hosts[1]
    job = submit(slurm, "train", *settings("halved", "train.steps=100000"), options=("--no-requeue",))
    reached(run, 5, job.ended)
    node.kill()
    try:
        state, status = job.end(240)
        assert state in ("NODE_FAIL", "FAILED"), (status, job.said)
        assert nothing_left_on_first(slurm)
    finally:
        slurm.hosts.boot(node)
        slurm.join(node)


def nothing_left_on_first(slurm: Slurm) -> bool:
    return not slurm.hosts[0].ranks()
