"""Process with the fake CUDA device: does the jobs of its standard input, and prints what came of each as a JSON line.

By hand: ``python -m tests.fake_cuda.worker method bf16 lora`` or ``python -m tests.fake_cuda.worker train 1``, which
prints, among others, what a training step waits for.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from tests.fake_cuda import device

torch = device.load()

from subspace.config import read_config
from subspace.distributed.collectives import all_reduce_sum, barrier, broadcast_object, gather_objects, rank, shutdown
from subspace.distributed.device import device as where
from subspace.distributed.engine import init_distributed
from tests.fake_cuda import methods, process_group
from tests.helpers.material import logged, make_material, saved_adapter
from tests.helpers.op_counts import reads_per_step
from tests.workers import matrix_cells

process_group.install()


class Worker:
    """Does jobs, in a folder that it keeps models and runs in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bases: dict[str, Any] = {}

    def base(self, kind: str) -> Any:
        """Return a base, opened once."""
        if kind not in self.bases:
            self.bases[kind] = methods.open_base(kind, self.folder / "model")
        return self.bases[kind]

    def rules(self) -> list[str]:
        """Return where the device is not as strict as CUDA."""
        return methods.rules(self.base("bf16"))

    def method(self, base: str, name: str, settings: dict[str, Any] | None = None) -> list[str]:
        """Train and evaluate a method; return what is wrong."""
        return methods.run(self.base(base), name, settings or {})

    def objects(self) -> dict[str, Any]:
        """Start the process group and exchange objects before there is a model, as scoring and resuming do."""
        init_distributed(minutes=5)
        mine = torch.cuda.current_device()
        told, gathered = broadcast_object(rank()), gather_objects({"rank": rank(), "device": mine})
        barrier()
        total = all_reduce_sum(torch.ones(1, device=where()))
        return {"told": told, "gathered": gathered, "sum": total.item(), "collectives": process_group.DeviceGroup.calls}

    def plainly(self) -> list[float]:
        """Train by torch alone, as what the matrix's cells are held against; return the losses."""
        folder = self.folder / "plainly"
        own = ["train.micro_batch_size=4", "train.steps=4", "train.learning_rate=0.05", f"runs={folder}", "name=run"]
        matrix_cells.train_plainly(read_config(make_material(folder), own))
        losses: list[float] = json.loads((folder / "run" / "losses.json").read_text())
        return losses

    def train(self, stage: str, shared: str = "") -> dict[str, Any]:
        """Run the tiny model through DeepSpeed; return its losses, what its steps waited for and its collectives.

        Several ranks have a folder ``shared``, with the material.
        """
        process_group.DeviceGroup.calls.clear()
        folder = Path(shared) if shared else self.folder / f"stage{stage}"
        reads = reads_per_step(folder, int(stage), steps=10)
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in saved_adapter(folder / "run").values())
        collectives = sorted(set(process_group.DeviceGroup.calls))
        return {"reads": reads, "losses": logged(folder / "run"), "finite": finite, "collectives": collectives}


def main() -> None:
    """Do the jobs: each the name of a method of :class:`Worker` and its arguments."""
    jobs = [sys.argv[1:]] if len(sys.argv) > 1 else json.load(sys.stdin)
    # As under pytest: a warning that a user would see is a mistake.
    warnings.simplefilter("error", UserWarning)
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Path(folder))
        for name, *args in jobs:
            began = time.process_time()
            try:
                outcome = {"found": getattr(worker, name)(*args)}
            except Exception as error:
                outcome = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            print(json.dumps({"job": [name, *args], "seconds": time.process_time() - began, **outcome}), flush=True)
    shutdown()


if __name__ == "__main__":
    main()
