"""The end of processes whose starter is gone.

A process that is killed takes nothing with it: the wrapper of a launch, killed for lack of memory or by the end of a
container, leaves the launcher and the ranks training; a launcher that is killed leaves the ranks. So whoever starts
processes holds a lock, which the system frees however its holder ends, and gives them its name (:data:`WATCH`). They
look once a second. A training saves a checkpoint and ends as at any other signal, within :data:`END_S`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from subspace.common.locks import held, is_held
from subspace.errors import tell

#: In the environment of processes: the file that their starter holds.
WATCH = "SUBSPACE_WATCH"
LOOK_S = 1.0
#: Seconds for which the wrapper has the ends of a launch to itself, once the launcher is gone.
LAUNCHER_GRACE_S = 8.0
#: Seconds that a process has to end by itself.
END_S = 60.0


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[dict[str, str]]:
    """Context manager: yield the environment variables of processes that are to end with this one.

    ``folder`` is one of its own, which they can see.
    """
    file = folder / "starter"
    with held(file):
        yield {WATCH: f"{os.getpid()}:{file}"}


def end_with_starter() -> None:
    """Let this process end when the one that started it does, if that has asked for it. Returns at once."""
    if named := os.environ.get(WATCH):
        pid, _, file = named.partition(":")
        arguments = (int(pid), Path(file), os.getppid())
        threading.Thread(target=_watch, args=arguments, name="starter", daemon=True).start()


def _watch(starter: int, file: Path, parent: int) -> None:
    """End this process when the starter is gone, or the launcher between the two."""
    alone: float | None = None  # since when the launcher is gone
    while _is_there(starter, file):
        if os.getppid() != parent:
            alone = alone or time.monotonic()
            if time.monotonic() - alone > LAUNCHER_GRACE_S:
                break
        time.sleep(LOOK_S)
    with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone too
        tell("note: what started this process is gone, and it ends too")
    os.kill(os.getpid(), signal.SIGUSR1)  # the request to end between two steps
    time.sleep(END_S)
    os._exit(128 + signal.SIGUSR1)


def _is_there(starter: int, file: Path) -> bool:
    """Return True if the starter runs: by its number, and by its lock, because a number may be given again.

    A folder of temporary files may be cleaned up while a training takes weeks: then its number alone counts.
    """
    try:
        os.kill(starter, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return not file.exists() or is_held(file)
