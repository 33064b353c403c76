"""Launch of a command in several processes through DeepSpeed's launcher, with the run's own exit status.

That launcher has four faults, which a wrapper works around:

- SIGTERM or SIGINT to its first process leaves the ranks running, and the process below that ends them within 30
  seconds. The wrapper gives the launch a process group of its own, passes signals on to the ranks alone, as SIGUSR1,
  so that they can end between two steps (:mod:`subspace.distributed.signals`), and ends what is left afterwards. A
  second signal ends all at once.
- A launcher that is killed leaves the ranks running and ends with status 0. So status 0 counts only together with a
  marker that the run itself writes at its end (:func:`write_success_marker`).
- Two launches take the same port. The wrapper picks a free one.
- ``--num_gpus`` overrides CUDA_VISIBLE_DEVICES. The wrapper names the visible devices.

A run of one process needs no launcher: it becomes rank 0 of 1 (:func:`init_rank_env`) and goes through the same code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from subspace.common.paths import checkout
from subspace.distributed.signals import STATUS_FILE, local_rank_pids, register_rank
from subspace.errors import UserError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
#: Seconds that ranks other than 0 wait before they report a failure. The launcher polls every second.
REPORT_DELAY_S = 5.0
#: Seconds between SIGTERM and SIGKILL to a process group. The launcher gives its ranks 30.
SHUTDOWN_GRACE_S = 35.0


def under_launcher() -> bool:
    """Return True if a launcher started this process: ours, ``deepspeed``, ``torchrun`` or ``launch/slurm.sh``."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_rank() -> int:
    """Return this process's rank from the environment; also valid before the process group is initialised."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """Return the number of processes from the environment; also valid before the process group is initialised."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def init_rank_env() -> None:
    """Prepare a process of the command line to be a rank. Call it before torch is imported.

    Besides :func:`set_rank_env`, it makes process-wide settings: the number of threads and DeepSpeed's log level.
    """
    ranks_here = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"
    os.environ.setdefault("OMP_NUM_THREADS", _threads(int(ranks_here)))
    set_rank_env()
    register_rank()
    # Imports torch, which reads OMP_NUM_THREADS.
    from subspace.distributed.deepspeed_compat import silence_deepspeed

    silence_deepspeed()


def set_rank_env() -> None:
    """Set the environment variables that DeepSpeed reads: rank 0 of 1 unless a launcher set them, and the device.

    All of this package's writing to ``os.environ`` for a training process is here and in :func:`init_rank_env`.
    """
    if not under_launcher():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if not visible_devices():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def write_success_marker() -> None:
    """Write the marker of a successful run; the last action of a command in each rank."""
    if os.environ["RANK"] == "0":
        _write_status(0)


def should_report_error(status: int, *, at_once: bool = True) -> bool:
    """Return True if this rank should print the error that it is about to exit with.

    Often every rank fails, for the same reason or because another did, and one message is enough. The first rank prints
    ``at_once``. The others wait for :data:`REPORT_DELAY_S`, during which the launcher ends them if the first has
    printed; until then they keep their connections open, so that the first does not fail because of them.
    """
    if under_launcher() and (os.environ["RANK"] != "0" or not at_once):
        end = time.monotonic() + REPORT_DELAY_S
        while time.monotonic() < end:
            if _read_status(os.environ.get(STATUS_FILE)) is not None:
                return False
            time.sleep(0.1)
    _write_status(status)
    return True


def is_peer_failure(error: BaseException) -> bool:
    """Return True if an error only means that another process ended, by messages of gloo, NCCL and torch's store."""
    words = ("by peer", "Broken pipe", "remote process exited", "Connection was likely closed", "Socket closed")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _write_status(status: int) -> None:
    if file := os.environ.get(STATUS_FILE):
        Path(file).write_text(str(status))


def _read_status(file: str | Path | None) -> int | None:
    if not file or not Path(file).exists():
        return None
    return int(Path(file).read_text() or 1)


def free_port() -> int:
    """Return a free TCP port below those that the system gives to whoever asks for any (32768 and up on Linux).

    A run binds its port seconds later, when torch is imported. One of the system's own could be another's by then.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_768), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError("none of 100 TCP ports between 20000 and 32768 is free for the processes to meet at")


def visible_devices() -> list[str]:
    """Return the indices of the GPUs that this process may use, as the launcher expects them."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if re.fullmatch(r"\d+(,\d+)*", visible) else [str(i) for i in range(count)]


@dataclass(frozen=True)
class Launch:
    """A command line and environment that start a command in several processes."""

    command: tuple[str, ...]
    environment: dict[str, str]  # of the ranks, in addition to what they inherit
    #: Whether the ranks inherit the environment, and with it the path of their marker. Over ssh they do not; there the
    #: shells' own status shows that a launcher was killed.
    marked: bool = True

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])

    def run(self) -> int:
        """Start the processes, forward signals, wait, terminate remaining processes, and return the run's status."""
        if not self.marked and shutil.which("pdsh") is None:
            raise UserError(
                "the hosts of a hostfile are reached by pdsh, which is not installed. Install it "
                "(apt-get install pdsh), or use launch/slurm.sh, which needs no ssh"
            )
        with tempfile.TemporaryDirectory(prefix="subspace-") as folder:
            return _supervise(self, Path(folder) / "status")


def build_launch(
    arguments: Sequence[str],
    processes: int | None = None,
    hostfile: str | None = None,
    program: Sequence[str] = ("--module", "subspace"),
) -> Launch | None:
    """Return the launch of ``subspace ARGUMENTS``; None if this process alone is enough.

    Args:
        arguments: the command and its arguments.
        processes: number of ranks, per host if there is a hostfile; None for one per GPU, or one without GPUs.
        hostfile: a file with lines ``HOST slots=N``, hosts reached by ssh; None for this machine.
        program: the module or script that takes the arguments, as options of the launcher.

    Raises:
        UserError: more processes than devices, or a hostfile that cannot be read.
    """
    environment = {}
    if hostfile:
        _check_hostfile(hostfile)
        where = ["--hostfile", hostfile, *(["--num_gpus", str(processes)] if processes else [])]
    else:
        devices = visible_devices()
        count = processes or max(len(devices), 1)
        if devices and count > len(devices):
            raise UserError(
                f"{count} processes were requested, but each needs a GPU and this machine has {len(devices)}. "
                f"Use --processes {len(devices)}"
            )
        if count == 1:
            return None
        where = ["--include", f"localhost:{','.join(devices[:count])}"] if devices else ["--num_gpus", str(count)]
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or _threads(count)
        if not devices:
            environment["DS_ACCELERATOR"] = (
                "cpu"  # otherwise the launcher warns three times that it found no accelerator
            )
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *where, "--master_port", str(free_port())]
    # Only the ranks' messages matter: the launcher would repeat the command of one that fails.
    launcher += ["--log_level", "critical", "--no_local_rank"]
    return Launch((*launcher, *program, *arguments), environment, marked=not hostfile)


def _threads(ranks: int) -> str:
    """Return the number of CPU threads of each rank."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return str(max(cores // ranks, 1))


def _check_hostfile(path: str) -> None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise UserError(f"hostfile '{path}': {error.strerror}. launch/hostfile.example shows one") from None
    entries = [
        (n, line.strip()) for n, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("#")
    ]
    for number, line in entries:
        if not re.match(r"\S+\s+slots=\d+", line):
            raise UserError(f"hostfile '{path}', line {number} is '{line}', but should be 'HOST slots=NUMBER'")
    if not entries:
        raise UserError(f"hostfile '{path}' names no host. Its lines are 'HOST slots=NUMBER'")


def _ranks_environment(launch: Launch, status_file: Path) -> dict[str, str]:
    """Return the environment variables of the ranks."""
    environment = {**os.environ, **launch.environment, STATUS_FILE: str(status_file)}
    # DeepSpeed looks for ninja on the path, which lacks the virtual environment's folder unless that is activated.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if repository := checkout():  # the processes find an installed package by themselves
        paths = [str(repository), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(paths).rstrip(os.pathsep)
    if not visible_devices():
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # has no effect then, and the launcher would warn about it
    return environment


def _supervise(launch: Launch, status_file: Path) -> int:
    """Start the launcher, forward signals, wait, terminate remaining processes, and return the run's status."""
    environment = _ranks_environment(launch, status_file)
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        # SLURM warns with SIGUSR1 and later ends with SIGTERM: the same request. The same signal twice kills at once.
        again = number in received
        received.append(number)
        if process is None:
            return
        if again or not (ranks := local_rank_pids(status_file)):
            _signal_group(process.pid, signal.SIGKILL if again else signal.SIGTERM)
            return
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        process = subprocess.Popen(launch.command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        if received:  # between the handlers and the start
            _signal_group(process.pid, signal.SIGTERM)
        returned = process.wait()
        leftovers = _end_group(process.pid)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    reported = _read_status(status_file)
    if reported:
        return reported
    if received:
        return 128 + received[0]
    if returned:
        return _explain(returned)
    if launch.marked and reported is None:
        ended = f" Its {leftovers} processes that still ran were ended." if leftovers else ""
        logger.error("error: the launcher ended, but the run did not reach its end.%s", ended)
        return 1
    return 0


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _end_group(group: int) -> int:
    """Terminate the remaining processes of a group and return how many there were."""
    found = _count_group(group)
    for number, patience in ((signal.SIGTERM, SHUTDOWN_GRACE_S), (signal.SIGKILL, 5.0)):
        end = time.monotonic() + patience
        if _count_group(group):
            _signal_group(group, number)
        while _count_group(group) and time.monotonic() < end:
            time.sleep(0.1)
    return found


def _count_group(group: int) -> int:
    """Return the number of a group's running processes, without zombies, which a parent may never wait for."""
    import psutil

    count = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            count += os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    return count


def _explain(status: int) -> int:
    """Return the exit status of a failed run as a shell would, and print the signal that ended a rank."""
    # If SIGKILL ended a rank, the launcher exits with -9, which is reported as 247.
    number = -status if status < 0 else 256 - status
    if 0 < number < 65:
        hint = ". Often that is the machine, out of memory" if number == signal.SIGKILL else ""
        name = signal.strsignal(number)
        logger.error("error: a process of the run was ended by signal %d (%s)%s", number, name, hint)
        return 128 + number
    return status
