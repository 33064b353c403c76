"""What can be known of a hostfile's hosts before anything starts there: that ssh reaches them and finds this folder."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from subspace.distributed.hosts import read_hostfile
from subspace.doctor.base import Finding, failed

#: Seconds that a host may take to answer, connection included.
SECONDS = 15
CONNECT_SECONDS = 5
#: What the shell there prints if the run could start.
GOOD = "subspace-doctor-finds-all"


def unreachable(hostfile: str) -> list[Finding]:
    """Return what keeps the processes of a launch over ssh from starting; nothing if all is well.

    Raises:
        UserError: the hostfile cannot be read.
    """
    hosts = read_hostfile(hostfile)
    missing = [name for name in ("pdsh", "ssh") if shutil.which(name) is None]
    if missing:
        advice = f"apt-get install {' '.join(missing)}; or use launch/slurm.sh, which needs no ssh"
        return [failed(f"{' and '.join(missing)}, which reach the hosts of {hostfile}, are not installed", advice)]
    with ThreadPoolExecutor(max_workers=32) as pool:
        return [finding for found in pool.map(_ask, hosts) for finding in found]


def _ask(host: str) -> Sequence[Finding]:
    return list(_findings(host))


def _findings(host: str) -> Iterator[Finding]:
    """Yield what is wrong with one host."""
    folder, python = str(Path.cwd()), sys.executable
    look = f"cd {shlex.quote(folder)} || exit 0; test -x {shlex.quote(python)} || exit 0; echo {GOOD}"
    extra = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    try:
        done = subprocess.run(
            ["ssh", *options, *extra, host, look],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        yield failed(f"{host} does not answer to ssh within {SECONDS} s", f"try `ssh {host} true`")
        return
    said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
    if done.returncode:
        yield failed(
            f"ssh cannot reach {host}: {said}",
            f"`ssh {host} true` must work without a question: ssh-copy-id {host}, and its key in known_hosts",
        )
    elif GOOD not in done.stdout:
        yield failed(
            f"{host} has no folder {folder}, or no {python} ({said})",
            "the folder and its environment must be at the same path on every host: share or copy them",
        )
