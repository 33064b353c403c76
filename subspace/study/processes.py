"""Start of a study's commands, on a CPU in processes that share their imports.

Importing the libraries of a training takes seconds, and a study has hundreds of short runs. A server process imports
them once, and every command is a fork of it that runs ``python -m subspace ...`` as a shell would, in a process of its
own: whatever it does or dies of ends with it. Where there is a GPU, which a fork could not use if the server had
touched it, every command is an ordinary process. If the study's process is killed, so is its command.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from subspace.distributed.device import on_gpu

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


def run_command(arguments: Sequence[str], output: Path) -> int:
    """Run ``subspace ARGUMENTS``, append what it prints to a file, and return its status; negative: ended by a signal.

    A signal that ends this process's wait is passed on, and waited for: a training saves a checkpoint.
    """
    if on_gpu():
        return _run_process(arguments, output)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, imported by the server, looks for others otherwise
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    where = str(output.resolve()), dict(os.environ), str(Path.cwd())
    process = context.Process(target=_command, args=(list(arguments), *where))
    process.start()
    try:
        process.join()
    except BaseException:
        process.terminate()
        process.join()
        raise
    return process.exitcode or 0


def _run_process(arguments: Sequence[str], output: Path) -> int:
    with output.open("ab") as opened:
        process = subprocess.Popen([sys.executable, "-m", "subspace", *arguments], stdout=opened, stderr=opened)
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _command(arguments: list[str], output: str, environment: dict[str, str], folder: str) -> None:
    """Become the command; runs in the forked process."""
    gc.freeze()  # what the server imported: DeepSpeed collects garbage in full for every engine, 0.3 s a time
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)  # as of now: the server has that of its start
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server ignores
    with Path(output).open("ab", buffering=0) as opened:
        for stream in (1, 2):
            os.dup2(opened.fileno(), stream)
    sys.argv = ["subspace", *arguments]
    runpy.run_module("subspace", run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    """Wait for the study's process, and end this one when it is gone, so that the next one does not meet it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)
