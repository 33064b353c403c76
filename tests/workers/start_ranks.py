"""Starts the ranks of one script, ``start_ranks.py RANKS SCRIPT [ARGUMENT ...]``, as torchrun does more slowly."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from subspace.distributed.launcher import free_port


def main() -> int:
    """Start the processes; where one fails, end the others and return its status."""
    ranks, command = int(sys.argv[1]), [sys.executable, *sys.argv[2:]]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
    started = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)
    ]
    while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
        time.sleep(0.05)
    for process in started:
        process.kill()  # nothing where it has ended
    return next((status for process in started if (status := process.wait())), 0)


if __name__ == "__main__":
    sys.exit(main())
