"""Start of a study's commands, in processes that share their imports.

Importing the libraries of a training takes seconds, and a study has hundreds of short runs. A server process imports
them once, and every command is a fork of it that runs ``python -m subspace ...`` as a shell would, in a process of its
own: whatever it does or dies of ends with it. A fork can use a GPU as long as the server has not touched it; if one of
the imports has, every command starts anew. If the study's process is killed, so is its fork.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue

import torch

from subspace.distributed.device import device
from subspace.distributed.launcher import visible_devices
from subspace.errors import UserError

#: What a training and a scoring import; none of it starts threads.
PRELOADED = [
    "subspace.cli.main",
    "subspace.run",
    "subspace.evaluation.subjects",
    "deepspeed.runtime.engine",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "transformers.tokenization_utils_tokenizers",
]


class Commands:
    """Runs ``subspace`` with arguments, so many commands at a time, each on its share of this machine.

    Args:
        parallel: how many may run at a time.
        processes: how many processes each has that trains; None: one.

    Raises:
        UserError: there are fewer GPUs than these need.
    """

    def __init__(self, parallel: int = 1, processes: int | None = None) -> None:
        self.more = ["--processes", str(processes)] if processes else []
        self.shares: SimpleQueue[dict[str, str]] = SimpleQueue()
        for share in _shares(parallel, processes or 1):
            self.shares.put(share)
        self.running: set[BaseProcess] = set()
        self.stopped = False

    def __call__(self, arguments: Sequence[str], output: Path) -> int:
        """Run a command, append what it prints to a file, and return its status; negative: ended by a signal.

        A signal that ends this thread's wait is passed on, and waited for: a training saves a checkpoint.
        """
        share = self.shares.get()
        try:
            process = _fork([*arguments, *self.more], output, {**os.environ, **share})
            self.running.add(process)
            try:
                if self.stopped:
                    process.terminate()
                process.join()
                return process.exitcode or 0
            except BaseException:
                process.terminate()
                process.join()
                raise
            finally:
                self.running.discard(process)
        finally:
            self.shares.put(share)

    def stop(self) -> None:
        """Tell all commands to end, those too that are about to start."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()


def _shares(parallel: int, processes: int) -> list[dict[str, str]]:
    """Return the environment of each of so many commands at a time: its GPUs, or how many threads it has."""
    if parallel == 1:
        return [{}]
    devices, cores = visible_devices(), len(os.sched_getaffinity(0))
    if parallel * processes > len(devices or range(cores)):
        here = f"{len(devices)} GPUs" if devices else f"{cores} cores and no GPU"
        most = max(1, (len(devices) or cores) // processes)
        raise UserError(
            f"--parallel {parallel} was asked for with {processes} to a training, but this machine has {here}. "
            f"Use --parallel {most}"
        )
    if devices:
        own = [devices[number * processes : (number + 1) * processes] for number in range(parallel)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in own]
    threads = cores // (parallel * processes)
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}] * parallel


def _fork(arguments: Sequence[str], output: Path, environment: Mapping[str, str]) -> BaseProcess:
    """Start a command in a fork of the server; the first one starts the server."""
    os.environ.setdefault("DS_ACCELERATOR", device().type)  # DeepSpeed looks for others as it is imported, otherwise
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # torch asks the driver's library what GPUs there are
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    where = str(output.resolve()), dict(environment), str(Path.cwd())
    process = context.Process(target=_command, args=(list(arguments), *where))
    process.start()
    return process


def _command(arguments: list[str], output: str, environment: dict[str, str], folder: str) -> None:
    """Become the command; runs in the forked process."""
    gc.freeze()  # what the server imported: DeepSpeed collects garbage in full for every engine, 0.3 s a time
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)  # as of now: the server has that of its start
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # OpenMP read it as the server started
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server ignores
    with Path(output).open("ab", buffering=0) as opened:
        for stream in (1, 2):
            os.dup2(opened.fileno(), stream)
    if torch.cuda._is_in_bad_fork():  # CUDA was started in the server
        os.execve(sys.executable, [sys.executable, "-m", "subspace", *arguments], environment)
    sys.argv = ["subspace", *arguments]
    runpy.run_module("subspace", run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    """Wait for the study's process, and end this one when it is gone, so that the next one does not meet it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)
