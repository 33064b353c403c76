"""Two hosts on one machine, which see each other through a switch and are reached by ssh.

A host is a process with namespaces of its own: a network, a name, processes, and mounts that show it its own /tmp and
/run, the hosts file and the settings of ssh. It ends with this process, whatever ends that, and takes along all that
runs on it: nothing has to be undone, and the machine's own network, files and folders are never touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

PROGRAMS = ("ip", "nsenter", "pdsh", "setpriv", "ssh", "ssh-keygen", "sshd", "unshare")
NETWORK = "10.77.0"
ROOT = Path("/")
#: A process that lasts until it is killed and buries its orphans, as a host's first process does.
LASTING = ("env", "--ignore-signal=CHLD", "sleep", "infinity")
#: It and its child, which is the first process in the new namespaces, end together with the process that starts them.
NEW = ("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--fork", "--kill-child")
OWN = ("--uts", "--ipc", "--pid", "--mount", "--mount-proc")

SSH = """Host *
    IdentityFile {state}/key
    IdentitiesOnly yes
    UserKnownHostsFile {state}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking accept-new
    LogLevel ERROR
"""
SSHD = """HostKey {state}/key
AuthorizedKeysFile {state}/key.pub
PidFile /run/sshd.pid
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
"""
#: Run on a new host: NAME ADDRESS STATE TEMPORARY SHARED ... The last are the folders that all hosts see.
SET_UP = r"""
set -euo pipefail
name=$1 address=$2 state=$3 temporary=$4
shift 4
hostname "$name"
ip link set lo up
ip address add "$address/24" dev eth0
ip link set eth0 up
mount --bind "$state/hosts" /etc/hosts
mount --bind "$state/ssh_config" /etc/ssh/ssh_config
[ ! -d ~root/.ssh ] || mount -t tmpfs none ~root/.ssh
mount -t tmpfs -o mode=755 none /run
mkdir /run/sshd /run/temporary
mount --rbind "$temporary" /run/temporary
mount -t tmpfs -o mode=1777 none "$temporary"
for folder in "$@"; do
    mkdir -p "$folder"
    mount --rbind "/run/temporary/${folder#"$temporary"}" "$folder"
done
umount --lazy /run/temporary
rmdir /run/temporary
"""


def reason_to_skip(programs: Sequence[str] = PROGRAMS) -> str | None:
    """Return why this machine cannot be made into several hosts; None if it can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if lacking := [name for name in programs if shutil.which(name) is None]:
        return f"needs {', '.join(lacking)}, which `bash tests/cluster/run.sh` installs on Debian"
    # One of the kernel's parts may be missing, or a container may not be allowed to use them.
    attempt = [*NEW, *OWN, "ip", "link", "add", "name", "lan", "type", "bridge"]
    said = subprocess.run(attempt, capture_output=True, text=True, check=False)
    return f"cannot make a network of its own: {said.stderr.strip()}" if said.returncode else None


class Program:
    """A program that runs on a host, with its output in files."""

    def __init__(self, command: Sequence[str | Path], output: Path, environment: Mapping[str, str]) -> None:
        self._output = output
        with output.with_suffix(".out").open("w") as out, output.with_suffix(".err").open("w") as err:
            self._entered = subprocess.Popen(
                command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the program itself, which is the child of what entered the host."""
        (program,) = psutil.Process(self._entered.pid).children()
        program.send_signal(number)

    def poll(self) -> int | None:
        """Return the exit status; None if it still runs."""
        return self._entered.poll()

    def ended(self) -> str | None:
        """Return how it has ended, with what it said; None if it still runs."""
        return None if (status := self.poll()) is None else f"{status}\n{self.err}{self.out}"

    def wait(self, seconds: float) -> int:
        """Wait for the end and return the exit status."""
        return self._entered.wait(seconds)

    @property
    def out(self) -> str:
        return self._output.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        return self._output.with_suffix(".err").read_text()


class Host:
    """One host. Its hostname is ``name``, its user root."""

    def __init__(self, name: str, address: str, state: Path) -> None:
        self.name, self.address, self._state = name, address, state
        # The same after each boot, so that the others' tables stay right.
        self._hardware = f"02:00:00:00:00:{int(address.rpartition('.')[2]):02x}"
        self._started = 0

    def boot(self, switch: int, shared: Sequence[Path]) -> None:
        """Start the host, connect it to the switch, whose process is given, and start its sshd."""
        self._outer = subprocess.Popen(
            [*NEW, *OWN, *LASTING], stderr=subprocess.DEVNULL
        )  # it complains of being killed
        self.first = _wait_for_child(self._outer)
        # What is left of the last one, which the kernel takes down a little later, has the same name.
        on_switch(switch, "bash", "-c", f"ip link delete {self.name} 2> /dev/null || true")
        port = [
            "ip",
            "link",
            "add",
            "name",
            self.name,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "address",
            self._hardware,
        ]
        on_switch(switch, *port, "netns", str(self.first))
        on_switch(switch, "ip", "link", "set", self.name, "master", "lan", "up")
        temporary = tempfile.gettempdir()
        seen = [str(folder) for folder in shared if folder.is_relative_to(temporary)]
        self.check("bash", "-c", SET_UP, "set-up", self.name, self.address, str(self._state), temporary, *seen)
        self.start_sshd()

    def start_sshd(self) -> None:
        self.check(shutil.which("sshd") or "sshd", "-f", str(self._state / "sshd_config"))

    def stop_sshd(self) -> None:
        self.check("bash", "-c", 'kill "$(cat /run/sshd.pid)"')

    def kill(self) -> None:
        """End the host and everything on it at once, as a power cut does; what is sent to it is not answered."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.first, signal.SIGKILL)
        self._outer.wait()

    def start(self, *command: str | Path, folder: Path = ROOT, environment: Mapping[str, str] = {}) -> Program:
        """Start a program on the host, in a folder."""
        self._started += 1
        enter = ["nsenter", f"--target={self.first}", "--net", "--uts", "--ipc", "--pid", "--mount"]
        output = self._state / f"{self.name}-{self.first}-{self._started}"
        return Program([*enter, "env", f"--chdir={folder}", *command], output, environment)

    def run(
        self, *command: str | Path, folder: Path = ROOT, seconds: float = 300, environment: Mapping[str, str] = {}
    ) -> Program:
        """Run a program on the host to its end."""
        program = self.start(*command, folder=folder, environment=environment)
        program.wait(seconds)
        return program

    def check(self, *command: str | Path, folder: Path = ROOT) -> str:
        """Run a program that must succeed and return what it printed."""
        program = self.run(*command, folder=folder)
        assert program.poll() == 0, f"{self.name}: {command[0]} ended with {program.poll()}: {program.err}{program.out}"
        return program.out

    def processes(self) -> list[psutil.Process]:
        """Return all that runs on the host; nothing does on one that was killed."""
        found: list[psutil.Process] = []
        if not psutil.pid_exists(self.first):
            return found
        space = Path(f"/proc/{self.first}/ns/pid").readlink()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):  # it has ended meanwhile
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and Path(f"/proc/{process.pid}/ns/pid").readlink() == space:
                    found.append(process)
        return found

    def ranks(self) -> list[int]:
        """Return the ranks of the runs' processes on the host."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error, KeyError):
                found.append(int(process.environ()["RANK"]))
        return sorted(found)


class Hosts:
    """Context manager of the hosts node1, node2, ... and the switch between them.

    Args:
        state: a folder for their keys, settings and output.
        shared: folders that are the same on all hosts. What else lies in the folder for temporary files is not there.
        count: the number of hosts.
    """

    def __init__(self, state: Path, shared: Sequence[Path], count: int = 2) -> None:
        self.state = state
        self._shared = [state, *shared]
        self._all = [Host(f"node{n}", f"{NETWORK}.{n}", state) for n in range(1, count + 1)]

    def __enter__(self) -> Self:
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.state / "key")]
        subprocess.run(keygen, check=True)
        names = "".join(f"{host.address} {host.name}\n" for host in self)
        (self.state / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (self.state / "ssh_config").write_text(SSH.format(state=self.state))
        (self.state / "sshd_config").write_text(SSHD.format(state=self.state))
        self._outer = subprocess.Popen([*NEW, *LASTING], stderr=subprocess.DEVNULL)
        try:
            self._switch = _wait_for_child(self._outer)
            on_switch(self._switch, "ip", "link", "add", "name", "lan", "type", "bridge")
            on_switch(self._switch, "ip", "link", "set", "lan", "up")
            for host in self:
                self.boot(host)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self:
            if hasattr(host, "first"):
                host.kill()
        self._outer.kill()
        self._outer.wait()

    def __iter__(self) -> Iterator[Host]:
        return iter(self._all)

    def __getitem__(self, number: int) -> Host:
        return self._all[number]

    def boot(self, host: Host) -> None:
        """Start a host, also one that was killed."""
        host.boot(self._switch, self._shared)

    def unplug(self, host: Host) -> None:
        """Take a host off the network: what it sends and what is sent to it is lost, and no connection is closed."""
        on_switch(self._switch, "ip", "link", "set", host.name, "down")

    def plug(self, host: Host) -> None:
        """Put a host back on the network."""
        on_switch(self._switch, "ip", "link", "set", host.name, "up")


def on_switch(switch: int, *command: str) -> None:
    """Run a command in the switch's network."""
    subprocess.run(["nsenter", f"--target={switch}", "--net", *command], check=True)


def _wait_for_child(outer: subprocess.Popen[bytes], seconds: float = 10) -> int:
    """Return the process that lasts in the new namespaces, once they are as they should be."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and outer.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(outer.pid).children():
                if child.name() == "sleep":
                    return int(child.pid)
        time.sleep(0.02)
    raise RuntimeError(f"no namespaces after {seconds} s: {outer.args!r}")
