"""SLURM on the hosts: a controller on the first, a daemon on each, and jobs."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.cluster.hosts import Host, Hosts, Program

PROGRAMS = ("munged", "sbatch", "scancel", "scontrol", "slurmctld", "slurmd", "srun")
#: States in which a job has reached its end.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

# Short times, so that a job is ended and queued anew within seconds, and a node that is silent is known to be down.
SETTINGS = """ClusterName=tests
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
SlurmdTimeout=15
MessageTimeout=5
MailProg=/bin/true
SlurmdParameters=config_overrides
StateSaveLocation={state}/controller
SlurmdSpoolDir={state}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={state}/controller.log
SlurmdLogFile={state}/daemon-%n.log
NodeName={nodes} CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=NO
"""
#: MUNGE signs SLURM's messages. Each host has its own daemon, and all have the same key.
MUNGE = r"""
set -euo pipefail
install -d -o munge -g munge -m 755 /run/munge
install -o munge -g munge -m 400 "$1" /run/munge/key
setpriv --reuid munge --regid munge --clear-groups munged --key-file /run/munge/key \
    --log-file /run/munge/log --seed-file /run/munge/seed --pid-file /run/munge/pid
"""


class Slurm:
    """A cluster of all hosts; jobs are submitted on the first, in ``folder``."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self._state = hosts.state / "slurm"
        self._settings = self._state / "slurm.conf"
        for name in ("controller", *(f"spool-{host.name}" for host in hosts)):
            (self._state / name).mkdir(parents=True)
        (self._state / "munge.key").write_bytes(os.urandom(128))
        nodes = ",".join(host.name for host in hosts)
        self._settings.write_text(SETTINGS.format(controller=hosts[0].name, state=self._state, nodes=nodes))

    def start(self) -> None:
        """Start all daemons and wait until every node can take a job."""
        self._munge(self.hosts[0])
        self.hosts[0].check("slurmctld", "-f", self._settings)
        for host in self.hosts:
            self.join(host)

    def join(self, host: Host) -> None:
        """Start the daemon of a host, also of one that was booted anew, and wait until it can take a job."""
        if host is not self.hosts[0]:
            self._munge(host)
        host.check("slurmd", "-f", self._settings)
        end = time.monotonic() + 60
        while (state := self.ask("sinfo", "--noheader", "--nodes", host.name, "--format=%T").strip()) != "idle":
            assert time.monotonic() < end, f"{host.name} is {state!r}: {self.logs()}"
            time.sleep(0.2)

    def _munge(self, host: Host) -> None:
        host.check("bash", "-c", MUNGE, "munge", self._state / "munge.key")

    def logs(self) -> str:
        """Return the last lines of the daemons' logs."""
        return "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(self._state.glob("*.log")))

    def run(self, *command: str | Path) -> Program:
        """Run a command of SLURM's on the first host."""
        return self.hosts[0].run(*command, folder=self.folder, environment={"SLURM_CONF": str(self._settings)})

    def ask(self, *command: str | Path) -> str:
        """Run a command of SLURM's that must succeed and return what it printed."""
        ran = self.run(*command)
        assert ran.poll() == 0, f"{command}: {ran.err}{ran.out}"
        return ran.out

    def submit(self, *arguments: str | Path) -> Job:
        """Submit a batch script with its arguments, after options of sbatch."""
        number = self.ask("sbatch", "--parsable", "--output=job-%j.out", "--open-mode=append", *arguments).strip()
        return Job(self, number)


class Job:
    """A submitted job."""

    def __init__(self, slurm: Slurm, number: str) -> None:
        self._slurm, self.number = slurm, number

    @property
    def said(self) -> str:
        """What the job has printed."""
        file = self._slurm.folder / f"job-{self.number}.out"
        return file.read_text() if file.exists() else ""

    def facts(self) -> dict[str, str]:
        """Return what SLURM knows of the job: JobState, ExitCode, ..."""
        words = self._slurm.ask("scontrol", "--oneliner", "show", "job", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self) -> str | None:
        """Return how the job has ended, with what it said; None if it has not."""
        facts = self.facts()
        return f"{facts['JobState']} {facts['ExitCode']}\n{self.said}" if facts["JobState"] in ENDED else None

    def signal(self, name: str) -> None:
        """Send a signal to the job's tasks, as SLURM does before the time limit."""
        self._slurm.ask("scancel", f"--signal={name}", self.number)

    def requeue(self) -> None:
        """Queue the job anew, to start at once."""
        self._slurm.ask("scontrol", "requeue", self.number)

    def end(self, seconds: float = 300) -> tuple[str, str]:
        """Wait for the end; return the state and the exit status, as ``FAILED`` and ``75:0``."""
        limit = time.monotonic() + seconds
        while (facts := self.facts())["JobState"] not in ENDED:
            assert time.monotonic() < limit, f"job {self.number}: {facts}\n{self.said}\n{self._slurm.logs()}"
            time.sleep(0.5)
        return facts["JobState"], facts["ExitCode"]
