"""Show that two checkouts compute the same numbers: losses, adapters and predictions, to the last digit.

    git worktree add /tmp/older 8287bb6
    python -m tests.bench.same_numbers --other /tmp/older            with a report; status 1 where anything differs
    python -m tests.bench.same_numbers --other /tmp/older lora       this method only

Each checkout trains and scores SmolLM2-135M by its own command line, in processes of their own. This one then goes on
with what the other one wrote: it reads the other's config.yaml, resumes its checkpoint and scores its adapter. Both are
given the settings by the names that the older one knows, which the newer one must take, too. Rows are not grouped by
length: the rows of a step no longer depend on where the run ends, so that those of so short a run differ.

``--work FOLDER`` keeps the runs; what the other checkout left there is used again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from subspace.common.paths import REPOSITORY, cache_folder

METHODS = {
    "lora": ["method.dropout=0.05"],
    "dora": [],
    "adalora": ["method.target_r=4", "method.every=1", "method.warm_up=0.2"],
}
RANKS = (1, 2)
PROTOCOLS = ["likelihood", "llm-adapters", "answer-word"]
RUN = """\
model: {path: smollm2-135m, dtype: float32}
method: {name: METHOD, r: 8}
targets: [q_proj, k_proj, v_proj, up_proj, down_proj]
data: {mixture: commonsense, max_length: 256, loss_on: answer, validation: 8, group_by_length: false}
train: {steps: 6, batch: 4, learning_rate: 1.0e-3, warmup_steps: 2, log_every: 1, save_every: 3, validate_every: 6,
        keep_checkpoints: 3, schedule: linear, seed: 0, trackers: []}
engine: ds_configs/zero2.json
evaluate: {tasks: [arc_easy, openbookqa, boolq], limit: 8}
"""
#: What is compared of an item: its text or scores and what was made of them.
ANSWER = ("id", "scores", "text", "prediction", "label", "correct")


class Checkout:
    """A clone of the repository, at whatever commit, and its command line."""

    def __init__(self, root: Path, runs: Path) -> None:
        self.root, self.runs = root.resolve(), runs.resolve()
        self.runs.mkdir(parents=True, exist_ok=True)

    def call(self, *words: str | Path) -> None:
        """Run `subspace` as this checkout has it."""
        environment = {**os.environ, "PYTHONPATH": str(self.root), "SUBSPACE_CACHE": str(cache_folder().resolve())}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "subspace", *map(str, words)]
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{self.root}: {' '.join(command[2:])}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")

    def train(self, config: Path, name: str, ranks: int, *settings: str | Path) -> Path:
        """Train, unless the run is there, and return its folder."""
        folder = self.runs / name
        if not (folder / "adapter" / "adapter.safetensors").is_file():
            self.call("train", config, f"runs={self.runs}", f"name={name}", *settings, "--processes", str(ranks))
        return folder

    def score(self, subject: Path | str, *settings: str) -> None:
        """Score a run by every protocol; what is scored already is left as it is."""
        self.call("evaluate", subject, f"evaluate.protocol=[{','.join(PROTOCOLS)}]", *settings, "--processes", "1")


def logged(folder: Path) -> list[tuple[int, float]]:
    """Return the losses of training and validation by step."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(line["step"], line[key]) for line in lines for key in ("loss", "validation_loss") if key in line]


def answers(folder: Path) -> dict[str, Any]:
    """Return what was scored of every item, by protocol and task."""
    found: dict[str, Any] = {}
    for file in sorted((folder / "evaluation").rglob("*.jsonl")):
        items = map(json.loads, file.read_text().splitlines())
        kept = [{key: item[key] for key in ANSWER if key in item} for item in items]
        found[f"{file.parent.name}/{file.stem}"] = sorted(kept, key=lambda item: str(item["id"]))
    return found


def tensors(folder: Path) -> dict[str, bytes]:
    """Return the trained tensors, bit for bit."""
    saved = load_file(folder / "adapter" / "adapter.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in saved.items()}


class Report:
    """Collects what was compared and prints a line for each."""

    def __init__(self) -> None:
        self.differ = 0

    def __call__(self, what: str, ours: Any, theirs: Any) -> None:
        """Compare, and say how much there was to compare."""
        assert theirs, f"{what}: nothing to compare"
        same = ours == theirs
        self.differ += not same
        count = sum(map(len, theirs.values())) if isinstance(theirs, dict) else len(theirs)
        print(f"{'same' if same else 'DIFFERS':8} {what} ({count} values)", flush=True)
        if not same:
            pairs = zip(
                *(value.items() if isinstance(value, dict) else value for value in (ours, theirs)), strict=False
            )
            print(*[f"    {a!r:.150}\n    {b!r:.150}" for a, b in pairs if a != b][:2], sep="\n", flush=True)


def stopped(folder: Path, copy: Path) -> None:
    """Copy a run as if it had been killed after its first checkpoint."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "checkpoints/step-000003", copy / "checkpoints/step-000003")
    shutil.copy(folder / "config.yaml", copy)
    about = json.loads((folder / "environment.json").read_text())
    about.pop("outcome", None)
    (copy / "environment.json").write_text(json.dumps(about))
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (copy / "log.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 3))


def unscored(folder: Path, copy: Path) -> Path:
    """Return a copy of a run without its scores."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("evaluation", "results.json"))
    return copy


def compare(ours: Checkout, theirs: Checkout, methods: Sequence[str], report: Report) -> None:
    """Train, score, resume and read on both sides."""
    config = theirs.runs / "run.yaml"
    scored = False
    for method in methods:
        config.write_text(RUN.replace("METHOD", method))
        for ranks in RANKS:
            name = f"{method}-{ranks}"
            old = theirs.train(config, name, ranks, *METHODS[method])
            new = ours.train(config, name, ranks, *METHODS[method])
            report(f"{name}: losses", logged(new), logged(old))
            report(f"{name}: adapter", tensors(new), tensors(old))

            resumed = ours.runs / f"{name}-resumed"
            if not (resumed / "adapter" / "adapter.safetensors").is_file():
                stopped(old, resumed)
                where = [f"runs={resumed.parent}", f"name={resumed.name}"]
                ours.call("train", old / "config.yaml", *where, "--resume", "--processes", str(ranks))
            report(f"{name}: their checkpoint resumed, losses", logged(resumed), logged(old))
            report(f"{name}: their checkpoint resumed, adapter", tensors(resumed), tensors(old))
        old, new = theirs.runs / f"{method}-1", ours.runs / f"{method}-1"
        theirs.score(old)
        ours.score(new)
        report(f"{method}: answers", answers(new), answers(old))
        if not scored:
            read = ours.runs / f"{method}-read"
            if not (read / "evaluation").is_dir():
                unscored(old, read)
            ours.score(read)
            report(f"{method}: answers by their adapter", answers(read), answers(old))
            for side in (theirs, ours):
                side.score(config, f"runs={side.runs}")
            base = "smollm2-135m"
            report("the model as it is: answers", answers(ours.runs / base), answers(theirs.runs / base))
            scored = True


def main() -> None:
    """Compare and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}; all of them by default")
    parser.add_argument("--other", type=Path, required=True, help="another checkout's folder")
    parser.add_argument("--work", type=Path, help="where the runs are, and stay")
    options = parser.parse_args()
    report = Report()
    with contextlib.nullcontext(options.work) if options.work else tempfile.TemporaryDirectory() as work:
        ours = Checkout(REPOSITORY, Path(work) / "ours")
        theirs = Checkout(options.other, Path(work) / "theirs")
        compare(ours, theirs, options.methods or list(METHODS), report)
    sys.exit(1 if report.differ else 0)


if __name__ == "__main__":
    main()
