"""Where the processes of a run meet. On one machine nobody else can: torch's store would listen on every interface.

Whoever reaches that port can read and write what the processes tell one another, and torch asks for no password. So the
first process opens the port itself, on the loopback interface, before torch does. The store that torch makes for the
process group then finds a server at its port, which it shares (``multi_tenant``).
"""

from __future__ import annotations

import datetime
import os
import socket

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from subspace.distributed import launcher
from subspace.distributed.hosts import meet_on_loopback


def open_store(timeout: datetime.timedelta) -> TCPStore:
    """Return a connection to the store at MASTER_ADDR and MASTER_PORT, which rank 0 holds.

    Raises:
        RuntimeError: rank 0's port is taken, or rank 0 cannot be reached within ``timeout``.
    """
    port = int(os.environ["MASTER_PORT"])
    holds = launcher.launched_rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    listener = _listen_on_loopback(port) if holds and meet_on_loopback() else None
    return TCPStore(
        os.environ["MASTER_ADDR"],
        port,
        is_master=holds,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,  # the process group uses the same port
        master_listen_fd=listener,
    )


def _listen_on_loopback(port: int) -> int | None:
    """Return the handle of a listening socket; None if this process has opened the port before, which is shared."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(2048)
    except OSError:  # torch says whose it is
        listener.close()
        return None
    return listener.detach()
