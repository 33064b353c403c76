"""Training of several runs of one base in one process: what each step computes in the base is computed once for all.

Each run is what it is alone: its model (with the others' frozen tensors), engine, optimizer, clipping, schedule, log,
checkpoints, end and failure are its own, and :func:`subspace.training.loop.train` trains it. It asks for the passes of
its micro-batches; those that the runs ask for at the same time become one pass, :class:`OnePass`, whose gradients the
engines take as if they had computed them. Runs whose adapters cannot share a pass have their own, one after the other.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from subspace.adapters.multi_adapter import OnePass, can_batch
from subspace.common.files import write_json
from subspace.common.progress import Progress, ProgressCallback
from subspace.config import RunConfig
from subspace.distributed.collectives import is_main
from subspace.errors import RunFailed, RunStopped, UserError
from subspace.resolve import ResolvedRun
from subspace.training.acceleration import offload_activations
from subspace.training.checkpoint import ENVIRONMENT_FILE, read_environment
from subspace.training.checkpointer import TrainState
from subspace.training.steps import Pass, Passes

logger = logging.getLogger(__name__)

#: Sections and settings that runs trained together must have in common, besides the model and the engine.
COMMON = (
    "data",
    "train.batch_size",
    "train.micro_batch_size",
    "train.liger",
    "train.offload_activations",
    "train.deterministic",
    "train.keep_memory",
    "train.hang_minutes",
)
#: Of the rounds of passes, the one in which the runs have their own, and the last whose time is compared with it. It is
#: the first, before any checkpoint: a run that goes on from one has the same passes as one that nothing interrupted.
MEASURED_ALONE, LAST_MEASURED = 1, 8


def labels(configs: Sequence[RunConfig]) -> list[str]:
    """Return what each run is called among the others: its name, or where two have the same, its folder."""
    names = [config.name for config in configs]
    return names if len(set(names)) == len(names) else [str(config.folder) for config in configs]


def check_together(runs: Sequence[ResolvedRun]) -> None:
    """Raise UserError for runs that cannot be trained together."""
    first, names = runs[0], labels([run.config for run in runs])
    called = dict(zip((id(run) for run in runs), names, strict=True))
    for run in runs[1:]:
        for key in ("model", "engine", *COMMON):
            ours, theirs = (_setting(run, key), _setting(first, key))
            if ours != theirs:
                raise UserError(
                    f"{called[id(run)]} and {names[0]} were to be trained together, but have different settings of "
                    f"{key}{_difference(key, theirs, ours)}. Give both the same, or train one of them alone"
                )
    folders = [run.config.folder for run in runs]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise UserError(
            f"two of the runs {', '.join(names)} have the folder {twice}. Give each a name of its own, in its file"
        )
    for run in runs if len(runs) > 1 else ():
        if reason := _refusal(run):
            raise UserError(
                f"{called[id(run)]} was to be trained together with other runs, but {reason}, or train it alone"
            )


def _refusal(run: ResolvedRun) -> str | None:
    """Return why a run cannot be trained together with any other, and what could be."""
    config, engine = run.config, run.engine
    if config.model.dtype == "float16":
        return "model.dtype is float16, whose loss scale would be one for all. Set model.dtype=bfloat16"
    if engine.settings["bf16"]["enabled"]:
        return "the engine's file enables bf16, which casts what the others share. Leave its section out"
    if engine.stage == 3:
        return "the engine shards the base (ZeRO stage 3), which one run owns. Set engine=ds_configs/zero1.json"
    if str(config.model.attention).startswith(("flash", "flex")):
        return f"model.attention is {config.model.attention}, which has all rows in one sequence. Set it to sdpa"
    if config.train.compile:
        return "train.compile compiles the model's layers for one run. Set train.compile=false"
    if "wandb" in config.train.trackers:
        return "train.trackers has wandb, which follows one run a process. Leave it out"
    for entry in config.method:
        if dropped := getattr(entry.settings, "dropout", 0.0):
            return (
                f"method {entry.name} has dropout={dropped:g}, whose random numbers would depend on the others. "
                "Set method.dropout=0"
            )
        if entry.name == "full":
            return "method full changes the base that the others read. Take lora"
    return None


def check_draws_nothing(model: nn.Module) -> None:
    """Raise UserError if a model has dropout of its own, whose random numbers would depend on the other runs."""
    for name, module in model.named_modules():
        for key in ("p", "attention_dropout", "dropout"):
            value = getattr(module, key, 0.0)
            if isinstance(value, float) and value > 0 and (key != "p" or isinstance(module, nn.Dropout)):
                raise UserError(
                    f"runs were to be trained together, but the model's {name} drops values with probability "
                    f"{value:g}, and whose these are would depend on the other runs. Train each alone"
                )


def _setting(run: ResolvedRun, key: str) -> Any:
    if key == "engine":
        return run.engine.settings["zero_optimization"], run.engine.settings["bf16"]
    section, _, name = key.partition(".")
    value = getattr(run.config, section)
    return getattr(value, name) if name else value


def _difference(key: str, before: Any, now: Any) -> str:
    if "." in key:
        return f": {now} and {before}"
    values = [(f"{key}.{name}", vars(now)[name], vars(before)[name]) for name in getattr(now, "__dict__", {})]
    found = next(((name, ours, theirs) for name, ours, theirs in values if ours != theirs), None)
    return f": {found[0]} is {found[1]} and {found[2]}" if found else ""


class OneDisplay:
    """A display of the progress of all runs, each of which has what takes the place of its own."""

    def __init__(self, at: ProgressCallback) -> None:
        self.at = at
        self.done: dict[str, float] = {}
        self.losses: dict[str, str] = {}

    def of(self, name: str) -> Progress:
        """Return the display of one run."""

        @contextmanager
        def show(title: str, total: float = 0, unit: str = "") -> Iterator[ProgressCallback]:
            def advance(done: float, detail: str = "") -> None:
                self.done[name] = done
                self.losses[name] = detail.partition("  ")[0].removeprefix("loss ")
                self.at(sum(self.done.values()), "  ".join(f"{run} {loss}" for run, loss in self.losses.items()))

            yield advance

        return show


class Together:
    """The training of several runs, by name.

    Args:
        runs: their trainings.
        model: without adapters; theirs share its tensors.
        measured: whether one round of passes is run one after the other, to know what is gained.

    Attributes:
        outcomes: of each run that has ended, its state, or why it failed.
    """

    def __init__(self, runs: Mapping[str, Passes[TrainState]], model: nn.Module, *, measured: bool = True) -> None:
        self.runs, self.model = runs, model
        self.outcomes: dict[str, TrainState | UserError] = {}
        self._asked: dict[str, Pass] = {}
        self._round = 0
        self._round_alone = MEASURED_ALONE if measured else None
        self._alone: dict[str, float] = {}  # seconds a token
        self._joint: list[float] = []
        self._sharing: list[str] = []

    def train(self) -> None:
        """Train all runs to their ends. One that fails does not end the others."""
        with ExitStack() as stack:
            for name, passes in self.runs.items():
                stack.callback(passes.close)
                self._go_on(name, partial(next, passes))
            able = self._sharing = [name for name, asked in self._asked.items() if can_batch(asked.engine.module)]
            shared = OnePass(self.model, [self._asked[name].engine.module for name in able])
            own = [name for name in self.runs if name not in able]
            if own and is_main():
                logger.info(f"one pass for {', '.join(able) or 'none'}; passes of their own for {', '.join(own)}")
            if self._round_alone and able:
                self._warm_up(shared, able[0])
            while self._asked:
                self._round += 1
                joint = [name for name in able if name in self._asked]
                if len(joint) < 2 or self._round == self._round_alone:
                    joint = []
                for name in [name for name in self._asked if name not in joint]:
                    self._run_alone(name)
                if joint:
                    self._run_joint({name: able.index(name) for name in joint}, shared)
                if self._round == LAST_MEASURED and self.gain and is_main():
                    logger.info(f"one pass for {len(able)} runs is {self.gain} times as fast as one after the other")

    @property
    def gain(self) -> float | None:
        """How many times as fast a shared pass is as those of its runs one after the other; None if not known."""
        if not self._joint or not set(self._sharing) <= set(self._alone):
            return None
        alone = statistics.mean(self._alone[name] for name in self._sharing)
        return round(alone / statistics.median(self._joint), 2)

    def write_facts(self, folder: Path, name: str) -> None:
        """Add to a run's ``environment.json`` what training together gained, and why this one failed, if so."""
        about, outcome = read_environment(folder), self.outcomes[name]
        measured = {"gain": self.gain, "share": self.share(name)}
        about |= {key: value for key, value in measured.items() if value is not None}
        if isinstance(outcome, UserError) and not isinstance(outcome, RunStopped):
            about["failure"] = str(outcome)
        write_json(folder / ENVIRONMENT_FILE, about)

    def share(self, name: str) -> float | None:
        """Return the share of the time that a run would take of all that they would take alone; None if not known."""
        if set(self._alone) != set(self.runs):
            return None
        return round(self._alone[name] / sum(self._alone.values()), 4)

    def _warm_up(self, shared: OnePass, name: str) -> None:
        """Run a pass for nothing, so that the first one that is measured is not the one that allocates."""
        asked = self._asked[name]
        with offload_activations() if asked.offload else nullcontext():
            shared.gradients([0], [asked.batch], [asked.weight], asked.engine.device)

    def _run_alone(self, name: str) -> None:
        """Run the pass that a run asks for, and let it go on."""
        asked, began = self._asked[name], time.perf_counter()
        try:
            summed = asked.run()
        except Exception as error:
            self._go_on(name, partial(self.runs[name].throw, error))
            return
        if self._round == self._round_alone:
            self._alone[name] = _until_computed(summed, began) / asked.batch.num_tokens
        self._go_on(name, partial(self.runs[name].send, summed))

    def _run_joint(self, joint: Mapping[str, int], shared: OnePass) -> None:
        """Run the passes that these runs ask for as one, and let them go on."""
        asked, began = [self._asked[name] for name in joint], time.perf_counter()
        device, batches = asked[0].engine.device, [each.batch for each in asked]
        try:
            with offload_activations() if asked[0].offload else nullcontext():
                found = shared.gradients(list(joint.values()), batches, [each.weight for each in asked], device)
        except Exception as error:
            for name in joint:
                self._go_on(name, partial(self.runs[name].throw, error))
            return
        for each, (_, gradients) in zip(asked, found, strict=True):
            each.take(gradients)
        if self._alone and self._round <= LAST_MEASURED:
            seconds = _until_computed(found[-1][0], began)
            self._joint.append(seconds / sum(batch.num_tokens for batch in batches))
        for name, (summed, _) in zip(joint, found, strict=True):
            self._go_on(name, partial(self.runs[name].send, summed))

    def _go_on(self, name: str, resume: Callable[[], Pass]) -> None:
        """Let a run go on until it asks for another pass, ends, or fails."""
        self._asked.pop(name, None)
        try:
            self._asked[name] = resume()
        except StopIteration as ended:
            self.outcomes[name] = ended.value
        except UserError as error:
            self.outcomes[name] = error
            if not isinstance(error, RunStopped) and is_main():
                logger.info(f"{name} stopped: {error}. The others go on")


def _until_computed(value: Tensor, began: float) -> float:
    """Return the seconds until a value is there: a GPU is asked for it."""
    float(value)
    return time.perf_counter() - began


def raise_failures(outcomes: Mapping[str, TrainState | UserError]) -> None:
    """Raise the error that says which runs have not ended as they should, and why; nothing if all have.

    Raises:
        RunStopped: a signal stopped runs.
        RunFailed: others failed.
    """
    failed = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, UserError)}
    stopped = [name for name, error in failed.items() if isinstance(error, RunStopped)]
    broken = "; ".join(f"{name}: {error}" for name, error in failed.items() if name not in stopped)
    if stopped:
        also = f". Failed: {broken}" if broken else ""
        raise RunStopped(
            f"{len(stopped)} of {len(outcomes)} runs, by a signal. Their checkpoints are saved; repeat the command "
            f"with --resume{also}"
        )
    if failed:
        raise RunFailed(f"{len(failed)} of {len(outcomes)} runs failed, and the others have ended. {broken}")
