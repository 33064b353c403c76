"""Connections between the processes of a run, by which each learns that another has ended or has reported a failure.

A launcher sees the processes of its own machine only, gloo notices a closed connection, and NCCL waits for ever. So
each process keeps one TCP connection to rank 0 that says next to nothing. The system closes it when the process ends,
however that happens, and finds by keepalive probes when the other machine or the network is gone. A process that is
merely stopped or busy keeps its connection; :mod:`subspace.distributed.watchdog` finds those.

The connections exist from the start of the process group to :func:`stop`, where our launcher does not start all
processes on one machine and shares a folder with them (:data:`STATUS_FILE`). A failure
before that is told to those who ask at the port where the group would have met.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from subspace.distributed.hosts import meet_on_loopback

#: In the ranks' environment: a file for the run's status. The ranks write their PIDs beside it.
STATUS_FILE = "SUBSPACE_STATUS_FILE"
#: Seconds in which a process that ended, or whoever noticed too, may have reported why.
REPORT_GRACE_S = 3.0
#: Seconds that a process has to end by itself after a failure was reported.
EXIT_GRACE_S = 10.0
#: Seconds for which rank 0 answers those who ask whether it reported a failure.
ANSWER_S = 15.0
#: TCP options: a machine that is gone is noticed after at most 30 seconds. Those that a system lacks are left out.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}

_ANSWER = b"subspace: a failure was reported\n"


@dataclass
class _Peer:
    connection: socket.socket
    rank: int | None = None  # unknown until it has introduced itself
    received: bytes = b""


class PeerWatch:
    """The connections of one process, and the thread that reads them.

    Rank 0 has one to every other process, and passes on what concerns all. The others have one to rank 0.

    Attributes:
        reported: the exit status of the first failure that any process reported; None if there was none.
        hangs: ranks whose watchdog has reported a hang.
        lost: the ranks that ended without a farewell.
    """

    def __init__(self, rank: int, hosts: Sequence[str], token: str) -> None:
        self.rank, self.hosts, self.token = rank, hosts, token
        self.reported: int | None = None
        self.hangs: set[int] = set()
        self.lost: list[int] = []
        self._peers: dict[int, _Peer] = {}
        self._left: set[int] = set()
        self._closing = self._ending = False
        self._sending = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._read_all, name="peers", daemon=True)

    def listen(self, listener: socket.socket) -> None:
        """Accept the others' connections; rank 0's part."""
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, None)
        self._thread.start()

    def connect(self, address: str, port: int) -> None:
        """Connect to rank 0. Raise OSError if that is impossible."""
        connection = socket.create_connection((address, port), timeout=10)
        _keep_alive(connection)
        connection.settimeout(10)
        self._peers[0] = _Peer(connection, 0)
        self._selector.register(connection, selectors.EVENT_READ, self._peers[0])
        self._send(f"{self.token} {self.rank}")
        self._thread.start()

    def report_failure(self, status: int) -> None:
        """Tell all that this process has told the user of a failure and ends with ``status``."""
        if self.reported is None:
            self.reported = status
            self._send(f"failed {status}")

    def report_hang(self) -> None:
        """Tell rank 0 that this process's watchdog has reported a hang."""
        self.hangs.add(self.rank)
        self._send("hang")

    def close(self) -> None:
        """Say farewell and close the connections."""
        self._closing = True
        self._send("bye")
        if self._thread.is_alive():
            self._thread.join(timeout=2)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    # --- the thread ---

    def _read_all(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select(timeout=0.2):
                if key.data is None:
                    self._accept(key.fileobj)  # type: ignore[arg-type]
                else:
                    self._read(key.data)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            _keep_alive(connection)
            connection.settimeout(10)
            self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(4096)
        except OSError:  # reset, or no answer to the keepalive probes
            data = b""
        *lines, peer.received = (peer.received + data).split(b"\n")
        for line in lines:
            self._handle(peer, line.decode(errors="replace").split())
        if not data or (lines and peer.rank is None):  # its end, or somebody else's connection
            self._selector.unregister(peer.connection)
            peer.connection.close()
            if peer.rank is not None and peer.rank not in self._left and not self._closing:
                self.lost.append(peer.rank)
                self._end_soon()

    def _handle(self, peer: _Peer, words: list[str]) -> None:
        match words:
            case [self.token, rank] if peer.rank is None:
                peer.rank = int(rank)
                self._peers[peer.rank] = peer
                if self.reported is not None:
                    self._send(f"failed {self.reported}")
            case _ if peer.rank is None:
                pass
            case ["failed", status]:
                if self.reported is None:
                    self.reported = int(status)
                    if self.rank == 0:
                        self._send(f"failed {status}")
                    self._end_soon()
            case ["hang"]:
                self.hangs.add(peer.rank)
            case ["bye"]:
                self._left.add(peer.rank)

    def _send(self, line: str) -> None:
        with self._sending:
            for peer in list(self._peers.values()):
                with contextlib.suppress(OSError):
                    peer.connection.sendall(line.encode() + b"\n")

    def _end_soon(self) -> None:
        if not self._ending:
            self._ending = True
            threading.Thread(target=self._end, name="end", daemon=True).start()

    def _end(self) -> None:
        """End this process, which would wait for another one for ever; say why if nobody has."""
        _wait(REPORT_GRACE_S, lambda: self.reported is not None or self._closing)
        if self.reported is None and not self._closing and self.rank == self._speaker():
            os.write(2, f"error: {self._what_happened()}\n".encode())
            self.report_failure(1)
        _wait(EXIT_GRACE_S if self.reported is not None else REPORT_GRACE_S, lambda: self._closing)
        if not self._closing:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.reported or 1)

    def _what_happened(self) -> str:
        ranks = ", ".join(f"{rank} (host {self.hosts[rank]})" for rank in sorted(self.lost))
        return (
            f"rank {ranks} ended without a word: killed, by somebody or for lack of memory, or its machine or network "
            "is down. The run cannot go on without it; with --resume it continues from its last checkpoint"
        )

    def _speaker(self) -> int:
        """Return the rank that says what happened: the first one that is likely to be there."""
        if 0 not in self.lost:
            return 0
        elsewhere = (rank for rank, host in enumerate(self.hosts) if host != self.hosts[0])
        return next(elsewhere, 1)


_watch: PeerWatch | None = None


def start(rank: int, hosts: Sequence[str], token: str, where: socket.socket | tuple[str, int]) -> None:
    """Connect the processes of a run; without effect where rank 0 cannot be reached.

    Args:
        rank: this process's.
        hosts: the name of each process's machine.
        token: a secret of the run, by which its connections are known.
        where: rank 0's listening socket; for the others its address and port.
    """
    global _watch
    watch = PeerWatch(rank, hosts, token)
    if isinstance(where, socket.socket):
        watch.listen(where)
    else:
        try:
            watch.connect(*where)
        except OSError:  # a firewall, say; then a process that ended is found by the watchdog only
            return
    _watch = watch


def stop() -> None:
    """Close the connections, without which the others would take this process's end for a failure."""
    global _watch
    if _watch:
        _watch.close()
    _watch = None


@atexit.register
def _leave() -> None:
    """Say farewell at an orderly end of the interpreter without :func:`stop`."""
    if not hasattr(sys, "last_value"):  # which an exception that nobody caught leaves
        stop()


def several_launchers() -> bool:
    """Return True if this process may have siblings that it shares no launcher's folder with."""
    return STATUS_FILE not in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1


def report_failure(status: int) -> None:
    """Tell the other processes that this one has told the user of a failure and ends with ``status``."""
    if _watch:
        _watch.report_failure(status)
    elif several_launchers() and os.environ.get("RANK") == "0":
        with contextlib.suppress(OSError, KeyError):
            listener = open_listener(int(os.environ["MASTER_PORT"]))
            # Not a daemon: the process stays until the others have asked.
            threading.Thread(target=_answer, args=(listener, int(os.environ["WORLD_SIZE"]) - 1)).start()


def reported_status() -> int | None:
    """Return the status with which another process, that has told the user of a failure, ends; None if unknown."""
    return _watch.reported if _watch else None


def failure_reported() -> bool:
    """Return True if another process has told the user of a failure."""
    if _watch:
        return _watch.reported is not None
    if not several_launchers():
        return False
    with contextlib.suppress(OSError, KeyError):
        where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        with socket.create_connection(where, timeout=1) as connection:
            return connection.recv(len(_ANSWER)) == _ANSWER
    return False


def report_hang() -> None:
    """Tell rank 0 that this process's watchdog has reported a hang."""
    if _watch:
        _watch.report_hang()


def hang_reports() -> set[int] | None:
    """Return the ranks that have reported a hang, on rank 0; None if the processes are not connected."""
    return _watch.hangs if _watch else None


def peer_lost() -> bool:
    """Return True if another process is known to have ended."""
    return _watch is not None and bool(_watch.lost)


def open_listener(port: int = 0) -> socket.socket:
    """Return a socket that listens at any free port by default.

    It does so on all of this machine's addresses, or, where the processes meet on this machine, on its own alone.
    """
    if meet_on_loopback():
        return socket.create_server(("127.0.0.1", port), backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _answer(listener: socket.socket, asking: int) -> None:
    """Tell as many processes as there are that a failure was reported."""
    end = time.monotonic() + ANSWER_S
    with listener:
        while asking > 0 and (left := end - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                asking -= 1
                with connection:
                    connection.sendall(_ANSWER)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _wait(seconds: float, until: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        time.sleep(0.05)
