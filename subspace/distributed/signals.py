"""Signals set a flag that the training loop checks before each step.

SIGTERM and SIGINT come from users and job schedulers, SIGUSR1 from SLURM shortly before a job's time limit and from
our launcher. SIGTERM has a second meaning: DeepSpeed's launcher sends it to the ranks that are left when one has died.
They would wait for the dead one for ever, so a rank that finds that another one has ended exits at once.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from subspace.distributed.peers import STATUS_FILE, peer_lost

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class SignalHandler:
    """Context manager whose ``stop_requested`` becomes True when a signal asks this process to stop."""

    def __init__(self) -> None:
        self.stop_requested = False

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only; a run in another thread keeps the program's own handlers.
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS} if in_main_thread else {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.stop_requested:
            raise KeyboardInterrupt  # the second Ctrl-C: at once
        if number == signal.SIGTERM and (peer_lost() or any(not _alive(pid) for pid in local_rank_pids())):
            os._exit(128 + number)
        self.stop_requested = True


def register_rank() -> None:
    """Write this process's PID to the folder shared by the launcher and the ranks on this machine."""
    if file := os.environ.get(STATUS_FILE):
        Path(file).with_name(f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))


def local_rank_pids(status_file: str | Path | None = None) -> list[int]:
    """Return the PIDs of the ranks that our launcher started on this machine and that have registered so far."""
    file = status_file or os.environ.get(STATUS_FILE)
    return [int(text) for path in Path(file).parent.glob("rank-*") if (text := path.read_text())] if file else []


def write_status(status: int) -> None:
    """Write the run's exit status where our launcher reads it."""
    if file := os.environ.get(STATUS_FILE):
        Path(file).write_text(str(status))


def read_status(file: str | Path | None) -> int | None:
    """Return the run's status from the file that the launcher and the ranks share; None if there is none yet."""
    if not file or not Path(file).exists():
        return None
    return int(Path(file).read_text() or 1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
