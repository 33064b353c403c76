"""Studies of a tiny model, and runners in place of processes: the command in this process, or made-up trainings."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from subspace.cli.main import main
from subspace.common.files import write_json
from subspace.config import RunConfig, read_config, write_config
from subspace.errors import RunStopped
from subspace.study.execute import Run
from tests.helpers.material import make_material

STUDY = """base: run.yaml
runs: {runs}
settings: {{train.steps: 5, data.validation: 12, train.save_every: 0, train.trackers: []}}
budget: {{like: lora, r: 4}}
methods: {methods}
rates: {{ladder: 3, step: 3.1623}}
search: {{halving: {{first: 0.2, rungs: [0.4]}}}}
final: {{seeds: [0, 1]}}
outcome: {{primary: validation_loss}}
"""


def make_study(root: Path, methods: str = "[lora, ssb]", text: str = STUDY, name: str = "toy") -> Path:
    """Fill a folder with a tiny model, rows and a study's file, and return that."""
    if not (root / "run.yaml").exists():
        make_material(root)
    file = root / f"{name}.yaml"
    file.write_text(text.format(runs=root / "runs", methods=methods))
    return file


def here(arguments: Sequence[str], output: Path) -> int:
    """Run a command in this process."""
    with output.open("a") as opened, contextlib.redirect_stdout(opened), contextlib.redirect_stderr(opened):
        return main(list(arguments))


def made_up(loss: Callable[[str, float, int, int], float], asked: list[tuple[Path, int]] | None = None) -> Run:
    """Return a runner that trains nothing: a cell's held-out loss is that of its method, rate, seed and step.

    A loss that is not finite is a training that fails. ``asked`` collects folders and steps.
    """

    def run(arguments: Sequence[str], output: Path) -> int:
        files = [word for word in arguments if word.endswith(".yaml")]
        until = int(arguments[arguments.index("--until") + 1]) if "--until" in arguments else None
        settings = [word for word in arguments if "=" in word]
        failed = [train(read_config(file, settings), until, output, alone=len(files) == 1) for file in files]
        return int(any(failed))

    def train(config: RunConfig, until: int | None, output: Path, *, alone: bool) -> bool:
        assert config.train.steps is not None
        assert config.train.validate_every
        folder, every, last = config.folder, config.train.validate_every, until or config.train.steps
        if asked is not None:
            asked.append((folder, last))
        log = folder / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        done = max((line["step"] for line in lines), default=0)
        label = folder.parent.parent.name
        for step in range(done + 1, last + 1):
            value = loss(label, config.train.learning_rate, config.train.seed, step)
            if not math.isfinite(value):
                if alone:
                    output.write_text("error: the loss of step 1 is not finite\n")
                else:
                    write_json(folder / "environment.json", {"failure": "the loss of step 1 is not finite"})
                return True
            lines.append({"step": step, "loss": value, "seconds": float(step), "peak_memory": 1})
            if step % every == 0 or step == config.train.steps:
                lines.append({"step": step, "validation_loss": value})
        write_config(config, folder / "config.yaml")
        log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        outcome = {"steps": last, "loss": value, "seconds": float(last), "peak_memory": 1}
        write_json(folder / "environment.json", {} if until else {"outcome": outcome})
        return False

    return run


def stopping_after(run: Run, commands: int) -> Run:
    """Return a runner that is stopped by a signal at the command after so many."""
    left = [commands]

    def limited(arguments: Sequence[str], output: Path) -> int:
        if not left[0]:
            raise RunStopped("by a signal")
        left[0] -= 1
        return run(arguments, output)

    return limited
