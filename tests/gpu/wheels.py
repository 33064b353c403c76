"""Which packages must be carried to a machine with a GPU and no network: one requirement a line, for carry.sh.

    python tests/gpu/wheels.py [--have FILE]

The project's packages and theirs, in the versions installed here, which its tests passed with; without torch and what
torch brings along, which have to be there. FILE lists what else is there, as ``pip list --format=freeze`` prints it or
by names alone: of these, only what is too old or too new for the others is carried.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
#: What is not carried, nor looked into: it belongs to the machine's build of torch.
STAYS = {"torch", "triton", "setuptools", "pip"}
#: Oracles and speeds that the check leaves out where they are missing.
OPTIONAL = ("peft",)


def closure(names: Iterable[str]) -> dict[str, list[Requirement]]:
    """Return every package that these need, with what the others ask of it."""
    found: dict[str, list[Requirement]] = {}
    todo = [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in STAYS or not _applies(requirement):
            continue
        if name not in found:
            own = importlib.metadata.requires(name) or []
            todo += [Requirement(each) for each in own if "extra ==" not in each]
        found.setdefault(name, []).append(requirement)
    return found


def _applies(requirement: Requirement) -> bool:
    """Tell whether a requirement is one of Linux with Python 3.12."""
    there: dict[str, Any] = {
        **default_environment(),
        "python_version": "3.12",
        "python_full_version": "3.12.3",
        "extra": "",
    }
    return requirement.marker is None or requirement.marker.evaluate(there)


def already_there(have: str) -> dict[str, str]:
    """Return versions by name from a list of packages; empty where it tells none."""
    lines = [line.strip() for line in have.splitlines() if re.match(r"[A-Za-z0-9]", line.strip())]
    pairs = [re.split(r"==| @ |\s+", line, maxsplit=1) for line in lines]
    # Of what was installed from a file, only the file is told.
    return {canonicalize_name(name): (rest[0] if rest and "/" not in rest[0] else "") for name, *rest in pairs}


def to_carry(have: dict[str, str]) -> list[str]:
    """Return the requirements to carry, ``name==version``."""
    pyproject = (REPOSITORY / "pyproject.toml").read_text()
    direct = tomllib.loads(pyproject)["project"]["dependencies"]
    carried = []
    for name, asked in sorted(closure([*direct, *OPTIONAL]).items()):
        version = have.get(name)
        fits = version is not None and all(
            not version or one.specifier.contains(version, prereleases=True) for one in asked
        )
        if not fits:
            carried.append(f"{name}=={importlib.metadata.version(name)}")
    return carried


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--have", type=Path, help="a list of the packages of that machine")
    options = parser.parse_args()
    print("\n".join(to_carry(already_there(options.have.read_text()) if options.have else {})))


if __name__ == "__main__":
    main()
