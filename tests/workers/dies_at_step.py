"""The command line, in a process that is killed (SIGKILL) as a training begins a step.

``python -m tests.workers.dies_at_step STEP train ...``
"""

from __future__ import annotations

import os
import signal
import sys

from subspace.cli.main import main
from subspace.distributed.watchdog import Watchdog


def die_at(last: int) -> None:
    """Let this process be killed when the loop tells the watchdog of a step."""
    beat = Watchdog.beat

    def dying(watchdog: Watchdog, doing: int | str, patience: float = 1.0) -> None:
        if isinstance(doing, int) and doing >= last:
            os.kill(os.getpid(), signal.SIGKILL)
        beat(watchdog, doing, patience)

    Watchdog.beat = dying  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    die_at(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
