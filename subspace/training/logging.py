"""Logging of a training run: a progress bar or plain lines, ``log.jsonl``, and trackers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import platform
import resource
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from subspace.common import progress
from subspace.common.files import fsync_path, open_log, write_file
from subspace.common.foreign.text import MOST_RESULT_BYTES, read_text
from subspace.common.host_memory import resident_memory
from subspace.common.paths import checkout
from subspace.distributed.collectives import is_main, world_size
from subspace.distributed.device import on_gpu
from subspace.errors import UserError

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"

PACKAGES = ("torch", "deepspeed", "transformers", "bitsandbytes", "accelerate", "datasets", "tokenizers", "safetensors")


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that is not installed."""
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise UserError("train.trackers asks for wandb, which is not installed here. Run: pip install wandb")


def peak_memory() -> int:
    """Return this process's peak memory in bytes: on its GPU if it computes there, else resident."""
    if on_gpu():
        return torch.cuda.max_memory_allocated()
    return resident_memory("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class TrainLogger:
    """Log of a run's steps; silent on ranks other than 0.

    A resumed run has ``done`` steps already, which took ``seconds``; the log continues after them. Messages begin with
    the ``label``.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        *,
        every: int,
        trackers: Sequence[str] = (),
        config: Any = None,
        done: int = 0,
        seconds: float = 0.0,
        label: str = "",
        show: progress.Progress = progress.show_progress,
    ) -> None:
        self.folder, self.steps, self.every = folder, steps, every
        self.label = f"{label}: " if label else ""
        self.done, self.earlier = done, seconds
        self.tokens = self.all_tokens = 0
        self.began = self.last = time.perf_counter()
        self.active = is_main()
        if self.active:
            truncate_log(folder / LOG_FILE, done)
        self.bar = (show if self.active else progress.no_progress)("training", steps, "steps")
        self.at: progress.ProgressCallback
        self.trackers: list[Any] = []
        self._open_trackers = [partial(_tracker, name, folder, config, done) for name in trackers]

    def __enter__(self) -> Self:
        if self.active:
            self.trackers += [opened() for opened in self._open_trackers]
        self.at = self.bar.__enter__()
        self.began = self.last = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.__exit__(kind, error, trace)
        for tracker in self.trackers:
            tracker.close()

    def step(self, step: int, *, loss: float, learning_rate: float, norm: Any, tokens: int) -> None:
        """Record an optimizer step.

        Args:
            step: counted from 1.
            loss: of this step if it is a line of the log, else of the last one that was read.
            learning_rate: of the first parameter group.
            norm: the gradient norm, or None if it is not known. Read from the device only for a line of the log.
            tokens: the number of tokens it processed, over all ranks.
        """
        self.tokens += tokens
        self.all_tokens += tokens
        if not self.active:
            return
        progress.signs.stop()  # steps show that it goes on
        speed = self.all_tokens / (time.perf_counter() - self.began)
        self.at(step, f"loss {loss:.4f}  {speed:,.0f} tok/s")
        if step % self.every == 0 or step in (1, self.steps):
            now = time.perf_counter()
            line = {
                "step": step,
                "loss": loss,
                "learning_rate": learning_rate,
                "gradient_norm": None if norm is None else float(norm),
                "tokens_per_second": self.tokens / (now - self.last),
                "seconds": self.seconds(),
                "processor_seconds": time.process_time(),
                "peak_memory": peak_memory(),
            }
            self.tokens, self.last = 0, now
            self._write(line)

    def seconds(self) -> float:
        """Return the run's training time so far."""
        return self.earlier + time.perf_counter() - self.began

    def flush(self) -> None:
        """Flush the log to disk, before a checkpoint is saved."""
        if self.active and (log := self.folder / LOG_FILE).exists():
            fsync_path(log)

    def validation(self, step: int, loss: float) -> None:
        """Record a validation loss."""
        if self.active:
            self._write({"step": step, "validation_loss": loss})
            self.note(f"step {step}: validation loss {loss:.4f}")

    def note(self, text: str) -> None:
        """Log a message for the user."""
        if self.active:
            logger.info(f"{self.label}{text}")

    def _write(self, line: dict[str, Any]) -> None:
        with open_log(self.folder / LOG_FILE) as file:
            file.write(json.dumps(line) + "\n")
        for tracker in self.trackers:
            tracker.write(line)


class _TensorBoard:
    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)

    def write(self, line: dict[str, Any]) -> None:
        for key, value in line.items():
            if key != "step" and value is not None:
                self.writer.add_scalar(key, value, line["step"])

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, folder: Path, config: Any) -> None:
        import wandb

        self.run = wandb.init(project="subspace", name=folder.name, dir=str(folder), config=config)

    def write(self, line: dict[str, Any]) -> None:
        self.run.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])

    def close(self) -> None:
        self.run.finish()


def truncate_log(log: Path, done: int) -> None:
    """Remove from a log all lines after the step ``done``, which will be repeated, and incomplete lines."""
    if not log.exists():
        return
    kept = []
    for text in read_text(log, most=MOST_RESULT_BYTES).splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(step := line.get("step"), int) and step <= done:
            kept.append(text)
    write_file(log, "".join(f"{text}\n" for text in kept))


def _tracker(name: str, folder: Path, config: Any, done: int) -> Any:
    return _TensorBoard(folder, done) if name == "tensorboard" else _Wandb(folder, config)


def describe_environment() -> dict[str, Any]:
    """Return library versions, git commit, devices, and numbers of processes and threads."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_gpu() else []
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": git_commit(),
        "devices": devices or [platform.processor() or platform.machine()],
        "processes": world_size(),
        "threads": torch.get_num_threads(),
    }


def git_commit() -> str | None:
    """Return the repository's commit, with ``+`` where files differ from it; None outside a repository."""
    repository = checkout()
    if repository is None:
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
