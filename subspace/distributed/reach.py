"""What can be known of hosts before anything starts there: that ssh reaches them and finds this folder."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from subspace.errors import UserError

#: Seconds that a host may take to answer, connection included.
SECONDS = 15
CONNECT_SECONDS = 5
#: What the shell there prints if the run could start.
GOOD = "subspace-finds-all"


@dataclass(frozen=True)
class Trouble:
    """What keeps a run from starting on a host, and what to do about it."""

    found: str
    advice: str


def find_troubles(hosts: Iterable[str]) -> list[Trouble]:
    """Return what keeps a run from starting on these hosts through ssh; nothing if all is well. Asks all at once."""
    missing = [name for name in ("pdsh", "ssh") if shutil.which(name) is None]
    if missing:
        advice = f"apt-get install {' '.join(missing)}; or use launch/slurm.sh, which needs no ssh"
        return [Trouble(f"{' and '.join(missing)}, which reach the hosts, are not installed", advice)]
    with ThreadPoolExecutor(max_workers=32) as pool:
        return [trouble for found in pool.map(_ask, hosts) for trouble in found]


def ensure_reachable(hosts: Sequence[str]) -> None:
    """Raise UserError that names every host on which a run cannot start.

    DeepSpeed's launcher looks at the first host only, and the ranks of the others would wait for those that never come.
    """
    if troubles := find_troubles(hosts):
        advice = dict.fromkeys(trouble.advice for trouble in troubles)
        raise UserError(
            f"cannot start on {', '.join(hosts)}: {'; '.join(trouble.found for trouble in troubles)}. "
            f"What to do: {'; '.join(advice)}"
        )


def _ask(host: str) -> Sequence[Trouble]:
    return list(_troubles(host))


def _troubles(host: str) -> Iterator[Trouble]:
    """Yield what is wrong with one host."""
    folder, python = str(Path.cwd()), sys.executable
    look = f"cd {shlex.quote(folder)} || exit 0; test -x {shlex.quote(python)} || exit 0; echo {GOOD}"
    extra = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    try:
        done = subprocess.run(
            ["ssh", *options, *extra, "--", host, look],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        yield Trouble(f"{host} does not answer to ssh within {SECONDS} s", f"try `ssh {host} true`")
        return
    said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
    if done.returncode:
        yield Trouble(
            f"ssh cannot reach {host}: {said}",
            f"`ssh {host} true` must work without a question: ssh-copy-id {host}, and its key in known_hosts",
        )
    elif GOOD not in done.stdout:
        yield Trouble(
            f"{host} has no folder {folder}, or no {python} ({said})",
            "the folder and its environment must be at the same path on every host: share or copy them",
        )
