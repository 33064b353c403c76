"""The checks, in the order of the table."""

from __future__ import annotations

from subspace.doctor.base import Check
from subspace.doctor.checks.hardware import Devices, Limits, Memory, Threads
from subspace.doctor.checks.network import AllReduce, Clocks, Network, Start
from subspace.doctor.checks.software import Compilers, Imports, Settings, Versions
from subspace.doctor.checks.storage import Cache, Disk, Prepared, SharedFolder

CHECKS: tuple[Check, ...] = (
    Start(),
    Versions(),
    Imports(),
    Settings(),
    Prepared(),
    Devices(),
    Memory(),
    Disk(),
    SharedFolder(),
    Cache(),
    Network(),
    Clocks(),
    AllReduce(),
    Threads(),
    Compilers(),
    Limits(),
)
