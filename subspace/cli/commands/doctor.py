"""``subspace doctor``: check every machine of a run before it starts."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING

from subspace.cli.command import Command, count, json_argument, launch_arguments, launch_or_none, say
from subspace.distributed import launcher
from subspace.distributed.hosts import read_hostfile
from subspace.distributed.reach import find_troubles
from subspace.distributed.signals import write_status
from subspace.errors import UserError

if TYPE_CHECKING:
    from subspace.doctor.base import Finding
    from subspace.doctor.report import Report

WAIT_S = 30


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="the run's YAML file: also check what it needs")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings instead of the file's")
    parser.add_argument(
        "--wait",
        type=count,
        default=WAIT_S,
        metavar="SECONDS",
        help=f"how long to wait for a process that does not come or answer; default: {WAIT_S}",
    )
    launch_arguments(parser)
    json_argument(parser)


def _run(options: argparse.Namespace) -> int:
    try:
        return _examine(options)
    except (ImportError, OSError) as error:  # of a library that all checks stand on
        raise UserError(
            f"the Python of {socket.gethostname()}, {sys.executable}, cannot import what every command needs: {error}. "
            "Install requirements.txt anew"
        ) from error


def _examine(options: argparse.Namespace) -> int:
    given = [options.config, *options.settings] if options.config else []
    if not launcher.under_launcher():
        if options.config:
            from subspace.config import read_config

            read_config(options.config, options.settings)
        status = _launched(options, given)
        if status is not None:
            return status
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each failed attempt to connect is a warning
    launcher.init_rank_env()
    from subspace.doctor.examine import examine

    status = examine(options.config, options.settings, lambda report: _show(report, options), wait=options.wait)
    if launcher.launched_rank() == 0:
        write_status(status)
    return status


def _launched(options: argparse.Namespace, given: list[str]) -> int | None:
    """Return the status of an examination in other processes; None if this one makes it.

    Whatever keeps them from reporting is reported here.
    """
    from subspace.doctor.base import failed

    if options.hostfile and not options.dry_run and (troubles := find_troubles(read_hostfile(options.hostfile))):
        return _show_troubles([failed(trouble.found, trouble.advice) for trouble in troubles], options)
    # Ranks give up by themselves after a few times `wait`; that much later, something hangs before they are Python.
    patience = 60 + 8 * options.wait
    late = threading.Event()

    def give_up() -> None:
        late.set()
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(patience, give_up)
    timer.daemon = True
    timer.start()
    try:
        status = launch_or_none(options, ["doctor", *given, "--wait", str(options.wait)])
    finally:
        timer.cancel()
    if status in (None, 0, 2, 128 + signal.SIGINT):
        return status
    found = f"no report within {patience} s" if late.is_set() else f"the processes ended with status {status}"
    advice = "what they said stands above; `subspace doctor` on each machine by itself says more"
    return _show_troubles([failed(found, advice)], options)


def _show_troubles(troubles: list[Finding], options: argparse.Namespace) -> int:
    """Show the report of a launch that did not come about, and return its status."""
    launcher.init_rank_env()  # what the checks import asks for a device, too
    from subspace.doctor.base import Seen
    from subspace.doctor.report import Report

    report = Report.of(Seen((), (), troubles=troubles))
    _show(report, options)
    return report.status


def _show(report: Report, options: argparse.Namespace) -> None:
    from subspace.common.tables import print_grid

    if options.json:
        say(json.dumps(report.as_dict(), indent=2))
    else:
        print_grid(report.grid, wrapped=True)


def _manual() -> str:
    from subspace.doctor.checks import CHECKS

    return "\n".join(["checks:", *(f"  {check.name:<11} {check.asks}" for check in CHECKS)])


COMMAND = Command(
    "doctor",
    "check every machine of a run before it starts: versions, devices, disks, network, clocks",
    """examples:
  subspace doctor                                          this machine, one process for each GPU
  subspace doctor launch/recipes/quickstart.yaml           and what that run needs: model, data, memory, disk
  subspace doctor launch/recipes/quickstart.yaml train.compile=true --processes 2
  bash launch/cluster.sh hostfile doctor launch/recipes/commonsense-smollm2.yaml
  sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 launch/slurm.sh doctor

The status is 0, or 2 if a check failed; warnings do not fail.""",
    _arguments,
    _run,
    _manual,
)
