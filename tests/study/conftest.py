"""What several tests of studies stand on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.studies import make_study


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows and the file of a study."""
    folder = tmp_path_factory.mktemp("study")
    make_study(folder)
    return folder
