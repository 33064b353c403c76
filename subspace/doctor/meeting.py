"""The ranks' exchange of facts through torch's store at MASTER_ADDR and MASTER_PORT, before there is a process group.

A store needs one open port on rank 0's host. A process group needs connections between all ranks and fails for more
reasons; what the ranks found reaches rank 0 all the same. The group is formed at this address afterwards.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Container
from typing import Any

from torch.distributed import DistStoreError, PrefixStore  # type: ignore[attr-defined]

from subspace.distributed import launcher
from subspace.distributed.rendezvous import open_store


def address() -> str:
    """Return where the ranks meet."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


class Meeting:
    """One rank's connection to the others.

    Raises:
        RuntimeError: rank 0's port is taken, or rank 0 cannot be reached within ``wait`` seconds.
    """

    def __init__(self, wait: float) -> None:
        self.rank, self.ranks = launcher.launched_rank(), launcher.launched_world_size()
        self._store = PrefixStore("subspace-doctor", open_store(datetime.timedelta(seconds=wait)))

    def post(self, stage: str, value: Any) -> None:
        """Send rank 0 a value that JSON can represent."""
        self._store.set(f"{stage}/{self.rank}", json.dumps(value, default=str))

    def gather(self, stage: str, seconds: float, of: Container[int] | None = None) -> list[Any]:
        """Return what the ranks posted; None for those that did not within so many seconds, together, or are not asked.

        Args:
            stage: under which name they post.
            seconds: how long to wait for all of them.
            of: the ranks to wait for; None for all.
        """
        end = time.monotonic() + seconds
        asked = [of is None or rank in of for rank in range(self.ranks)]
        return [self._read(f"{stage}/{n}", end - time.monotonic()) if ask else None for n, ask in enumerate(asked)]

    def announce(self, what: str, value: Any) -> None:
        """Tell all ranks a value."""
        self._store.set(what, json.dumps(value))

    def hear(self, what: str, seconds: float) -> Any:
        """Return what rank 0 announces; None if it does not within so many seconds."""
        return self._read(what, seconds)

    def _read(self, key: str, seconds: float) -> Any:
        try:
            self._store.wait([key], datetime.timedelta(seconds=max(seconds, 0.01)))
        except DistStoreError:
            return None
        return json.loads(self._store.get(key))
