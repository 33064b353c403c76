"""Checks between processes: that all start and meet, interfaces, clocks, the time of an all-reduce."""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from subspace.distributed import launcher
from subspace.doctor.base import (
    CONNECTED,
    TOGETHER,
    Asked,
    Check,
    Facts,
    Finding,
    Seen,
    failed,
    named,
    ok,
    size,
    skipped,
    spans,
    warning,
)

#: Variables that name the interfaces which a library connects through.
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


class Start(Check):
    """Account for every process that the run would have."""

    name = "start"
    asks = "every host is reached, and every process starts and meets the others"
    always = True

    def collect(self, asked: Asked) -> Any:
        return {"folder": str(Path.cwd()), "python": sys.executable, "pid": os.getpid()}

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        yield from seen.troubles
        silent = [rank for rank, host in enumerate(seen.hosts) if host is None]
        if silent and not seen.troubles:
            yield failed(
                f"{named(silent)} of {seen.ranks} did not come to {seen.address}",
                "what they said stands above; if nothing, their host must have this folder and its environment, "
                "and no firewall may keep it from that address",
            )
        if quiet := [rank for rank, host in enumerate(seen.hosts) if host and seen.facts[rank] is None]:
            yield failed(f"{seen.where(quiet)} came, but did not report in time", "see what those processes wait for")
        for key in ("folder", "python"):
            if apart := seen.differences(facts, key):
                yield warning(f"the {key} differs: {apart}", "give all hosts the same paths")
        many = "1 process" if seen.ranks == 1 else f"{seen.ranks} processes"
        hosts = ", ".join(f"{host} ({spans(ranks)})" for host, ranks in seen.by_host(facts).items())
        yield ok(f"{many} on {hosts}, met at {seen.address}")


class Network(Check):
    """Look at host names, interfaces and ports, which libraries connect through."""

    name = "network"
    asks = "host names and interfaces lead to other hosts, and ports are free"

    def collect(self, asked: Asked) -> Any:
        host = socket.gethostname()
        try:
            addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None)})
        except OSError:
            addresses = []
        return {
            "name": host,
            "addresses": addresses,
            "interfaces": sorted(name for _, name in socket.if_nameindex()),
            "settings": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("NCCL_", "GLOO_"))},
            "port": launcher.free_port(),
        }

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        for host, ranks in seen.by_host(facts).items():
            fact = facts[ranks[0]]
            for variable in INTERFACES:
                wanted = fact["settings"].get(variable)
                if wanted and not _matches(wanted, fact["interfaces"]):
                    found = f"{variable}={wanted}, but {host} has {', '.join(fact['interfaces'])}"
                    yield failed(found, "correct it in ~/.deepspeed_env or the job's script")
            usable = [address for address in fact["addresses"] if not address.startswith(("127.", "::1"))]
            if seen.several_hosts and not usable and "GLOO_SOCKET_IFNAME" not in fact["settings"]:
                found = f"the name {fact['name']} leads to {', '.join(fact['addresses']) or 'nothing'} on {host} itself"
                yield warning(found, "correct /etc/hosts, or set GLOO_SOCKET_IFNAME to the interface to use")
        # Gloo's interface is chosen on each host by itself, and may have another name there.
        nccl = {
            rank: {"all": {k: v for k, v in fact["settings"].items() if k[0] == "N"}} for rank, fact in facts.items()
        }
        if apart := seen.differences(nccl, "all"):
            yield warning(f"NCCL's variables differ: {apart}", "set them in ~/.deepspeed_env for all hosts")
        first = facts[min(facts)]
        settings = " ".join(f"{name}={value}" for name, value in first["settings"].items())
        yield ok(f"interfaces {', '.join(first['interfaces'])}; port {first['port']} is free; {settings or 'defaults'}")


def _matches(wanted: str, interfaces: list[str]) -> bool:
    """Return True if a list of interfaces, as NCCL and gloo read it, names one that is here."""
    if wanted.startswith("^"):
        return any(not name.startswith(tuple(wanted[1:].split(","))) for name in interfaces)
    exact, names = wanted.startswith("="), wanted.removeprefix("=").split(",")
    return any(name in names if exact else name.startswith(tuple(names)) for name in interfaces)


class Clocks(Check):
    """Compare the clocks of all hosts at one moment."""

    name = "clocks"
    asks = "clocks of all hosts agree"
    phase = TOGETHER
    #: Seconds of difference that certificates, job schedulers and logs do not mind, and that they do.
    GOOD, BAD = 2.0, 30.0

    def collect(self, asked: Asked) -> Any:
        return None if asked.clock is None else asked.clock[1] - asked.clock[0]

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        known = {rank: offset for rank, offset in facts.items() if offset is not None}
        offsets = {
            host: statistics.median(known[rank] for rank in ranks) for host, ranks in seen.by_host(known).items()
        }
        for host, offset in offsets.items():
            if abs(offset) > self.GOOD:
                way = "ahead of" if offset > 0 else "behind"
                found = f"the clock of {host} is {abs(offset):,.1f} s {way} that of {seen.hosts[0]}"
                yield (failed if abs(offset) > self.BAD else warning)(found, "start chrony or ntpd on every host")
        if not known:
            yield skipped("the processes did not meet")
        elif len(offsets) == 1:
            yield ok("one host")
        else:
            yield ok(f"within {max(map(abs, offsets.values())):.2f} s")


class AllReduce(Check):
    """Form the run's process group, and time what training and scoring send through it."""

    name = "all-reduce"
    asks = "the process group forms; time and bandwidth of an all-reduce, by NCCL where there is a GPU and by gloo"
    phase = CONNECTED
    advice = (
        "all hosts must reach one another at every port: name the interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), "
        "open the firewall; NCCL_DEBUG=INFO tells what NCCL tries"
    )
    #: Bytes, and how often each is timed.
    SIZES = ((4 * 2**10, 20), (2**20, 10), (16 * 2**20, 3))
    #: Bytes a second below which something is wrong, by backend: on one host, and between hosts.
    SLOW: Mapping[str, tuple[float, float]] = {"nccl": (2e9, 5e8), "gloo": (5e7, 5e7)}

    def collect(self, asked: Asked) -> Any:
        from subspace.distributed.collectives import gather_objects, shutdown
        from subspace.distributed.engine import init_distributed

        init_distributed(minutes=2 * asked.wait / 60)  # whoever waits longer has been given up by then
        times = {}
        for backend, reduce in _backends().items():
            times[backend] = [[count, _median_time(reduce, count, repeats)] for count, repeats in self.SIZES]
        # Checkpoints and scores travel as objects.
        heard = gather_objects(f"{asked.name} {asked.rank}")
        shutdown()
        if heard != [f"{asked.name} {rank}" for rank in range(asked.ranks)]:
            raise RuntimeError(f"objects of other ranks arrive wrong: {heard}")
        return times

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        shown = []
        for backend in facts[min(facts)]:
            rows = zip(*(fact[backend] for fact in facts.values()), strict=True)
            slowest = [(row[0][0], max(seconds for _, seconds in row)) for row in rows]
            count, seconds = slowest[-1]
            speed = 2 * (seen.ranks - 1) / seen.ranks * count / seconds
            least = self.SLOW[backend][seen.several_hosts]
            told = ", ".join(f"{size(count)} in {1e3 * seconds:.2f} ms" for count, seconds in slowest)
            shown.append(f"{backend}: {told}" + (f" ({speed / 1e9:.2f} GB/s)" if seen.ranks > 1 else ""))
            if seen.ranks > 1 and speed < least:
                advice = "name the fast interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); NCCL_DEBUG=INFO says which"
                yield warning(f"{backend} moves {speed / 1e9:.3f} GB/s, where {least / 1e9:g} is little", advice)
        if seen.plan and seen.ranks > 1:
            shown.append(f"a step reduces {size(seen.plan.adapter)} of gradients")
        yield ok("; ".join(shown))


def _backends() -> dict[str, Callable[[int], float]]:
    """Return a function that all-reduces a new tensor of so many bytes, for the run's backend, and for gloo."""
    import torch
    import torch.distributed as dist

    from subspace.distributed.device import device

    backends: dict[str, Callable[[int], float]] = {}
    world = str(dist.get_backend())
    for backend in dict.fromkeys((world, "gloo")):
        group = None if backend == world else dist.new_group(backend=backend)
        where = device() if backend == world else torch.device("cpu")

        def reduce(count: int, group: Any = group, where: torch.device = where) -> float:
            value = torch.ones(count // 4, device=where)
            _synchronize(where)
            began = time.perf_counter()
            dist.all_reduce(value, group=group)
            _synchronize(where)
            seconds: float = time.perf_counter() - began
            if not bool((value == dist.get_world_size()).all()):
                raise RuntimeError(f"an all-reduce of {count:,} bytes gives a wrong sum")
            return seconds

        backends[backend] = reduce
    return backends


def _synchronize(where: Any) -> None:
    import torch

    if where.type == "cuda":
        torch.cuda.synchronize(where)


def _median_time(reduce: Callable[[int], float], count: int, repeats: int) -> float:
    reduce(count)  # connects
    return statistics.median(reduce(count) for _ in range(repeats))
