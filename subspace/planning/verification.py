"""The estimate of a run beside what its first steps take."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace.config import read_config
from subspace.distributed.orphans import holding
from subspace.errors import RunFailed
from subspace.planning.plan import Plan, build_plan, format_bytes, format_time
from subspace.training.checkpoint import read_environment

VERIFIED_STEPS = 3


@dataclass(frozen=True)
class VerifiedPlan:
    """The estimate for three steps beside the measured values."""

    plan: Plan
    peak: int
    checkpoint: int
    seconds: float

    @property
    def predicted(self) -> int:
        """The estimated peak, while loading or in a step."""
        return max(self.plan.loading, self.plan.peak)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        measured = {"peak": self.peak, "checkpoint": self.checkpoint, "seconds": self.seconds}
        return {"predicted": self.predicted, "measured": measured, "plan": self.plan.as_dict()}

    def lines(self) -> Iterator[str]:
        """Yield the report's lines."""
        kind = "resident" if self.plan.device == "cpu" else "allocated"
        yield f"{VERIFIED_STEPS} steps of {self.plan.micro_batch} x {self.plan.tokens} tokens, run here:"
        yield f"  {'':<30} {'predicted':>10} {'measured':>10}"
        apart = 100 * (self.predicted / self.peak - 1)
        told, measured = format_bytes(self.predicted), format_bytes(self.peak)
        yield f"  {f'most memory, {kind}':<30} {told:>10} {measured:>10}  ({apart:+.1f} %)"
        yield f"  {'a checkpoint':<30} {format_bytes(self.plan.checkpoint):>10} {format_bytes(self.checkpoint):>10}"
        if self.plan.seconds:
            estimated = " to ".join(map(format_time, self.plan.seconds))
            yield f"  {'time':<30} {estimated:>10}, measured {format_time(self.seconds)}"


def verify_plan(file: str, settings: Sequence[str], *, processes: int = 1) -> VerifiedPlan:
    """Run three steps of a run in new processes and return the measurements beside the estimate."""
    with tempfile.TemporaryDirectory(prefix="subspace-plan-") as folder:
        few = [*settings, f"train.steps={VERIFIED_STEPS}", f"runs={folder}", "name=verify"]
        plan = build_plan(read_config(file, few), processes=processes)
        command = [sys.executable, "-m", "subspace", "train", file, *few, "--processes", str(processes)]
        with holding(Path(folder)) as watched:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
                env=os.environ | watched,
            )  # fmt: skip
        if done.returncode:
            last = done.stdout.strip().splitlines()[-1:] or ["it said nothing"]
            raise RunFailed(f"the three steps were not trained: {last[0]}")
        run = Path(folder) / "verify"
        outcome = read_environment(run)["outcome"]
        saved = next((run / "checkpoints").iterdir())
        size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
    return VerifiedPlan(plan, outcome["peak_memory"], size, outcome["seconds"])
