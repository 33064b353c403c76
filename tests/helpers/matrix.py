"""Every base with every ZeRO stage, one and two processes and every family of methods: which go, and how exactly.

``python -m tests.helpers.matrix`` trains all cells, which takes about half an hour, and writes
``tests/long/matrix.json`` and, from it, ``tests/long/MATRIX.md``; with ``--table`` it only does the latter. With
``--in FOLDER`` the runs stay there, and a measurement that was cut short goes on where it was. A cell trains a tiny
LLaMA. Its losses are held against those of a plain loop of torch's, on one process and without DeepSpeed, on the same
base. Its adapter is then read back from its file, scored and merged.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspace import config as config_module
from subspace.adapters.inject import remove_adapters
from subspace.adapters.merging import merge, unmerge
from subspace.adapters.registry import list_methods, resolve_method
from subspace.adapters.serialization import load_adapter
from subspace.common.paths import REPOSITORY
from subspace.config import RunConfig
from subspace.data.dataset import Data, open_data
from subspace.distributed.deepspeed_config import compute_batch_layout, resolve_deepspeed_config
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from subspace.models.lm_head import summed_loss
from subspace.models.loading import open_model, open_tokenizer
from subspace.training.compatibility import find_incompatibility, find_missing_requirement
from tests.helpers.material import logged, make_material, worker_command

Json = dict[str, Any]
RECORD, TABLE = REPOSITORY / "tests/long/matrix.json", REPOSITORY / "tests/long/MATRIX.md"

BASES: dict[str, Json] = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16"},
    "nf4": {"dtype": "float32", "quantize": "nf4"},
    "fp4": {"dtype": "float32", "quantize": "fp4"},
    "int8": {"dtype": "float32", "quantize": "int8"},
    "nf4-double": {"dtype": "bfloat16", "quantize": "nf4", "double_quant": True},  # as QLoRA has it
}
#: How far a loss may lie from the reference's: 16 bits round differently in another order of sums, and on a GPU int8
#: rounds what enters a layer, of which some falls on the other side.
TOLERANCE = {"fp32": 1e-5, "nf4": 1e-5, "fp4": 1e-5, "int8": 5e-4, "bf16": 1e-2, "nf4-double": 1e-2, "fp16": 2e-2}
#: In its place, of a base, a method and a number of ranks. Adam takes a whole step, to either side, also with a number
#: whose gradient is rounding alone: here one of 2,048, of layers.0.mlp.down_proj.A, on CPUs without AMX (4.1e-5).
BY_CHANCE = {("nf4", "dora", 2): 1e-4}
#: The same for the held-out loss of an adapter that was read back. In evaluation int8 rounds on a CPU too, and leaves
#: out columns that are large somewhere in a batch, so that the batch matters.
RELOADED = {**TOLERANCE, "int8": 1e-2}
#: How far a logit of the merged model may lie from the unmerged one's, as a share of the largest; both in float32.
MERGED = 1e-4

CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "NVME"}
#: Without the threshold, everything in a model as small as this would be held whole.
SPREAD = {"stage": 3, "stage3_param_persistence_threshold": 0}
ENGINES: dict[str, Json] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "2+cpu": {"stage": 2, "offload_optimizer": CPU},
    "3": SPREAD,
    "3+cpu": {**SPREAD, "offload_optimizer": CPU, "offload_param": CPU},
    # A buffer for each of its tensors, as for those that a layer of a real model holds at once.
    "3+nvme": {
        **SPREAD,
        "offload_optimizer": NVME,
        "offload_param": {**NVME, "buffer_size": 100_000, "buffer_count": 99},
    },
}
RANKS = (1, 2)
#: One method of each family, with the learning rate of its cells.
METHODS = {"lora": 0.005, "ssb": 0.005, "pissa": 0.005, "dora": 0.005, "liera": 0.005, "houlsby": 0.005, "prompt": 0.05}
STEPS = 4
#: Where the record was made: on others, float16 and NVMe may be refused.
MACHINE = "two CPU cores that compute in float16 too, with libaio"


@dataclass(frozen=True)
class Cell:
    """One combination."""

    base: str
    engine: str
    ranks: int
    method: str

    @property
    def name(self) -> str:
        """Its run's name."""
        return f"{self.base}-zero{self.engine}-{self.ranks}-{self.method}"


CELLS = [Cell(*cell) for cell in itertools.product(BASES, ENGINES, RANKS, METHODS)]


def refused(cell: Cell, why: Callable[..., str | None] = find_incompatibility) -> str | None:
    """Return what the code says against a cell; ``why`` is ``refusal``, or ``lack`` for this machine's reasons."""
    model = ModelConfig(**BASES[cell.base])
    layout = compute_batch_layout(8, 4, cell.ranks)
    raw = {"zero_optimization": ENGINES[cell.engine]}
    engine = resolve_deepspeed_config(raw, layout, dtype=model.dtype, clip=1.0).settings
    if why is find_missing_requirement:
        return find_missing_requirement(model, engine)
    cls, settings = resolve_method(cell.method)
    return find_incompatibility(model, [(cls, cls.Config(**settings))], engine)


def covering() -> list[Cell]:
    """Choose cells so that each base meets each engine, number of ranks and method, among what every CPU can train.

    Without those in float32, with which tests/distributed/test_zero.py trains, and in FP4, which is NF4's code.
    """
    left_out = {"fp32", "fp4", "fp16"}
    able = [cell for cell in CELLS if cell.base not in left_out and cell.engine != "3+nvme" and refused(cell) is None]
    meetings = {cell: {(cell.base, each) for each in (cell.engine, cell.ranks, cell.method)} for cell in able}
    missing = set().union(*meetings.values())
    chosen: list[Cell] = []
    while missing:
        # Of equals, the one whose engine and method have met least.
        best = max(able, key=lambda cell: (len(meetings[cell] & missing), cell.ranks, -_met(cell, chosen)))
        chosen.append(best)
        missing -= meetings[best]
    return sorted(chosen, key=CELLS.index)


def _met(cell: Cell, chosen: Sequence[Cell]) -> int:
    return sum((other.engine, other.method) == (cell.engine, cell.method) for other in chosen)


def measure(cells: Sequence[Cell], root: Path) -> dict[str, Json]:
    """Train the cells, read them back and merge them; return what came of each by its name.

    What a folder holds already is not trained again, so that a measurement that was cut short can go on.
    """
    lay_out(root)
    outcomes: dict[str, Json] = {
        cell.name: {"refused": why} for cell in cells if (why := refused(cell, find_missing_requirement))
    }
    able = [cell for cell in cells if cell.name not in outcomes]
    plain = sorted({Cell(cell.base, "0", 1, cell.method) for cell in able}, key=CELLS.index)
    todo = [cell for cell in able if not _is_done(root / cell.name)]
    for cell in todo:
        shutil.rmtree(root / cell.name, ignore_errors=True)
    one = [
        ("plain", cell, reference_name(cell))
        for cell in plain
        if not (root / reference_name(cell) / "losses.json").exists()
    ]
    one += [("run", cell, cell.name) for cell in todo if cell.ranks == 1]
    launch([[kind, *_run(root, cell, name)] for kind, cell, name in one], root, 1)
    launch([["run", *_run(root, cell, cell.name)] for cell in todo if cell.ranks == 2], root, 2)
    with torch.no_grad():
        for base in BASES:
            judge = Judge(root, base)
            outcomes |= {cell.name: judge(cell) for cell in able if cell.base == base}
    return outcomes


def lay_out(root: Path) -> None:
    """Write model, rows, configuration and engines of all cells into a folder."""
    make_material(root)
    for name, zero in ENGINES.items():
        # So large that no gradient is swapped, and so small that the rest is (see tests/workers/matrix_cells.py).
        engine = {"zero_optimization": zero, "aio": {"block_size": 12288}}
        # A loss scale that nothing overflows at: a step that is skipped has no counterpart in the reference.
        engine["fp16"] = {"enabled": "auto", "initial_scale_power": 8}
        (root / f"zero{name}.json").write_text(json.dumps(engine).replace("NVME", str(root / "nvme")))


def _is_done(folder: Path) -> bool:
    """Tell whether a cell's run has reached its end."""
    file = folder / "environment.json"
    return file.exists() and "outcome" in json.loads(file.read_text())


def reference_name(cell: Cell) -> str:
    """Return the name of the run, by torch alone, that a cell is held against."""
    return f"plain-{cell.base}-{cell.method}"


def _run(root: Path, cell: Cell, name: str) -> tuple[str, list[str]]:
    """Return a run as ``config.read`` takes it."""
    settings = [f"runs={root}", f"name={name}", f"engine={root}/zero{cell.engine}.json", f"method={cell.method}"]
    settings += [f"model.{key}={value}" for key, value in BASES[cell.base].items()]
    settings += [f"train.steps={STEPS}", f"train.learning_rate={METHODS[cell.method]}", "train.micro_batch_size=4"]
    settings += [f"train.validate_every={STEPS}", "train.save_every=0"]
    return str(root / "run.yaml"), settings


def run_config(root: Path, cell: Cell, name: str) -> RunConfig:
    """Return the configuration of a cell's run under this name."""
    return config_module.read_config(*_run(root, cell, name))


def beyond_tolerance(cell: Cell, outcome: Json) -> str | None:
    """Return what is wrong with a trained cell: with its losses, its file or its merged model; None if nothing is."""
    tolerance = BY_CHANCE.get((cell.base, cell.method, cell.ranks), TOLERANCE[cell.base])
    if not outcome["loss"] < tolerance:
        return f"a loss is {outcome['loss']:.1e} off the reference's, more than {tolerance:.0e}"
    if not outcome["moved"] > 2 * tolerance:  # so there is something to agree on
        return f"the loss moved by {outcome['moved']:.1e} alone"
    if not outcome["reloaded"] < RELOADED[cell.base]:
        return f"read back, the adapter's held-out loss is {outcome['reloaded']:.1e} off"
    if (outcome["merged"] is None) != (cell.method in ("houlsby", "prompt")):
        return f"merged: {outcome['merged']}"
    if not (outcome["merged"] or 0) < MERGED:
        return f"merged, a logit is {outcome['merged']:.1e} off"
    return None


def launch(jobs: Sequence[Any], root: Path, ranks: int) -> None:
    """Let processes train the jobs one after another."""
    if not jobs:
        return
    (root / f"jobs{ranks}.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    environment.setdefault("DS_ACCELERATOR", "cpu")  # also where there is one GPU, which two ranks cannot share
    command = worker_command(ranks, "matrix_cells", str(root / f"jobs{ranks}.json"))
    with (root / f"said{ranks}.txt").open("w") as said:
        status = subprocess.run(command, env=environment, stdout=said, stderr=said, check=False).returncode
    assert status == 0, (root / f"said{ranks}.txt").read_text()[-6000:]


class Judge:
    """Looks at what the cells of one base left, on one process, with the base opened afresh."""

    def __init__(self, root: Path, base: str) -> None:
        self.root = root
        self.config = self.read(Cell(base, "0", 1, "lora"))

    @functools.cached_property
    def model(self) -> Any:
        """The base as the cells had it."""
        return open_model(self.config.model)

    @functools.cached_property
    def dense(self) -> Any:
        """The base's weights in float32, of a quantised one as they dequantise."""
        model = open_model(replace(self.config.model, dtype="float32"))
        return model if self.config.model.quantize == "none" else model.dequantize(dtype=torch.float32)  # type: ignore[no-untyped-call]

    @functools.cached_property
    def data(self) -> Data:
        """What they were trained on and validated with."""
        return open_data(self.config.data, open_tokenizer(self.config.model), self.config.train.seed)

    def read(self, cell: Cell) -> RunConfig:
        """Return a cell's configuration."""
        return run_config(self.root, cell, cell.name)

    def __call__(self, cell: Cell) -> Json:
        """Return how far a cell is from its reference, its file from what was in memory, and its merged model."""
        folder = self.root / cell.name
        losses, expected = logged(folder), json.loads((self.root / reference_name(cell) / "losses.json").read_text())
        assert len(losses) == len(expected) == STEPS
        (validation,) = logged(folder, "validation_loss")
        outcome = {
            "loss": max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
            "moved": max(expected) - min(expected),
            "reloaded": abs(self.validation(folder / "adapter") - validation),
            "merged": self.merged(folder / "adapter", mergeable=list_methods()[cell.method].mergeable),
            "held": json.loads((folder / "environment.json").read_text())["outcome"]["weights_held"],
        }
        return outcome

    def validation(self, adapter: Path) -> float:
        """Return the loss on the held-out rows with the adapter as its file has it."""
        load_adapter(self.model, adapter)
        batches = [batch.to(self.model.device) for batch in self.data.validation_batches(4, 0, 1)]
        total = sum(float(summed_loss(self.model, batch)) for batch in batches)
        remove_adapters(self.model)
        return total / sum(batch.num_labelled for batch in batches)

    def merged(self, adapter: Path, *, mergeable: bool) -> float | None:
        """Return how far the merged model's logits are from the unmerged one's; None for what says it cannot merge."""
        load_adapter(self.dense, adapter)
        try:
            ids = torch.arange(2, 26, device=self.dense.device).view(2, 12)
            before: Tensor = self.dense(input_ids=ids, use_cache=False).logits
            if not mergeable:
                try:
                    merge(self.dense)
                except UserError:
                    return None
                raise AssertionError(f"{adapter} merged, though its method cannot")
            merge(self.dense)
            after: Tensor = self.dense(input_ids=ids, use_cache=False).logits
            unmerge(self.dense)
            return float((after - before).abs().max() / before.abs().max())
        finally:
            remove_adapters(self.dense)


def table(record: Json) -> str:
    """Return the Markdown page of a record."""
    outcomes, machine = record["cells"], record["machine"]
    lines = [
        "# What goes together",
        "",
        "Written by `python -m tests.helpers.matrix`; `tests/long/test_matrix.py` keeps it current. A tiny LLaMA was",
        f"trained for {STEPS} steps in each combination that is not refused, on {machine}. A number is the largest",
        "distance of a loss from that of a plain loop of torch's, on one process and without DeepSpeed, "
        "on the same base: with 1 and",
        "with 2 processes. `a`, `b`, ... are refused before anything is loaded, with the words below. `held` is what",
        "one process has in memory of weights, quantisation and adapters, in kB, with 1 and with 2 processes (lora).",
        "",
        "| base | ZeRO | tolerance | " + " | ".join(METHODS) + " | held |",
        "| --- | --- | --- | " + " | ".join("---" for _ in METHODS) + " | --- |",
    ]
    reasons: dict[str, str] = {}
    for base, engine in itertools.product(BASES, ENGINES):
        cells = {method: [Cell(base, engine, ranks, method) for ranks in RANKS] for method in METHODS}
        columns = [_entry([outcomes[cell.name] for cell in both], reasons) for both in cells.values()]
        held = [outcomes[cell.name].get("held") for cell in cells["lora"]]
        kept = ", ".join(f"{max(each) / 1000:.0f}" for each in held if each)
        lines.append(f"| {base} | {engine} | {TOLERANCE[base]:.0e} | {' | '.join(columns)} | {kept} |")
    done = [outcome for outcome in outcomes.values() if "loss" in outcome]
    reloaded = ", ".join(f"{RELOADED[base]:.0e} ({base})" for base in BASES)
    merged = [outcome["merged"] for outcome in done if outcome["merged"] is not None]
    lines += [
        "",
        f"{len(done)} combinations were trained and {len(outcomes) - len(done)} refused. Read back from its file by",
        f"one process, each adapter gives the held-out loss of its run within {reloaded}.",
        f"Merged in float32, {len(merged)} of them differ by at most {max(merged):.0e} of the largest logit from the",
        "unmerged model; houlsby and prompt cannot be merged and say so.",
        "",
        "`0` to `3` are ZeRO's stages; `+cpu` offloads the optimizer to the host, at stage 3 the weights too, and",
        "`+nvme` both to a disk instead. nf4, fp4 and int8 compute in float32 here, nf4-double, with quantised",
        "scales, in bfloat16, as QLoRA does.",
        "",
        *(f"- `{letter}`: {reason}" for reason, letter in reasons.items()),
    ]
    return "\n".join(lines) + "\n"


def _entry(outcomes: Iterable[Json], reasons: dict[str, str]) -> str:
    entries = [
        f"`{reasons.setdefault(outcome['refused'], chr(ord('a') + len(reasons)))}`"
        if "refused" in outcome
        else f"{outcome['loss']:.0e}"
        for outcome in outcomes
    ]
    return entries[0] if len(set(entries)) == 1 and entries[0].startswith("`") else ", ".join(entries)


def main() -> None:
    """Measure everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the table of the record that is there")
    parser.add_argument("--in", dest="root", type=Path, help="where the runs are, and stay")
    options = parser.parse_args()
    if not options.table:
        ruled_out = {cell.name: {"refused": why} for cell in CELLS if (why := refused(cell))}
        with contextlib.nullcontext(options.root) if options.root else tempfile.TemporaryDirectory() as root:
            measured = measure([cell for cell in CELLS if cell.name not in ruled_out], Path(root))
        cells = {cell.name: {**ruled_out, **measured}[cell.name] for cell in CELLS}
        RECORD.write_text(json.dumps({"machine": MACHINE, "cells": cells}, indent=1) + "\n")
    TABLE.write_text(table(json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main()
