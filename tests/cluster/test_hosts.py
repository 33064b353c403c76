"""The hosts themselves: each is what it says, they see each other, and nothing of them is seen outside or stays."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import Hosts

pytestmark = pytest.mark.cluster

BOOTS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background
from pathlib import Path
from tests.cluster.hosts import Hosts
with Hosts(Path(sys.argv[1]), []) as hosts:
    hosts[0].start("sleep", "600")
    while len(hosts[0].processes()) < 3:
        time.sleep(0.05)
    print(*(process.pid for host in hosts for process in host.processes()), flush=True)
    time.sleep(600)
"""


def outside() -> tuple[str, str, str]:
    """Return what this machine has: interfaces, mounts and its name."""
    interfaces = subprocess.run(["ip", "-brief", "address"], capture_output=True, text=True, check=True).stdout
    return interfaces, Path("/proc/self/mounts").read_text(), Path("/proc/sys/kernel/hostname").read_text()


@pytest.fixture
def before() -> tuple[str, str, str]:
    return outside()


def test_a_host_has_its_own_name_address_and_processes(hosts: Hosts) -> None:
    for host in hosts:
        assert host.check("hostname").strip() == host.name
        assert host.check("hostname", "-I").strip() == host.address
        assert host.check("bash", "-c", "echo $$ > /tmp/own; cat /tmp/own").strip().isdigit()
        assert len(host.processes()) == 2  # its first, and sshd
    assert not Path("/tmp/own").exists()


def test_the_hosts_reach_each_other_by_ssh(hosts: Hosts) -> None:
    for here, there in ((hosts[0], hosts[1]), (hosts[1], hosts[0])):
        assert here.check("ssh", there.name, "hostname").strip() == there.name
        assert here.check("pdsh", "-R", "ssh", "-w", "node1,node2", "hostname").count(": node") == 2


def test_a_host_that_was_killed_and_booted_is_a_new_one(hosts: Hosts) -> None:
    program = hosts[1].start("sleep", "600")
    hosts[1].kill()
    assert program.wait(10) != 0
    assert not Path(f"/proc/{hosts[1].first}").exists()
    hosts.boot(hosts[1])
    assert hosts[0].check("ssh", "node2", "hostname").strip() == "node2"


def test_a_host_without_a_plug_is_silent(hosts: Hosts) -> None:
    reach = ("ssh", "-o", "ConnectTimeout=2", "node2", "true")
    hosts.unplug(hosts[1])
    assert hosts[0].run(*reach).poll() == 255
    hosts.plug(hosts[1])
    assert hosts[0].run(*reach).poll() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.usefixtures("hosts")  # which skips where there can be none
def test_nothing_of_the_hosts_outlives_the_tests(
    before: tuple[str, str, str], tmp_path: Path, number: signal.Signals
) -> None:
    """However the process ends that made them."""
    command = [sys.executable, "-c", BOOTS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as tests:
        try:
            assert tests.stdout
            there = [psutil.Process(int(pid)) for pid in tests.stdout.readline().split()]
            assert len(there) == 5
            assert outside() == before  # nothing of them is seen even while they are there
            tests.send_signal(number)
            tests.wait(30)
        finally:
            tests.kill()
    _, alive = psutil.wait_procs(there, timeout=10)
    assert alive == []
    assert outside() == before
