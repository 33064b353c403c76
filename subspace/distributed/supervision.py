"""Supervision of a launch: its signals, its end, and what is left of it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from subspace.distributed.hosts import MARK_TO_GIVE, SSH_FAILED, HostWatch, pdsh_environment, signal_command
from subspace.distributed.signals import local_rank_pids, read_status
from subspace.errors import RunStopped

if TYPE_CHECKING:
    import psutil

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
#: Seconds between SIGTERM and SIGKILL to a process group. The launcher gives its ranks 30.
SHUTDOWN_GRACE_S = 35.0
#: Seconds between two looks at what the ranks do.
LOOK_S = 2.0
#: Seconds for a signal to reach all hosts.
SIGNAL_TIMEOUT_S = 30.0


class _Launched:
    """The processes of a launch, on this machine: one process group, whose ranks write their numbers beside a file."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], status_file: Path) -> None:
        self.status_file = status_file
        self.received: list[int] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.before = {number: signal.signal(number, self.pass_on) for number in SIGNALS}
        try:
            self.process = self.start(command, environment)
        except BaseException:
            self.restore_handlers()
            raise
        if self.received:  # between the handlers and the start
            self.end_all()

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)

    def restore_handlers(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        # SLURM warns with SIGUSR1 and later ends with SIGTERM: the same request. The same signal twice kills at once.
        again, first = number in self.received, not self.received
        self.received.append(number)
        if self.process is None:
            return
        if again:
            self.kill_all()
        elif first:
            self.ask_to_stop()

    def ask_to_stop(self) -> None:
        """Ask the ranks to end between two steps; without ranks, end the launcher."""
        ranks = local_rank_pids(self.status_file)
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        if not ranks:
            self.end_all()

    def end_all(self) -> None:
        assert self.process
        _signal_group(self.process.pid, signal.SIGTERM)

    def kill_all(self) -> None:
        assert self.process
        _signal_group(self.process.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for the launcher, end what is left of it, and return the run's status."""
        assert self.process
        stopped: set[int] = set()
        while (returned := self.process.poll()) is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=LOOK_S)
            stopped = _tell_of_stopped(stopped, local_rank_pids(self.status_file))
            if read_status(self.status_file):  # the run has failed, and the launcher's SIGTERM would not reach them
                for pid in stopped:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        leftovers = _end_group(self.process.pid)
        reported = read_status(self.status_file)
        if reported:
            return reported
        if self.received:
            return 128 + self.received[0]
        if returned:
            return _explain(returned)
        if reported is None:
            ended = f" Its {leftovers} processes that still ran were ended." if leftovers else ""
            logger.error("error: the launcher ended, but the run did not reach its end.%s", ended)
            return 1
        return 0


class _LaunchedOnHosts(_Launched):
    """The processes of a launch on several hosts, which share no folder with this one: they are known by their mark."""

    def __init__(
        self, hosts: Sequence[str], command: Sequence[str], environment: Mapping[str, str], status_file: Path
    ) -> None:
        self.hosts, self.environment = hosts, environment
        self.signals: list[subprocess.Popen[bytes]] = []
        super().__init__(command, environment, status_file)

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        process = subprocess.Popen(
            command, env=environment, stdin=nothing, stdout=pipe, stderr=pipe, start_new_session=True
        )
        self.guard = start_guard(process.pid, self._command(signal.SIGKILL), pdsh_environment(environment))
        assert process.stdout
        assert process.stderr
        self.watch = HostWatch(process.stderr, process.stdout, self.hosts)
        return process

    def ask_to_stop(self) -> None:
        self._signal(signal.SIGUSR1)

    def end_all(self) -> None:
        self._signal(signal.SIGKILL)

    def kill_all(self) -> None:
        self._signal(signal.SIGKILL)
        super().kill_all()

    def wait(self) -> int:
        assert self.process
        ended = False
        while self.process.poll() is None:
            if not ended and self.watch.overdue():
                ended = True
                self._signal(signal.SIGKILL)
            time.sleep(0.1)
        if self.process.returncode and not self.received:
            self._signal(signal.SIGKILL)  # what the end of a connection has left behind
        for each in self.signals:
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.wait(timeout=SIGNAL_TIMEOUT_S)
        _end_group(self.process.pid)
        self.guard.kill()
        self.guard.wait()
        self.watch.finish()
        status = self.watch.status or self.process.returncode
        if self.received:  # the first host to end may only have lost its peer, which had saved
            return RunStopped.status if self.watch.stopped else 128 + self.received[0]
        if not status or self.watch.told:
            return min(status, 1) if status == SSH_FAILED else _as_shell(status)
        if status == SSH_FAILED:
            logger.error("error: host '%s' could not be reached by ssh, or the connection to it broke", self.watch.host)
            return 1
        return _explain(status, f" on host '{self.watch.host}'" if self.watch.host else "")

    def _signal(self, number: int) -> None:
        """Start to send a signal to the launch's processes on all hosts."""
        nowhere = subprocess.DEVNULL
        self.signals.append(
            subprocess.Popen(
                self._command(number),
                env=pdsh_environment(self.environment),
                stdin=nowhere,
                stdout=nowhere,
                stderr=nowhere,
                start_new_session=True,
            )
        )

    def _command(self, number: int) -> list[str]:
        """Return the command that sends a signal to the launch's processes on all hosts."""
        exports = {name: value for name, value in self.environment.items() if name.startswith("PYTHON")}
        return list(signal_command(self.hosts, self.environment[MARK_TO_GIVE], number, exports))


def start_guard(group: int, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a shell that ends a process group, and then runs a command, when this process is gone, however it ended.

    Processes of other hosts do not see that it is. Kill the guard before the orderly end.
    """
    script = 'read -r _ || { kill -s KILL -- "-$1"; shift; exec "$@"; }'
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(
        ["/bin/sh", "-c", script, "guard", str(group), *command],
        env=environment,
        stdin=subprocess.PIPE,  # which ends with this process
        stdout=nowhere,
        stderr=nowhere,
        start_new_session=True,
    )


def supervise(
    command: Sequence[str], environment: Mapping[str, str], status_file: Path, hosts: Sequence[str] = ()
) -> int:
    """Start a launcher, pass signals on, wait, end what is left, and return the run's status.

    Args:
        command: the launcher's.
        environment: of the launcher.
        status_file: where ranks on this machine write the run's status; their numbers are beside it.
        hosts: where the processes are if not on this machine only.
    """
    launched = (
        _LaunchedOnHosts(hosts, command, environment, status_file)
        if hosts
        else _Launched(command, environment, status_file)
    )
    try:
        return launched.wait()
    finally:
        launched.restore_handlers()


def _tell_of_stopped(told: set[int], ranks: Sequence[int]) -> set[int]:
    """Tell of ranks that a signal has stopped, for which all others wait; return them."""
    import psutil

    stopped = set()
    for pid in ranks:
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
                stopped.add(pid)
    for pid in sorted(stopped - told):
        logger.warning(
            "note: process %d of the run is stopped (SIGSTOP), and the others wait for it. It goes on with: "
            "kill -CONT %d", pid, pid,
        )  # fmt: skip
    return stopped


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _end_group(group: int) -> int:
    """Terminate the remaining processes of a group and return how many there were."""
    import psutil

    found = len(_processes_of(group))
    for number, patience in ((signal.SIGTERM, SHUTDOWN_GRACE_S), (signal.SIGKILL, 5.0)):
        end = time.monotonic() + patience
        if _processes_of(group):
            _signal_group(group, number)
        while (left := _processes_of(group)) and time.monotonic() < end:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    if process.status() == psutil.STATUS_STOPPED:  # SIGTERM would reach it only when it goes on
                        process.kill()
            time.sleep(0.1)
    return found


def _processes_of(group: int) -> list[psutil.Process]:
    """Return a group's running processes, without zombies, which a parent may never wait for."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _as_shell(status: int) -> int:
    """Return a launcher's exit status as a shell would: for SIGKILL, -9 or 247 becomes 137."""
    number = -status if status < 0 else 256 - status
    return 128 + number if 0 < number < 65 else status


def _explain(status: int, where: str = "") -> int:
    """Return the exit status of a failed run as a shell would, and print the signal that ended a rank."""
    number = _as_shell(status) - 128
    if _as_shell(status) != status:
        hint = ". Often that is the machine, out of memory" if number == signal.SIGKILL else ""
        name = signal.strsignal(number)
        logger.error("error: a process of the run%s was ended by signal %d (%s)%s", where, number, name, hint)
    return _as_shell(status)
