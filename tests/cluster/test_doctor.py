"""``subspace doctor`` on two hosts: they are well over ssh and under SLURM, and what is wrong with one is found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from subspace.doctor.checks import CHECKS
from tests.cluster.hosts import Hosts, Program
from tests.cluster.slurm import Slurm

pytestmark = pytest.mark.cluster

ARGUMENTS = ("doctor", "run.yaml", "evaluate.tasks=[]", "--wait", "60")


def examine(hosts: Hosts, place: Path, *more: str, hostfile: str = "node1 slots=1\nnode2 slots=1\n") -> Program:
    """Run the doctor on the first host for both."""
    (place / "examined").write_text(hostfile)
    command = ["bash", "launch/cluster.sh", "examined", *ARGUMENTS, *more]
    return hosts[0].run(*command, folder=place, environment={"DS_ENV_FILE": "environment"})


def states(said: str) -> dict[str, str]:
    """Return each check's state from a printed table."""
    names = "|".join(re.escape(check.name) for check in CHECKS)
    return dict(re.findall(rf"^ *({names}) +(ok|warning|failed|skipped)\b", said, re.MULTILINE))


def not_ok(said: str) -> dict[str, str]:
    found = states(said)
    assert list(found) == [check.name for check in CHECKS], said
    return {name: state for name, state in found.items() if state in ("failed", "skipped")}


def test_two_hosts_are_well(hosts: Hosts, place: Path) -> None:
    program = examine(hosts, place)
    assert (program.poll(), program.err) == (0, "starting the processes on node1, node2 ...\n"), program.out
    assert not_ok(program.out) == {}
    assert "2 processes on node1 (0), node2 (1), met at 10.77.0.1:" in program.out


def test_a_program_can_read_what_several_hosts_print(hosts: Hosts, place: Path) -> None:
    program = examine(hosts, place, "--json")
    assert program.poll() == 0, program.err
    told = json.loads(program.out)
    assert "node2" in json.dumps(told)


def test_a_host_that_is_off_is_named_at_once(hosts: Hosts, place: Path) -> None:
    hosts.unplug(hosts[1])
    try:
        program = examine(hosts, place)
    finally:
        hosts.plug(hosts[1])
    assert program.poll() == 2, program.err
    assert states(program.out)["start"] == "failed"
    assert "ssh cannot reach node2" in program.out


def test_a_host_without_the_folder_is_named(hosts: Hosts, place: Path) -> None:
    hosts[1].check("mount", "-t", "tmpfs", "none", place)
    try:
        program = examine(hosts, place)
    finally:
        hosts[1].check("umount", place)
    assert program.poll() == 2, program.err
    assert "node2 has no folder" in program.out


def test_a_folder_of_runs_that_is_not_shared_is_found(hosts: Hosts, place: Path) -> None:
    (place / "runs").mkdir(exist_ok=True)
    hosts[1].check("mount", "-t", "tmpfs", "none", place / "runs")
    try:
        program = examine(hosts, place)
    finally:
        hosts[1].check("umount", place / "runs")
    assert program.poll() == 2, program.err
    assert not_ok(program.out) == {"shared": "failed"}


def test_a_job_is_well(slurm: Slurm) -> None:
    job = slurm.submit("--nodes=2", "--ntasks-per-node=1", "launch/slurm.sh", *ARGUMENTS)
    assert job.end() == ("COMPLETED", "0:0"), job.said
    assert not_ok(job.said) == {}
    assert "2 processes on node1 (0), node2 (1)" in job.said


def test_a_job_that_training_would_refuse_fails_with_one_table(slurm: Slurm) -> None:
    job = slurm.submit("--nodes=2", "--ntasks-per-node=1", "launch/slurm.sh", *ARGUMENTS, "train.batch_size=3")
    assert job.end() == ("FAILED", "2:0"), job.said
    assert not_ok(job.said) == {"settings": "failed"}
    assert job.said.count("1 failed: settings") == 1
