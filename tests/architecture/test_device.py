"""One function says whether there is a GPU to compute on; everything else asks it, so that all agree."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from subspace.common.paths import REPOSITORY

ASKS = re.compile(r"cuda\.is_available\(|accelerator\.is_available\(|current_accelerator\(")
#: Besides it: what shows a machine to the tests, and measurements, which choose by themselves.
OTHERS = re.compile(r"tests/(conftest\.py|bench/.*|gpu/.*|architecture/test_device\.py)")
#: Runs that train, resume, score, plan and load models in one process.
THROUGHOUT = """
training/test_loop.py training/test_resume.py evaluation/test_likelihood.py evaluation/test_batching.py
planning/test_plan.py models/test_loading.py adapters/test_inject.py
"""


def test_one_function_says_whether_there_is_a_gpu() -> None:
    files = [file for folder in ("subspace", "tests", "launch") for file in (REPOSITORY / folder).rglob("*.py")]
    asking = {str(file.relative_to(REPOSITORY)) for file in files if ASKS.search(file.read_text())}
    assert {file for file in asking if not OTHERS.fullmatch(file)} == {"subspace/distributed/device.py"}


@pytest.mark.long
@pytest.mark.processes
def test_the_suite_leaves_a_gpu_alone() -> None:
    """On a machine where torch sees one: whatever would touch it raises; see tests/helpers/gpu_machine.py."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.helpers.gpu_machine", "-p", "no:cacheprovider"]
    command += ["-m", "not long and not gpu", *(f"tests/{file}" for file in THROUGHOUT.split())]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
