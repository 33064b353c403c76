"""Checks of what computes: devices, memory, cores and threads, the system's limits."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from subspace.common.host_memory import available_memory, resident_memory
from subspace.distributed.device import device
from subspace.doctor.base import Asked, Check, Facts, Finding, Seen, failed, group, ok, size, warning

#: What is asked of nvidia-smi, which tells more than torch does.
SMI = ("uuid", "driver_version", "ecc.errors.uncorrected.volatile.total", "persistence_mode")
SMI_SECONDS = 5.0


class Devices(Check):
    """Ask every process which device it computes on."""

    name = "devices"
    asks = "every process has a device of its own, and all are of one kind"

    def collect(self, asked: Asked) -> Any:
        import torch

        where = device()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        facts: dict[str, Any] = {"device": str(where), "kind": where.type, "visible": visible, "smi": _smi()}
        if where.type == "cuda":
            about = torch.cuda.get_device_properties(where)
            free, total = torch.cuda.mem_get_info(where)
            listed = [entry.strip() for entry in (visible or "").split(",")]
            facts |= {
                "name": about.name,
                "uuid": str(getattr(about, "uuid", "")) or None,
                "entry": listed[where.index or 0] if len(listed) > (where.index or 0) else None,
                "count": torch.cuda.device_count(),
                "free": free,
                "total": total,
            }
        return facts

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        if apart := seen.differences(facts, "kind"):
            yield failed(f"some processes compute on another kind of device: {apart}", "look at `nvidia-smi` there")
            return
        on_gpu = {rank: fact for rank, fact in facts.items() if fact["kind"] == "cuda"}
        for identity, ranks in group({rank: _identity(seen, rank, fact) for rank, fact in on_gpu.items()}):
            if len(ranks) > 1:
                yield failed(
                    f"{seen.where(ranks)} share one device, {identity[1]}",
                    "start one process for each GPU (--processes); look at CUDA_VISIBLE_DEVICES and SLURM's --gpus-*",
                )
        for key, what in (("name", "the devices differ"), ("driver_version", "drivers differ")):
            of_ranks = {rank: {key: fact.get(key) or _own(fact).get(key)} for rank, fact in on_gpu.items()}
            if apart := seen.differences(of_ranks, key):
                yield warning(f"{what}: {apart}", "the slowest sets the pace; take hosts of one kind")
        for rank, fact in on_gpu.items():
            errors = _own(fact).get(SMI[2], "0")
            if errors.isdigit() and int(errors):
                yield warning(
                    f"{fact['name']} of {seen.where([rank])} counts {errors} uncorrected memory errors",
                    "reset it or take another one (`nvidia-smi -q -d ECC`)",
                )
        if unused := [rank for rank, fact in facts.items() if fact["kind"] == "cpu" and fact["smi"]]:
            yield warning(
                f"nvidia-smi lists {len(facts[unused[0]]['smi'])} GPUs, but torch uses the CPU ({seen.where(unused)})",
                "install a CUDA build of torch; or CUDA_VISIBLE_DEVICES or DS_ACCELERATOR hide them on purpose",
            )
        for names, ranks in group({rank: fact.get("name", "CPU") for rank, fact in facts.items()}):
            fact = facts[ranks[0]]
            extra = f", {size(fact['total'])}, driver {_own(fact).get('driver_version', 'unknown')}" if on_gpu else ""
            yield ok(f"{names}{extra} ({seen.where(ranks)})")


def _identity(seen: Seen, rank: int, fact: dict[str, Any]) -> tuple[str, str]:
    """Return a device's host and a name for it that no other device of the host has."""
    entry = fact["entry"] or ""
    return (seen.hosts[rank] or "?", entry if entry.startswith("MIG") else fact["uuid"] or fact["device"])


def _own(fact: dict[str, Any]) -> dict[str, str]:
    """Return what nvidia-smi says of a process's own device; nothing if it does not know it."""
    uuid = str(fact.get("uuid") or "")
    return next((one for one in fact["smi"] or [] if uuid and one["uuid"].removeprefix("GPU-") == uuid), {})


def _smi() -> list[dict[str, str]] | None:
    """Return what nvidia-smi says of each GPU; None if it is not there or says nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.strip()]
    return [dict(zip(SMI, row, strict=True)) for row in rows if len(row) == len(SMI)] or None


class Memory(Check):
    """Compare free memory with what the run's estimate takes."""

    name = "memory"
    asks = "free memory of devices and hosts, against the run's estimate"
    #: Bytes of a GPU that this process itself and the system may hold.
    OWN = 2 * 10**9
    #: Share of the free memory above which an estimate is too close.
    TIGHT = 0.9

    def collect(self, asked: Asked) -> Any:
        import torch

        available, total = available_memory()
        where = device()
        gpu = torch.cuda.mem_get_info(where) if where.type == "cuda" else None
        return {"available": available, "total": total, "resident": resident_memory(), "gpu": gpu}

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        need = seen.plan.needed if seen.plan else None
        advice = "`subspace plan` shows it by part: try a smaller train.micro_batch_size, model.quantize=nf4 or ZeRO 3"
        for rank, fact in facts.items():
            if not fact["gpu"]:
                continue
            free, total = fact["gpu"]
            if total - free > max(self.OWN, total / 20):
                yield warning(
                    f"{size(total - free)} of the GPU of {seen.where([rank])} are in use", "nvidia-smi: whose?"
                )
            if need and need > self.TIGHT * free:
                state = failed if need > free else warning
                yield state(f"the run takes about {size(need)}, and {seen.where([rank])} has {size(free)} free", advice)
        for host, ranks in seen.by_host(facts).items():
            fact = facts[ranks[0]]
            # What these processes hold now is in the estimate too.
            free = fact["available"] + sum(facts[rank]["resident"] for rank in ranks)
            all_need = need * len(ranks) if need and not fact["gpu"] else 0
            if all_need > self.TIGHT * free:
                found = (
                    f"{len(ranks)} processes take about {size(all_need)} of {host}'s memory, and {size(free)} are free"
                )
                yield (failed if all_need > free else warning)(found, advice)
            elif fact["total"] and free < fact["total"] / 10:
                yield warning(f"{host} has {size(free)} of {size(fact['total'])} free", "end what else runs there")
        yield ok(
            "; ".join(self._summary(seen, facts)) + (f"; the run takes about {size(need)} a process" if need else "")
        )

    @staticmethod
    def _summary(seen: Seen, facts: Facts) -> Iterator[str]:
        for host, ranks in seen.by_host(facts).items():
            fact = facts[ranks[0]]
            gpus = [facts[rank]["gpu"][0] for rank in ranks if facts[rank]["gpu"]]
            on_gpus = f" and at least {size(min(gpus))} a GPU" if gpus else ""
            yield f"{host}: {size(fact['available'])} of {size(fact['total'])}{on_gpus} free"


class Threads(Check):
    """Compare the threads of all processes with the cores that they may use."""

    name = "threads"
    asks = "CPU cores and threads of each process"

    def collect(self, asked: Asked) -> Any:
        import torch

        here = hasattr(os, "sched_getaffinity")
        cores = sorted(os.sched_getaffinity(0)) if here else list(range(os.cpu_count() or 1))
        return {"cores": cores, "threads": torch.get_num_threads(), "quota": _quota()}

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        shown = []
        for host, ranks in seen.by_host(facts).items():
            cores = len({core for rank in ranks for core in facts[rank]["cores"]})
            quota = facts[ranks[0]]["quota"]
            usable = min(cores, quota) if quota else cores
            threads = sum(facts[rank]["threads"] for rank in ranks)
            shown.append(f"{host}: {threads} threads in {len(ranks)} processes on {usable:g} cores")
            fit = max(int(usable // len(ranks)), 1)
            if threads > max(usable, len(ranks)):
                yield warning(f"{shown[-1]}: they take turns", f"set OMP_NUM_THREADS={fit}, or ask for more cores")
            elif fit >= 4 * max(facts[rank]["threads"] for rank in ranks):
                yield warning(f"{shown[-1]}: most cores are idle", f"set OMP_NUM_THREADS={fit}")
            if len(ranks) > usable:
                yield warning(
                    f"{len(ranks)} processes share {usable:g} cores of {host}", "each should have one at least"
                )
        yield ok("; ".join(shown))


def _quota() -> float | None:
    """Return how many cores a container may keep busy, by its control group; None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


class Limits(Check):
    """Look at the limits that end a run in the middle: open files, shared memory, locked memory, file size."""

    name = "limits"
    asks = "limits of open files, shared memory, locked memory and file size"
    FILES = 1024
    #: Bytes of /dev/shm for each process: NCCL's buffers between GPUs of one host.
    SHARED = 256 * 2**20

    def collect(self, asked: Asked) -> Any:
        def limit(kind: int) -> int | None:
            soft = resource.getrlimit(kind)[0]
            return None if soft == resource.RLIM_INFINITY else soft

        shm = Path("/dev/shm")
        return {
            "files": limit(resource.RLIMIT_NOFILE),
            "locked": limit(resource.RLIMIT_MEMLOCK),
            "file_size": limit(resource.RLIMIT_FSIZE),
            "shared": shutil.disk_usage(shm).free if shm.is_dir() else None,
            "infiniband": any(Path("/sys/class/infiniband").glob("*")),
            "kind": device().type,
        }

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        biggest = seen.plan.checkpoint if seen.plan else 0
        for host, ranks in seen.by_host(facts).items():
            fact = facts[ranks[0]]
            on_gpu = fact["kind"] == "cuda"
            if fact["files"] is not None and fact["files"] < self.FILES:
                yield warning(f"{host} allows {fact['files']} open files a process", f"ulimit -n {64 * self.FILES}")
            need = self.SHARED * len(ranks)
            if on_gpu and len(ranks) > 1 and fact["shared"] is not None and fact["shared"] < need:
                found = f"{host} has {size(fact['shared'])} of shared memory (/dev/shm) for {len(ranks)} GPUs"
                yield warning(found, "a container gets more by --shm-size=1g or --ipc=host; else NCCL may fail")
            if on_gpu and seen.several_hosts and fact["infiniband"] and fact["locked"] is not None:
                found = f"{host} allows {size(fact['locked'])} of locked memory, and InfiniBand needs it unlimited"
                yield warning(found, "ulimit -l unlimited; a container: --ulimit memlock=-1")
            if fact["file_size"] is not None and fact["file_size"] < max(biggest, 10**8):
                yield failed(f"{host} allows files of {size(fact['file_size'])} at most", "ulimit -f unlimited")
        first = facts[min(facts)]
        shared = "none" if first["shared"] is None else size(first["shared"])
        yield ok(f"{first['files'] or 'any number of'} open files, {shared} of shared memory")
