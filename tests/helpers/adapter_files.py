"""Adapter files with changes that a test makes: sealed anew, or as an earlier version wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subspace.adapters.serialization import SETTINGS, TENSORS
from subspace.common.files import file_sha256
from subspace.common.hashing import hash_json


def reseal(folder: Path, **changes: Any) -> None:
    """Change entries of ``adapter.json``, and make its checksums those of the files as they are now."""
    described = read(folder) | changes
    described.pop("seal", None)
    if "tensors" in described:
        described["tensors"]["sha256"] = file_sha256(folder / TENSORS)
        described["seal"] = hash_json(described)
    write(folder, described)


def unseal(folder: Path) -> None:
    """Make a folder as an earlier version wrote it: without checksums."""
    described = read(folder)
    del described["seal"], described["tensors"]
    write(folder, described | {"format": 1})


def read(folder: Path) -> dict[str, Any]:
    """Return what ``adapter.json`` says."""
    described: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    return described


def write(folder: Path, described: Mapping[str, Any]) -> None:
    """Write ``adapter.json`` as it is given."""
    (folder / SETTINGS).write_text(json.dumps(described, indent=2) + "\n")
