"""Launches on several hosts, which pdsh reaches by ssh.

DeepSpeed's launcher starts them, with what it does badly replaced:

- It gives words to the hosts' shells without quotes: a regular expression among the arguments is a syntax error or a
  command, and a folder's name with a blank is two. Here every word arrives as it was given.
- To end its processes it ends every process of any run on those hosts whose command line looks alike. Here the
  processes of a launch carry a mark in their environment (:data:`MARK`), and those with another one are left alone.
- It reads ``.deepspeed_env`` with a traceback for an empty line.
- It starts a run on the only host of a hostfile on this machine, whatever the host's name.
- It waits for ever for the other hosts when one has failed.
- What it and pdsh print beside a run's own output makes ``--json`` no JSON.

``python -m subspace.distributed.hosts launch ...`` is that launcher; ``... node ...`` is what it runs on each host, and
``... signal MARK NUMBER`` what it sends signals with.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from subspace.common.foreign.text import read_text
from subspace.errors import RunStopped, UserError, shown, tell

MODULE = "subspace.distributed.hosts"
#: In the environment of a launch's processes: which launch and which of its hosts it is.
MARK = "SUBSPACE_LAUNCH"
#: The same in the environment of the launcher, which is not one of them and may be on the same machine as some.
MARK_TO_GIVE = "SUBSPACE_LAUNCHES"
#: In a word for a host: the host's number. No word can have that character of its own.
NUMBER = "\0"
#: For ssh: a host that is gone is noticed after 30 seconds.
SSH_OPTIONS = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3"
#: Seconds that the other hosts have to end by themselves when the processes of one have failed, or it cannot be
#: reached.
FAILED_GRACE_S, UNREACHABLE_GRACE_S = 30.0, 5.0
#: A host's name, perhaps after a user's. Others would be options of ssh, or a list or a command to pdsh.
HOST = re.compile(r"([A-Za-z_][\w.-]*@)?[A-Za-z0-9_][\w.-]*", re.ASCII)
#: Processes of one host, and bytes of a hostfile: more than any cluster has.
MOST_SLOTS, MOST_HOSTFILE_BYTES = 1024, 1 << 20
#: The interface by which a machine reaches itself and no other does.
LOOPBACK = "lo"
#: ssh's exit status if it cannot connect, or the connection breaks.
SSH_FAILED = 255


# --- what the user has written ---


def read_hostfile(path: str) -> dict[str, int]:
    """Return the number of processes for each host of a hostfile; raise UserError for a file that is not one."""
    try:
        lines = read_text(Path(path), most=MOST_HOSTFILE_BYTES).splitlines()
    except UserError as error:
        raise UserError(f"hostfile: {error}. launch/hostfile.example shows one") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        where = f"hostfile '{path}', line {number}"
        found = re.fullmatch(r"(\S+)\s+slots=([0-9]{1,9})(\s+max_slots=[0-9]+)?\s*(#.*)?", line)
        if not found:
            raise UserError(f"{where} is {shown(line)}, but should be 'HOST slots=NUMBER'")
        host, slots = found[1], int(found[2])
        if len(host) > 255 or not HOST.fullmatch(host):
            raise UserError(f"{where} names the host {shown(host)}, which no host is called, nor USER@HOST")
        if not 1 <= slots <= MOST_SLOTS:
            raise UserError(f"{where} gives host '{host}' {slots:,} slots. From 1 to {MOST_SLOTS:,} are possible")
        if host in hosts:
            raise UserError(f"{where} names host '{host}' a second time")
        hosts[host] = slots
    if not hosts:
        raise UserError(f"hostfile '{path}' names no host. Its lines are 'HOST slots=NUMBER'")
    return hosts


def read_environment_files() -> dict[str, str]:
    """Return the variables for all hosts from ``.deepspeed_env`` in the home folder and in this one.

    Of two lines for a name the one in this folder counts. Empty lines and comments are passed over, and quotes around a
    value; the rest of it is taken as it is.

    Raises:
        UserError: another line.
    """
    found: dict[str, str] = {}
    for folder in (Path.home(), Path()):
        file = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        lines = read_text(file, most=MOST_HOSTFILE_BYTES).splitlines() if file.is_file() else []
        for number, line in enumerate(map(str.strip, lines), 1):
            name, is_setting, value = (part.strip() for part in line.partition("="))
            if not line or line.startswith("#"):
                continue
            if not is_setting or not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise UserError(f"'{file}', line {number} is {shown(line)}, but should be NAME=VALUE")
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            found[name] = value[1:-1] if quoted else value
    return found


# --- what pdsh is given ---


def shell_line(words: Sequence[str], exports: Mapping[str, str], folder: str) -> str:
    """Return the line for pdsh that makes a host's shell run exactly these words in a folder, with these variables."""
    settings = [f"export {name}={_quote(value)};" for name, value in exports.items()]
    return " ".join([*settings, f"cd {_quote(folder)};", *map(_quote, words)])


def launch_line(words: Sequence[str], exports: Mapping[str, str], folder: str, mark: str) -> str:
    """Return the line for pdsh that starts a launch's processes on a host, and ends what is left of them afterwards.

    The connection would stay open as long as one of them runs, such as what a rank has started that was killed.
    """
    line = shell_line(words, {**exports, MARK: f"{mark}-{NUMBER}"}, folder)
    end = " ".join(map(_quote, _signal_words(mark, signal.SIGKILL)))
    return f"{line}; status=$?; {end}; exit $status"


def pdsh(hosts: Sequence[str]) -> list[str]:
    """Return pdsh's own words, for all hosts at once and with their highest exit status."""
    return ["pdsh", "-S", "-f", str(len(hosts)), "-w", ",".join(hosts)]


def pdsh_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for pdsh itself."""
    options = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()
    return {**environment, "PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": options}


def _quote(word: str) -> str:
    # pdsh replaces %h, %u and %n in whatever it passes on.
    return shlex.quote(word).replace("%", "%%").replace(NUMBER, "%n")


# --- the network between hosts ---


def meet_on_loopback() -> bool:
    """Return True if the processes of the run meet at an address that this machine alone reaches."""
    address = os.environ.get("MASTER_ADDR", "")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost"


def local_size_variable() -> str:
    """Return the variable in which this process's launcher says how many processes it has on this machine.

    torchrun may be started where the one of another launcher is still set.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ or not os.environ.get("LOCAL_SIZE")
    return "LOCAL_WORLD_SIZE" if by_torchrun else "LOCAL_SIZE"


def gloo_interface() -> str | None:
    """Return the network interface for gloo; None to leave the choice to gloo.

    On one machine it is the loopback interface, on which no other machine can connect to the processes. On several,
    gloo takes the address of the machine's own name, which on Debian and Ubuntu is one that only the machine itself
    reaches. NCCL looks at the interfaces.
    """
    import psutil

    if "GLOO_SOCKET_IFNAME" in os.environ:
        return None
    here = int(os.environ.get(local_size_variable()) or 1)
    if here >= int(os.environ.get("WORLD_SIZE") or 1):
        up = (loopback := psutil.net_if_stats().get(LOOPBACK)) is not None and loopback.isup
        return LOOPBACK if up and meet_on_loopback() else None
    interfaces = psutil.net_if_addrs()
    if (nccl := os.environ.get("NCCL_SOCKET_IFNAME", "")) in interfaces:
        return nccl
    for target in (os.environ.get("MASTER_ADDR", ""), "192.0.2.1"):  # nobody's address, behind the default route
        own = _own_address(target)
        for name, addresses in interfaces.items():
            if own and not own.startswith("127.") and own in (address.address for address in addresses):
                return str(name)
    return None


def _own_address(target: str) -> str | None:
    """Return the address from which this machine would send to another one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent, contextlib.suppress(OSError):
        unsent.connect((target, 9))
        return str(unsent.getsockname()[0])
    return None


# --- the processes of a launch ---


def signal_command(hosts: Sequence[str], mark: str, number: int, exports: Mapping[str, str]) -> list[str]:
    """Return the command that sends a signal to a launch's processes on all its hosts; see :func:`signal_processes`."""
    return [*pdsh(hosts), shell_line(_signal_words(mark, number), exports, str(Path.cwd()))]


def _signal_words(mark: str, number: int) -> list[str]:
    return [sys.executable, "-m", MODULE, "signal", f"{mark}-{NUMBER}", str(int(number))]


def signal_processes(mark: str, number: int) -> int:
    """Send a signal to a launch's processes with this mark and return how many there were.

    SIGKILL goes to the ranks and what they have started, and SIGTERM to their launcher, which ends by that without a
    word of the shell that waits for it. Any other signal goes to the ranks alone.
    """
    import psutil

    family = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            if environment.get(MARK) == mark and process.pid != os.getpid():
                family[process.pid] = (process.ppid(), "RANK" in environment)
    inside = [pid for pid, (_, has_rank) in family.items() if has_rank]
    ranks = [pid for pid in inside if family[pid][0] not in inside]
    for pid in inside if number == signal.SIGKILL else ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    for pid in set(family).difference(inside) if number == signal.SIGKILL else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    return len(inside)


class HostWatch:
    """What a launcher's standard error says of its hosts; everything else is passed on.

    Lines of the standard output lose the host's name that pdsh puts before them: the first rank alone writes there, and
    a program may read it.

    Attributes:
        host: the first host whose processes failed; None until then.
        status: the exit status there.
        stopped: whether any host's processes ended as those of a run that was stopped and has saved.
        told: whether a process of the run has told the user of a failure.
    """

    def __init__(self, errors: IO[bytes], output: IO[bytes], hosts: Sequence[str]) -> None:
        self.host: str | None = None
        self.status = 0
        self.stopped = self.told = False
        self._since = 0.0
        label = re.compile("|".join(f"^{re.escape(host)}: ?" for host in hosts).encode())
        self._threads = [
            threading.Thread(target=self._read, args=(errors,), name="hosts", daemon=True),
            threading.Thread(target=_pass_on, args=(output, label), name="output", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def overdue(self) -> bool:
        """Return True if the other hosts should have noticed by now that one has failed."""
        grace = UNREACHABLE_GRACE_S if self.status == SSH_FAILED else FAILED_GRACE_S
        return self.host is not None and time.monotonic() - self._since > grace

    def finish(self) -> None:
        """Wait for the last lines."""
        for thread in self._threads:
            thread.join(timeout=5)

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            if found := re.match(rb"pdsh@[^:]*: (\S+): ssh exited with exit code (\d+)", line):
                self.stopped = self.stopped or int(found[2]) == RunStopped.status
                if self.host is None:
                    self._since, self.status, self.host = time.monotonic(), int(found[2]), found[1].decode()
            else:
                self.told = self.told or re.search(rb"\b(error|stopped): |^Traceback ", line) is not None
                sys.stderr.buffer.write(line)
                sys.stderr.flush()


def _pass_on(stream: IO[bytes], label: re.Pattern[bytes]) -> None:
    for line in stream:
        sys.stdout.buffer.write(label.sub(b"", line, count=1))
        sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    """Launch as DeepSpeed's launcher does with the same arguments, start this host's part, or send a signal here."""
    command, *rest = arguments
    if command == "signal":
        signal_processes(rest[0], int(rest[1]))
        return 0
    from subspace.distributed.deepspeed_compat import run_node_launcher, run_pdsh_launcher, silence_deepspeed

    silence_deepspeed()  # which says on standard output that this machine has no GPU
    if command == "node":
        run_node_launcher(rest)
        return 0
    exports = read_environment_files()
    mark = os.environ.get(MARK_TO_GIVE) or secrets.token_hex(8)
    os.environ["DS_ENV_FILE"] = os.devnull  # no file: DeepSpeed reads nothing

    def started(
        given: Sequence[str], passed_on: Mapping[str, str], hosts: Sequence[str], environment: Mapping[str, str]
    ) -> tuple[list[str], dict[str, str]]:
        words = [sys.executable, "-u", "-m", MODULE, "node", f"--node_rank={NUMBER}", *given]
        line = launch_line(words, {**passed_on, **exports}, str(Path.cwd()), mark)
        return [*pdsh(hosts), line], pdsh_environment(environment)

    try:
        run_pdsh_launcher(rest, started)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        unreachable = re.search(r"host=(\S+) was not reachable", str(error))
        reason = f"`ssh {unreachable[1]} hostname` fails without a password" if unreachable else str(error)
        tell(f"error: the hosts of {rest[rest.index('--hostfile') + 1]}: {reason}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
