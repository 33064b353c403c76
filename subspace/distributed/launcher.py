"""Launch of a command in several processes through DeepSpeed's launcher, with the run's own exit status.

That launcher has four faults, which a wrapper works around, and more on several hosts
(:mod:`subspace.distributed.hosts`):

- SIGTERM or SIGINT to its first process leaves the ranks running, and the process below that ends them within 30
  seconds. The wrapper (:mod:`subspace.distributed.supervision`) gives the launch a process group of its own, passes
  signals on to the ranks alone, as SIGUSR1, so that they can end between two steps
  (:mod:`subspace.distributed.signals`), and ends what is left afterwards. A second signal ends all at once.
- A launcher that is killed leaves the ranks running, and ``deepspeed``, which started it, ends with status 0. So the
  wrapper starts it itself, and status 0 counts only together with a marker that the run writes at its end
  (:func:`write_success_marker`).
- Two launches take the same port. The wrapper picks a free one.
- It replaces CUDA_VISIBLE_DEVICES by numbers that it counts from 0, and cannot read names such as ``GPU-8932f937`` and
  ``MIG-1``. The wrapper gives it numbers, and the ranks put the user's own list back (:data:`DEVICES`).

A run of one process needs no launcher: it becomes rank 0 of 1 (:func:`init_rank_env`) and goes through the same code.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import re
import secrets
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from subspace.common.paths import checkout
from subspace.distributed import hosts, peers
from subspace.distributed.orphans import end_with_starter, holding
from subspace.distributed.peers import STATUS_FILE
from subspace.distributed.reach import ensure_reachable
from subspace.distributed.signals import read_status, register_rank, write_status
from subspace.distributed.supervision import supervise
from subspace.errors import RunStopped, UserError, shown, tell

#: In the ranks' environment: the user's CUDA_VISIBLE_DEVICES, as far as the run uses it.
DEVICES = "SUBSPACE_DEVICES"
#: Processes of a run, and of one machine without GPUs for each of its cores: more than anybody has a use for.
MOST_RANKS, MOST_BY_CORE = 1 << 16, 16
#: Seconds that ranks other than 0 wait before they report a failure. The launcher polls every second.
REPORT_DELAY_S = 5.0


#: What launchers tell a process in numbers, and the smallest and largest that can be meant.
LAUNCH_NUMBERS = {
    "RANK": (0, MOST_RANKS - 1),
    "WORLD_SIZE": (1, MOST_RANKS),
    "LOCAL_RANK": (0, hosts.MOST_SLOTS - 1),
    "LOCAL_SIZE": (1, hosts.MOST_SLOTS),
    "LOCAL_WORLD_SIZE": (1, hosts.MOST_SLOTS),
    "MASTER_PORT": (1, 65_535),
}


def launch_fault() -> str | None:
    """Return what is wrong with what a launcher says in this process's environment; None where nothing is."""
    if not under_launcher():
        return None
    for name, (least, most) in LAUNCH_NUMBERS.items():
        text = os.environ.get(name)
        if text is not None and not (re.fullmatch(r"[0-9]{1,9}", text) and least <= int(text) <= most):
            return f"{name} is {shown(text)}, but should be a number from {least:,} to {most:,}"
    for name, of in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", hosts.local_size_variable())):
        if name in os.environ and of in os.environ and int(os.environ[name]) >= int(os.environ[of]):
            return f"{name} is {os.environ[name]} where {of} is {os.environ[of]}, and ranks are counted from 0"
    if not re.fullmatch(r"[\w:\[][\w.:%\[\]-]{0,254}", os.environ.get("MASTER_ADDR", "localhost"), re.ASCII):
        return f"MASTER_ADDR is {shown(os.environ['MASTER_ADDR'])}, which is no host's name or address"
    return None


def check_launch() -> None:
    """Raise UserError where a launcher says what cannot be, before anything waits for processes that never come."""
    if fault := launch_fault():
        raise UserError(
            f"RANK and WORLD_SIZE are set, as by a launcher, but {fault}. Start it with `subspace ... --processes N`, "
            "or take these variables away"
        )
    if (kind := os.environ.get("DS_ACCELERATOR", "cpu")) not in ("cpu", "cuda"):
        raise UserError(f"DS_ACCELERATOR is {shown(kind)}. cpu and cuda are possible, and none, which finds out")


def check_meeting() -> None:
    """Raise UserError where a launcher does not say where its processes meet."""
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UserError(
            f"RANK and WORLD_SIZE are set, as by a launcher, but {' and '.join(missing)} not, so that the processes "
            "cannot meet"
        )


def under_launcher() -> bool:
    """Return True if a launcher started this process: ours, ``deepspeed``, ``torchrun`` or ``launch/slurm.sh``."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_rank() -> int:
    """Return this process's rank from the environment; also valid before the process group is initialised."""
    check_launch()
    return int(os.environ["RANK"]) if under_launcher() else 0


def launched_world_size() -> int:
    """Return the number of processes from the environment; also valid before the process group is initialised."""
    check_launch()
    return int(os.environ["WORLD_SIZE"]) if under_launcher() else 1


def init_rank_env() -> None:
    """Prepare a process of the command line to be a rank. Call it before torch is imported.

    Besides :func:`set_rank_env`, it makes process-wide settings: the number of threads and DeepSpeed's log level.
    """
    check_launch()
    if devices := os.environ.pop(DEVICES, ""):
        names = devices.split(",")
        # CUDA shows a process one MIG instance at most, the first of the list.
        own = names[int(os.environ["LOCAL_RANK"])] if names[0].startswith("MIG-") else devices
        os.environ["CUDA_VISIBLE_DEVICES"] = own
    ranks_here = os.environ.get(hosts.local_size_variable()) or "1" if under_launcher() else "1"
    os.environ.setdefault("OMP_NUM_THREADS", _threads(int(ranks_here)))
    set_rank_env()
    register_rank()
    end_with_starter()
    # Imports torch, which reads OMP_NUM_THREADS.
    from subspace.distributed.deepspeed_compat import silence_deepspeed

    silence_deepspeed()


#: What makes cuBLAS, flash-attention under transformers, and NCCL add up in the same order each time. They read it when
#: CUDA starts, at each call, and when a communicator is made.
DETERMINISTIC_ENV = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
    "NCCL_NVLS_ENABLE": "0",
}


def set_rank_env(*, deterministic: bool = False) -> None:
    """Set the environment variables that libraries read: rank 0 of 1 unless a launcher set them, device, network.

    All of this package's writing to ``os.environ`` for a training process is here and in :func:`init_rank_env`.
    """
    check_launch()
    for name, value in DETERMINISTIC_ENV.items() if deterministic else ():
        os.environ.setdefault(name, value)
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the variable's former name
        # Batches have other lengths in every step. In segments that cannot grow, what is free is soon in small pieces.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not under_launcher():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    elif os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    ranks_here = os.environ.get(hosts.local_size_variable())
    if ranks_here == os.environ["WORLD_SIZE"] and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # all of them are here, whatever name a batch system gives this machine
    devices = visible_devices()
    if not devices:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    elif len(devices) == 1:  # the only one that a batch system shows this process; DeepSpeed counts from this variable
        os.environ["LOCAL_RANK"] = "0"
    if interface := hosts.gloo_interface():
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        if interface == hosts.LOOPBACK:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def write_success_marker() -> None:
    """Write the marker of a successful run; the last action of a command in each rank."""
    if os.environ["RANK"] == "0":
        write_status(0)


def should_report_error(status: int, *, at_once: bool = True) -> bool:
    """Return True if this rank should print the error that it is about to exit with.

    Often every rank fails, for the same reason or because another did, and one message is enough. The first rank prints
    ``at_once``. The others wait for :data:`REPORT_DELAY_S`, during which the launcher ends them if the first has
    printed; until then they keep their connections open, so that the first does not fail because of them. Where no
    launcher of ours ends them, on several hosts and under SLURM, they ask the first
    (:mod:`subspace.distributed.peers`).
    """
    if launch_fault() or not under_launcher():  # there are no others
        write_status(status)
        return True
    if os.environ["RANK"] != "0" or not at_once:
        end = time.monotonic() + REPORT_DELAY_S
        while time.monotonic() < end:
            if read_status(os.environ.get(STATUS_FILE)) is not None or peers.failure_reported():
                return False
            time.sleep(0.1)
    write_status(status)
    peers.report_failure(status)
    return True


@contextlib.contextmanager
def stopping_at_signal() -> Iterator[None]:
    """End a training run at SIGUSR1 with the status of one that was stopped, wherever its loop does not heed signals.

    While a model is loaded there is nothing to save, but whoever sends the signal queues the run anew by that status.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python delivers no signals
        yield
        return
    before = signal.signal(signal.SIGUSR1, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _stop(number: int, frame: FrameType | None) -> None:
    # Not an exception that a library's `except Exception` takes for a failure of its own.
    if should_report_error(RunStopped.status):
        tell("stopped: by a signal, before its first step or after its last one; repeat the command with --resume")
    sys.exit(RunStopped.status)


def is_peer_failure(error: BaseException) -> bool:
    """Return True if an error only means that another process ended, by messages of gloo, NCCL and torch's store."""
    words = ("by peer", "Broken pipe", "remote process exited", "Connection was likely closed", "Socket closed")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


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
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: indices, UUIDs, MIG instances."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] or [str(index) for index in range(count)]


@dataclass(frozen=True)
class Launch:
    """A command line and environment that start a command in several processes."""

    command: tuple[str, ...]
    environment: dict[str, str]  # of the ranks, in addition to what they inherit
    processes: int = 0  # on this machine; 0 where the hosts have as many as the hostfile says
    #: Where the ranks are if not on this machine only. They do not inherit the environment then, nor the path of their
    #: marker; the shells' own status shows that a launcher was killed.
    hosts: tuple[str, ...] = ()

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])

    @property
    def what(self) -> str:
        """What is started, for people."""
        return f"the processes on {', '.join(self.hosts)}" if self.hosts else f"{self.processes} processes"

    def run(self) -> int:
        """Start the processes, forward signals, wait, terminate remaining processes, and return the run's status."""
        if self.hosts:
            ensure_reachable(self.hosts)
        with tempfile.TemporaryDirectory(prefix="subspace-") as folder:
            status_file = Path(folder) / "status"
            end_with_starter()  # this wrapper may have one too
            with holding(Path(folder)) as watched:  # which other hosts cannot see: a guard ends their processes
                environment = _ranks_environment(self, status_file) | ({} if self.hosts else watched)
                return supervise(self.command, environment, status_file, self.hosts)


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
        UserError: more processes than devices, or a hostfile or ``.deepspeed_env`` that cannot be read.
    """
    environment: dict[str, str] = {}
    names: tuple[str, ...] = ()
    if hostfile:
        names = tuple(hosts.read_hostfile(hostfile))
        hosts.read_environment_files()
        module = [hosts.MODULE, "launch"]
        where = ["--hostfile", hostfile, "--force_multi", *(["--num_gpus", str(processes)] if processes else [])]
    else:
        devices = visible_devices()
        count = processes or max(len(devices), 1)
        if devices and count > len(devices):
            raise UserError(
                f"{count} processes were requested, but each needs a GPU and this machine has {len(devices)}. "
                f"Use --processes {len(devices)}"
            )
        if not devices and count > (most := MOST_BY_CORE * _cores()):
            raise UserError(
                f"{count:,} processes were requested, but this machine has {_cores()} cores and no GPU. Use "
                f"--processes {_cores()}, and no more than {most}"
            )
        if count == 1:
            return None
        # `deepspeed` is two processes, of which the second starts the ranks. On one machine the first does no more than
        # tell it this list of devices, two seconds later.
        world = base64.urlsafe_b64encode(json.dumps({"localhost": [*range(count)]}).encode()).decode()
        module, where = ["deepspeed.launcher.launch"], [f"--world_info={world}", "--master_addr=127.0.0.1"]
        if devices and "CUDA_VISIBLE_DEVICES" in os.environ:
            environment[DEVICES] = ",".join(devices[:count])
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or _threads(count)
        if not devices:
            environment["DS_ACCELERATOR"] = (
                "cpu"  # otherwise the launcher warns three times that it found no accelerator
            )
    launcher = [sys.executable, "-m", *module, *where, "--master_port", str(free_port())]
    # Only the ranks' messages matter: the launcher would repeat the command of one that fails.
    launcher += ["--log_level", "critical", "--no_local_rank"]
    return Launch((*launcher, *program, *arguments), environment, 0 if hostfile else count, names)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads(ranks: int) -> str:
    """Return the number of CPU threads of each of a machine's ranks."""
    cores = _cores()
    # srun may have bound this process to cores of its own, which no other rank uses.
    of_node = os.environ.get("SLURM_CPUS_ON_NODE", "") if "SLURM_PROCID" in os.environ else ""
    all_cores = max(int(of_node), cores) if re.fullmatch(r"[0-9]{1,6}", of_node) else cores
    return str(min(max(all_cores // ranks, 1), cores))


def _ranks_environment(launch: Launch, status_file: Path) -> dict[str, str]:
    """Return the environment variables of the ranks."""
    environment = {**os.environ, **launch.environment, STATUS_FILE: str(status_file)}
    # DeepSpeed looks for ninja on the path, which lacks the virtual environment's folder unless that is activated.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if repository := checkout():  # the processes find an installed package by themselves
        paths = [str(repository), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(paths).rstrip(os.pathsep)
    # The launcher replaces it, and says so on standard output, where --json prints.
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    if launch.hosts:
        environment[hosts.MARK_TO_GIVE] = secrets.token_hex(8)
    return environment
