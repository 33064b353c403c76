"""The two ways to start a run, each with the real launcher and two processes: one loss curve."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from subspace.common.paths import REPOSITORY
from subspace.distributed import launcher
from tests.helpers.material import logged, make_material, saved_adapter

pytestmark = pytest.mark.processes


def start(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_deepspeed_launcher_and_subspace_train_give_the_same_run(tmp_path: Path) -> None:
    config = make_material(tmp_path)
    settings = [f"runs={tmp_path}", f"engine={tmp_path / 'zero2.json'}", "train.micro_batch_size=2"]
    deepspeed = shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    assert deepspeed
    by_deepspeed = [deepspeed, "--num_gpus", "2", "--master_port", str(launcher.free_port())]
    by_deepspeed += [str(REPOSITORY / "launch" / "train.py"), str(config), *settings, "name=deepspeed"]
    start(by_deepspeed, tmp_path)
    by_subspace = [
        sys.executable,
        "-m",
        "subspace",
        "train",
        str(config),
        *settings,
        "name=subspace",
        "--processes",
        "2",
    ]
    start(by_subspace, tmp_path)

    curve = logged(tmp_path / "subspace")
    assert len(curve) == 6
    assert curve[-1] < curve[0] - 0.1
    assert logged(tmp_path / "deepspeed") == curve
    adapters = [saved_adapter(tmp_path / name) for name in ("deepspeed", "subspace")]
    assert all((adapters[0][name] == tensor).all() for name, tensor in adapters[1].items())
