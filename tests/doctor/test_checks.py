"""Each check judges planted facts: what is well is ok, and each fault is found and named."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from subspace.common.paths import REPOSITORY
from subspace.config import RunConfig, read_config
from subspace.doctor.base import FAILED, OK, SKIPPED, WARNING, Asked, Check, Facts, Finding, Seen, attempt, spans
from subspace.doctor.checks import CHECKS
from subspace.doctor.checks.hardware import Devices, Limits, Memory, Threads
from subspace.doctor.checks.network import AllReduce, Clocks, Network, Start
from subspace.doctor.checks.software import Compilers, Imports, Settings, Versions
from subspace.doctor.checks.storage import Cache, Disk, Prepared, SharedFolder
from subspace.doctor.report import Report
from subspace.planning.plan import Plan
from tests.helpers.material import make_material

GB = 10**9


def seen(check: Check, *facts: Any, hosts: tuple[str, ...] = ("a", "b"), **more: Any) -> Seen:
    """Return what rank 0 knows if each rank collected these facts, and nothing else."""
    return Seen(hosts[: len(facts)], [{check.name: fact} for fact in facts], **more)


def states(check: Check, *facts: Any, **more: Any) -> list[str]:
    return [finding.state for finding in check.findings(seen(check, *facts, **more))]


def told(check: Check, *facts: Any, **more: Any) -> str:
    """Return what a check says is wrong, of the worst state that it found."""
    report = Report.of(seen(check, *facts, **more))
    (line,) = (line for line in report.lines if line.name == check.name)
    return " | ".join(f"{finding.state}: {finding.found}" for finding in line.worst)


def plan(**changes: Any) -> Plan:
    """Return an estimate in which nothing but what the checks read has a value."""
    sizes = {"needed": 2 * GB, "checkpoint": GB, "adapter": GB // 2, "trained": 10**6}
    return Plan(**{**{field.name: None for field in dataclasses.fields(Plan)}, **sizes, **changes})


def config(folder: Path, *settings: str) -> RunConfig:
    return read_config(make_material(folder), settings)


VERSIONS = {"python": "3.12.1", "torch": "2.13.0", "subspace": "0.1.0", "commit": "c0ffee00", "nccl": None}


def test_equal_versions_are_ok_and_named() -> None:
    fact = {"versions": VERSIONS, "outside": {}}
    assert told(Versions(), fact, fact) == "ok: python 3.12.1, torch 2.13.0, subspace 0.1.0, commit c0ffee00"


@pytest.mark.parametrize("name", VERSIONS)
def test_a_version_that_differs_is_named_with_its_host(name: str) -> None:
    other = {"versions": {**VERSIONS, name: "9.9"}, "outside": {}}
    found = told(Versions(), {"versions": VERSIONS, "outside": {}}, other)
    assert found.startswith(f"failed: {name} differs: ")
    assert "9.9 (rank 1 on b)" in found


def test_a_version_outside_the_tested_range_is_a_warning() -> None:
    fact = {"versions": VERSIONS, "outside": {"torch": "<2.13"}}
    assert told(Versions(), fact) == "warning: torch 2.13.0 is outside the tested range <2.13 (rank 0 on a)"


def test_a_library_that_does_not_import_matters_if_the_run_needs_it(tmp_path: Path) -> None:
    broken = {"bitsandbytes": "OSError: no libcudart"}
    assert told(Imports(), {}, broken).startswith("warning: bitsandbytes")
    assert told(Imports(), {}, broken, config=config(tmp_path)).startswith("warning: bitsandbytes")
    quantized = config(tmp_path, "model.quantize=nf4")
    assert told(Imports(), {}, broken, config=quantized).startswith("failed: bitsandbytes")
    assert told(Imports(), {"transformers": "ImportError"}).startswith("failed: transformers")


def gpu(uuid: str, **more: Any) -> dict[str, Any]:
    about = {"device": "cuda:0", "kind": "cuda", "visible": None, "entry": None, "name": "H100", "uuid": uuid}
    own = {"uuid": f"GPU-{uuid}", "driver_version": "580.1", "ecc.errors.uncorrected.volatile.total": "0"}
    return {**about, "count": 1, "free": 80 * GB, "total": 80 * GB, "smi": [own], **more}


def test_two_ranks_on_one_device_are_found() -> None:
    one, two = gpu("x"), gpu("y")
    assert states(Devices(), one, two, hosts=("a", "a")) == [OK]
    assert told(Devices(), one, one, hosts=("a", "a")) == "failed: ranks 0-1 on a share one device, x"
    assert states(Devices(), one, one) == [OK]  # on two hosts that a test makes of one


def test_two_instances_of_one_device_are_two_devices() -> None:
    instances = [gpu("x", entry=f"MIG-{name}") for name in "ab"]
    assert states(Devices(), *instances, hosts=("a", "a")) == [OK]
    assert states(Devices(), instances[0], instances[0], hosts=("a", "a"))[0] == FAILED


def test_unequal_devices_are_found() -> None:
    cpu = {"device": "cpu", "kind": "cpu", "visible": None, "smi": None}
    assert told(Devices(), gpu("x"), cpu).startswith("failed: some processes compute on another kind of device: ")
    assert told(Devices(), gpu("x"), gpu("y", name="A100")).startswith("warning: the devices differ: ")
    newer = gpu("y")["smi"][0] | {"driver_version": "590.2"}
    assert told(Devices(), gpu("x"), gpu("y", smi=[newer])).startswith("warning: drivers differ: ")
    assert "nvidia-smi lists 1 GPUs, but torch uses the CPU" in told(Devices(), {**cpu, "smi": gpu("x")["smi"]})


def test_memory_errors_of_a_device_are_found() -> None:
    worn = gpu("y")["smi"][0] | {"ecc.errors.uncorrected.volatile.total": "7"}
    assert told(Devices(), gpu("x"), gpu("y", smi=[worn])) == (
        "warning: H100 of rank 1 on b counts 7 uncorrected memory errors"
    )


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "GPU-1, 580.1, [N/A], Enabled"\necho "GPU-2, 580.1, 3, Disabled"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    facts = Devices().collect(Asked(0, 1, "x"))
    assert [one["uuid"] for one in facts["smi"]] == ["GPU-1", "GPU-2"]
    assert facts["smi"][1]["ecc.errors.uncorrected.volatile.total"] == "3"


def memory(available: int, gpu: tuple[int, int] | None = None) -> dict[str, Any]:
    return {"available": available, "total": 64 * GB, "resident": 0, "gpu": gpu}


def test_memory_is_compared_with_the_estimate() -> None:
    assert states(Memory(), memory(60 * GB), plan=plan()) == [OK]
    assert told(Memory(), memory(GB), plan=plan()).startswith("failed: 1 processes take about 2.0 GB")
    two = [memory(3 * GB)] * 2
    assert told(Memory(), *two, hosts=("a", "a"), plan=plan()).startswith("failed: 2 processes take about 4.0 GB")
    assert told(Memory(), memory(2 * GB)).startswith("warning: a has 2.0 GB of 64.0 GB free")


def test_memory_of_a_gpu_is_compared_with_the_estimate() -> None:
    fact = memory(60 * GB, (20 * GB, 24 * GB))
    assert "4.0 GB of the GPU of rank 0 on a are in use" in told(Memory(), fact, plan=plan(needed=9 * GB))
    assert "failed: the run takes about 21.0 GB" in told(Memory(), fact, plan=plan(needed=21 * GB))


def disk(free: int, name: str = "runs") -> dict[str, Any]:
    return {"runs": {"folder": "/runs", "free": 900 * GB}, "cache": {"folder": "/c", "free": 900 * GB}} | {
        name: {"folder": f"/{name}", "free": free}
    }


def test_disk_space_is_compared_with_the_checkpoints(tmp_path: Path) -> None:
    run = config(tmp_path, "train.keep_checkpoints=3", "train.validate_every=2")
    # Three that are kept, the best, one that is being written, and the adapter.
    assert told(Disk(), disk(5 * GB), config=run, plan=plan()) == (
        "failed: /runs (runs) on a has 5.0 GB free, and 5 checkpoints and the adapter take 5.5 GB"
    )
    assert states(Disk(), disk(6 * GB), config=run, plan=plan()) == [OK]
    assert states(Disk(), disk(5 * GB)) == [OK]
    assert told(Disk(), disk(900 * GB), disk(10**6, "cache")).startswith("failed: /cache (cache) on b has 1.0 MB free")


def test_a_folder_that_is_not_shared_is_found() -> None:
    facts = [{"folder": "/a/runs", "missing": [1]}, {"folder": "/b/runs", "missing": [0]}]
    assert told(SharedFolder(), *facts) == (
        "failed: what rank 1 on b wrote is not in /a/runs of rank 0 on a | "
        "failed: what rank 0 on a wrote is not in /b/runs of rank 1 on b"
    )
    assert states(SharedFolder(), {**facts[0], "missing": []}, {**facts[1], "missing": []}) == [OK]


def cache(**changes: Any) -> dict[str, Any]:
    hub = {"endpoint": "https://hub", "offline": False, "answer": "answers"}
    return {"folder": "/c", "exists": True, "writable": True, "models": ["m"], "hub": hub, **changes}


def test_an_empty_or_closed_cache_is_found() -> None:
    assert states(Cache(), cache()) == [OK]
    assert told(Cache(), cache(), cache(writable=False)) == "failed: /c cannot be written on b"
    silent = {"endpoint": "https://hub", "offline": False, "answer": "does not answer: refused"}
    assert told(Cache(), cache(models=[], hub=silent)) == (
        "warning: nothing is prepared in /c on a, and https://hub does not answer: refused"
    )
    assert states(Cache(), cache(hub=silent)) == [OK]  # a run downloads nothing


def test_what_is_not_prepared_is_found_where_it_lacks(tmp_path: Path) -> None:
    whole = attempt(Prepared(), "collect", Asked(0, 1, "x", config=config(tmp_path)))
    (tmp_path / "data.jsonl").unlink()
    shutil.rmtree(tmp_path / "model")
    lacking = attempt(Prepared(), "collect", Asked(0, 1, "x", config=config_only(tmp_path)))
    found = told(Prepared(), whole, lacking, config=config_only(tmp_path))
    assert "failed: model " in found
    assert "failed: data " in found
    assert "rank 1 on b" in found
    assert "rank 0" not in found.replace("ranks 0-1 on a, b", "")  # evaluation data is prepared nowhere


def config_only(folder: Path) -> RunConfig:
    return read_config(folder / "run.yaml")


def test_data_that_differs_between_hosts_is_found(tmp_path: Path) -> None:
    facts = [{"data mixture": {"digest": digest}} for digest in ("abc", "abd")]
    assert told(Prepared(), *facts, config=config(tmp_path)) == (
        "failed: data mixture differs between hosts: abc (rank 0 on a); abd (rank 1 on b)"
    )


def test_without_a_configuration_nothing_need_be_prepared() -> None:
    assert states(Prepared(), None) == [SKIPPED]
    assert states(Settings(), None) == [SKIPPED]


def test_what_training_refuses_is_found_in_its_words(tmp_path: Path) -> None:
    run = config(tmp_path, "train.batch_size=3")
    (finding,) = (f for f in Settings().findings(collected(Settings(), run, ranks=2)) if f.state == FAILED)
    assert "train.batch_size is 3 rows a step, which 2 processes cannot share evenly" in finding.found
    assert finding.advice == "Try 2, 4"


def test_configurations_that_differ_are_found(tmp_path: Path) -> None:
    facts = [{"refused": None, "digest": digest} for digest in "ab"]
    assert told(Settings(), *facts).startswith("failed: hosts read different configurations: a (rank 0 on a)")
    assert told(Settings(), {"refused": "there is no file x. Make one"}) == "failed: there is no file x (rank 0 on a)"


def collected(check: Check, run: RunConfig | None, ranks: int = 1) -> Seen:
    """Return what rank 0 knows of this machine, collected by this process."""
    fact = attempt(check, "collect", Asked(0, ranks, "x", config=run, config_file="run.yaml" if run else None))
    return Seen(["a"], [{check.name: fact}], config=run)


def test_a_compiler_matters_if_a_setting_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    plain, compiled = config(tmp_path), config(tmp_path, "train.compile=true")
    assert [f.state for f in Compilers().findings(collected(Compilers(), None))] == [OK]
    assert [f.state for f in Compilers().findings(collected(Compilers(), plain))] == [OK]
    found = Compilers().findings(collected(Compilers(), compiled))
    assert found[0].state == FAILED
    assert found[0].found == "train.compile needs a C++ compiler (rank 0 on a)"


def test_a_clock_that_is_off_is_found() -> None:
    assert states(Clocks(), 0.0, 0.1) == [OK]
    assert told(Clocks(), 0.0, 5.0) == "warning: the clock of b is 5.0 s ahead of that of a"
    assert told(Clocks(), 0.0, -60.0) == "failed: the clock of b is 60.0 s behind that of a"


def network(*addresses: str, **settings: str) -> dict[str, Any]:
    about = {"name": "node", "addresses": list(addresses), "interfaces": ["lo", "eth0"], "port": 20_000}
    return {**about, "settings": settings}


def test_a_name_or_interface_that_leads_nowhere_is_found() -> None:
    assert states(Network(), network("10.0.0.1"), network("10.0.0.2")) == [OK]
    assert told(Network(), network("127.0.1.1"), network("10.0.0.2")) == (
        "warning: the name node leads to 127.0.1.1 on a itself"
    )
    assert states(Network(), network("127.0.1.1")) == [OK]  # one host needs no other
    wrong = [network("10.0.0.1", NCCL_SOCKET_IFNAME="ib0")] * 2
    assert told(Network(), *wrong) == " | ".join(
        f"failed: NCCL_SOCKET_IFNAME=ib0, but {host} has lo, eth0" for host in "ab"
    )
    mixed = [network("10.0.0.1", NCCL_DEBUG="INFO"), network("10.0.0.2", GLOO_SOCKET_IFNAME="eth0")]
    assert told(Network(), *mixed) == (
        "warning: NCCL's variables differ: {'NCCL_DEBUG': 'INFO'} (rank 0 on a); {} (rank 1 on b)"
    )
    assert states(Network(), network("10.0.0.1"), mixed[1]) == [OK]
    for value in ("eth", "=eth0", "ib0,eth0", "^lo,docker"):
        assert states(Network(), *[network("10.0.0.1", NCCL_SOCKET_IFNAME=value)] * 2) == [OK], value


def test_a_slow_network_is_found() -> None:
    fast, slow = ({"gloo": [[2**20, 0.001], [2**24, seconds]]} for seconds in (0.01, 10.0))
    assert states(AllReduce(), fast, fast) == [OK]
    assert told(AllReduce(), fast, slow).startswith("warning: gloo moves 0.002 GB/s")  # the slowest rank counts
    assert states(AllReduce(), slow) == [OK]


def threads(cores: int, count: int, quota: float | None = None) -> dict[str, Any]:
    return {"cores": list(range(cores)), "threads": count, "quota": quota}


def test_threads_that_take_turns_or_idle_are_found() -> None:
    both = {"hosts": ("a", "a")}
    assert states(Threads(), threads(8, 4), threads(8, 4), **both) == [OK]
    assert "they take turns" in told(Threads(), threads(8, 8), threads(8, 8), **both)
    assert "they take turns" in told(Threads(), threads(64, 64, quota=4.0))
    assert "most cores are idle" in told(Threads(), threads(8, 1), threads(8, 1), **both)
    assert "2 processes share 1 cores" in told(Threads(), threads(1, 1), threads(1, 1), **both)


def test_limits_that_end_a_run_are_found() -> None:
    def limits(**changes: Any) -> dict[str, Any]:
        usual = {"files": 4096, "locked": None, "file_size": None, "shared": GB, "infiniband": False, "kind": "cuda"}
        return {**usual, **changes}

    pair = {"hosts": ("a", "a")}
    assert states(Limits(), limits(), limits(), **pair) == [OK]
    assert told(Limits(), limits(files=256)) == "warning: a allows 256 open files a process"
    assert "of shared memory (/dev/shm) for 2 GPUs" in told(Limits(), *[limits(shared=64 * 2**20)] * 2, **pair)
    assert "InfiniBand" in told(Limits(), *[limits(infiniband=True, locked=65536)] * 2)
    assert told(Limits(), limits(file_size=GB), plan=plan(checkpoint=2 * GB)).startswith(
        "failed: a allows files of 1.0 GB"
    )


def test_ranks_that_do_not_come_or_report_are_named() -> None:
    fact = {"start": {"folder": "/x", "python": "/p", "pid": 1}}
    absent = Seen(["a", None, None], [fact, None, None], address="a:29500")
    assert Start().findings(absent)[0].found == "ranks 1-2 of 3 did not come to a:29500"
    mute = Seen(["a", "b"], [fact, None], address="a:29500")
    assert Start().findings(mute)[0].found == "rank 1 on b came, but did not report in time"
    other = {"start": {"folder": "/y", "python": "/p", "pid": 1}}
    assert "the folder differs: /x (rank 0 on a); /y (rank 1 on b)" in told(Start(), fact["start"], other["start"])


@dataclass
class _Broken(Check):
    """A check that raises, in one half or the other."""

    name = "broken"
    asks = "nothing"
    collects: bool

    def collect(self, asked: Asked) -> Any:
        return {} if self.collects else os.environ["NO_SUCH_KEY"]

    def judge(self, seen: Seen, facts: Facts) -> Iterator[Finding]:
        raise ZeroDivisionError("by design")


@pytest.mark.parametrize("collects", [True, False])
def test_a_check_that_raises_is_a_failed_line(collects: bool) -> None:
    check = _Broken(collects)
    fact = attempt(check, "collect", Asked(0, 1, "x"))
    (finding,) = check.findings(Seen(["a"], [{"broken": fact}]))
    assert finding.state == FAILED
    assert finding.found == ("ZeroDivisionError: by design" if collects else "KeyError: 'NO_SUCH_KEY' (rank 0 on a)")


def test_warnings_do_not_fail_and_failures_do() -> None:
    warns = Report.of(seen(Clocks(), 0.0, 5.0))
    assert [line.state for line in warns.lines if line.name == "clocks"] == [WARNING]
    assert warns.status == 0
    assert Report.of(seen(Clocks(), 0.0, 50.0)).status == 2


def test_every_check_is_listed_once_and_described() -> None:
    known = {cls for cls in Check.__subclasses__() if cls.__module__.startswith("subspace.")}
    assert {type(check) for check in CHECKS} == known
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    page = (REPOSITORY / "launch" / "README.md").read_text()
    assert [check.name for check in CHECKS if f"`{check.name}`" not in page] == []


def test_ranks_are_listed_as_spans() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
