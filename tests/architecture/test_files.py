"""One module writes files so that they are whole or not there; no other does it by itself."""

from __future__ import annotations

import re

from subspace.common.paths import REPOSITORY

OWN_WAYS = re.compile(r"os\.replace\(|\.rename\(|\bfsync\(|file_digest\(|\bmkstemp\(|\bmkdtemp\(|\bfcntl\b")


def test_only_one_module_renames_and_flushes() -> None:
    sources = {file.relative_to(REPOSITORY): file.read_text() for file in (REPOSITORY / "subspace").rglob("*.py")}
    assert [str(file) for file, text in sources.items() if OWN_WAYS.search(text)] == ["subspace/common/files.py"]
