"""Count what costs a GPU time and can be counted without one: what a step waits for, and what it launches.

``python -m tests.helpers.op_counts reads [0 1 2]`` trains the tiny model at these ZeRO stages and prints, by file and
line, how often a step reads a value on the host: each such read waits until the GPU has done all that was asked of it.
``python -m tests.helpers.op_counts launches [METHOD ...]`` prints how many kernels a decoder layer with adapters
launches beyond those of the frozen one. ``tests/training/test_op_counts.py`` holds both to bounds.

Both count operations as they reach the dispatcher. What a CPU cannot show: a tensor that is on the host anyway, such as
a batch before its copy, is read for nothing; so reads inside ``subspace/data`` do not count. Nor does it show a copy
between host and device, which is none here; copies by name (``tolist``, ``cpu``) are counted. On the fake CUDA device
of ``tests/fake_cuda`` both are told apart: ``python -m tests.fake_cuda.worker train 1``.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from subspace import config as config_module
from subspace.adapters.base import TrainProgress
from subspace.adapters.inject import adapter_groups, inject
from subspace.adapters.penalties import with_penalties
from subspace.adapters.registry import list_methods
from subspace.common.patching import patched
from subspace.common.paths import PACKAGE
from subspace.distributed.device import device
from subspace.distributed.watchdog import Watchdog
from subspace.run import train_run
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess
from subspace.training.steps import run_schedules
from tests.helpers.material import make_material
from tests.helpers.tiny_models import EARLY_SCHEDULES, SIZES

ATEN = torch.ops.aten
#: Operations whose result, or its shape, the host has to see.
READS = {
    ATEN._local_scalar_dense.default,  # item, float, int, bool
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN.equal.default,
    ATEN._unique2.default,
    ATEN.unique_dim.default,
    ATEN.unique_consecutive.default,
    ATEN.repeat_interleave.Tensor,
}
#: The same where one of the indices is a mask.
INDEXING = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default}
#: Operations that launch nothing: views, and memory without values.
FREE = set(
    """
    _reshape_alias _unsafe_view alias as_strided detach diagonal empty empty_like empty_strided expand
    is_same_size lift_fresh new_empty new_empty_strided permute resolve_conj select set_ slice split
    split_with_sizes squeeze t transpose unbind unfold unsqueeze view view_as
    """.split()  # noqa: SIM905  (one in a line would be thirty lines)
)


def is_read(operation: Any, args: Sequence[Any]) -> bool:
    """Return True if the host waits for the values of an operation's tensors."""
    if operation in INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return operation in READS


def waiting_copy(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Return what kind of copy between host and device an operation is, if the host waits for it."""
    if operation is ATEN._to_copy.default:
        source, target, at_once = args[0], kwargs.get("device") or args[0].device, kwargs.get("non_blocking", False)
    elif operation is ATEN.copy_.default:
        source, target, at_once = args[1], args[0].device, args[2] if len(args) > 2 else False
    else:
        return None
    if source.device.type == target.type:
        return None
    if target.type == "cpu":
        return None if at_once else "copy to the host"
    return None if at_once and source.is_pinned() else "copy of pageable memory" if at_once else "copy to the device"


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count host reads by file, line and operation while active and ``counting``.

    On a CPU every tensor counts as one of a GPU; on CUDA the tensors say where they are.

    Attributes:
        counting: False leaves out what happens until it is set.
        found: how often each ``(place, operation)`` occurred.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.counting = True
        self.found: Counter[tuple[str, str]] = Counter()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Any:
        for name in ("tolist", "cpu") if self.device == "cpu" else ():
            self._stack.enter_context(patched(Tensor, name, self._counted(name)))
        if self.device != "cpu":
            self._stack.enter_context(patched(torch, "tensor", self._copied(torch.tensor)))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.counting:
            if copy := waiting_copy(operation, args, kwargs or {}):
                self.record(copy)
            elif is_read(operation, args) and any(
                isinstance(tensor, Tensor) and tensor.device.type == self.device for tensor in tree_leaves(args)
            ):
                self.record(str(operation))
        return operation(*args, **(kwargs or {}))

    def record(self, operation: str) -> None:
        """Count one read."""
        where = calling_line()
        if self.device != "cpu" or not where.startswith("data/"):
            self.found[where, operation] += 1

    def _counted(self, name: str) -> Any:
        original = getattr(Tensor, name)

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.counting:
                self.record(name)
            return original(tensor, *args, **kwargs)

        return call

    def _copied(self, make: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            made: Tensor = make(*args, **kwargs)
            if self.counting and made.device.type == self.device:  # its copy does not reach the dispatcher
                self.record("torch.tensor on the device")
            return made

        return call


def calling_line() -> str:
    """Return the innermost line of the package on the stack and, if a library was called from there, its line too."""
    frame: Any = sys._getframe(1)
    library = ""
    while frame is not None:
        file, line = Path(frame.f_code.co_filename), frame.f_lineno
        if file.is_relative_to(PACKAGE):
            return f"{file.relative_to(PACKAGE)}:{line}" + (f" <- {library}" if library else "")
        if not library and file != Path(__file__) and "torch" not in file.parts and "site-packages" in file.parts:
            library = f"{'/'.join(file.parts[file.parts.index('site-packages') + 1 :])}:{line}"
        frame = frame.f_back
    return library or "?"


def reads_per_step(folder: Path, stage: int, *overrides: str, first: int = 3, steps: int = 20) -> dict[str, float]:
    """Train the tiny model in bfloat16 and return how often a step reads a value, by place and operation.

    Args:
        folder: an empty one, or that of :func:`make_material`.
        stage: of ZeRO.
        *overrides: of the run's settings, as on the command line.
        first: the first step that counts; those before it check that tensors move.
        steps: how many count: two periods of ``log_every``. Neither validation nor checkpoints are among them.
    """
    reads = HostReads(device().type)
    reads.counting = False
    beat = Watchdog.beat

    def watched(watchdog: Watchdog, doing: int | str, patience: float = 1.0) -> None:
        reads.counting = isinstance(doing, int) and first <= doing < first + steps
        beat(watchdog, doing, patience)

    settings = [
        "model.dtype=bfloat16",
        "train.micro_batch_size=4",
        f"train.steps={first + steps}",
        "train.save_every=0",
    ]
    settings += ["train.log_every=10", f"engine={folder / f'zero{stage}.json'}", f"runs={folder}", "name=run"]
    file = folder / "run.yaml"
    config = config_module.read_config(file if file.exists() else make_material(folder), [*settings, *overrides])
    with patched(Watchdog, "beat", watched), reads:
        train_run(config)
    return {f"{where} {operation}": count / steps for (where, operation), count in sorted(reads.found.items())}


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count, by name, the operations that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.__name__.partition(".")[0]
        if name not in FREE:
            self.by_name[name] += 1
        return operation(*args, **(kwargs or {}))


@dataclass(frozen=True)
class LayerCounts:
    """Launches of one decoder layer.

    Attributes:
        forward: in a forward pass of a micro-batch that is not a step's first.
        backward: in its backward pass, with the accumulation of gradients.
        step: once a step: in its schedules, and what its first micro-batch launches beyond the others.
    """

    forward: float
    backward: float
    step: float

    @property
    def micro_batch(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    def __sub__(self, other: LayerCounts) -> LayerCounts:
        return LayerCounts(self.forward - other.forward, self.backward - other.backward, self.step - other.step)


def layer_launches(method: str | None) -> LayerCounts:
    """Return the launches of a LLaMA layer in bfloat16 with a method's adapters at its default sites; None is frozen.

    Norms and attention are those that a GPU runs: transformers' own.
    """
    one, two = (_model_launches(method, layers) for layers in (1, 2))
    return LayerCounts(*(b - a for a, b in zip(one, two, strict=True)))


def _model_launches(method: str | None, layers: int) -> tuple[int, int, int]:
    config = AutoConfig.for_model("llama", **{**SIZES, "num_hidden_layers": layers})
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model.requires_grad_(False)
    if method:
        inject(model, method, EARLY_SCHEDULES.get(method, {}))
    model.train()
    groups, access = adapter_groups(model), DeepSpeedOptimizerAccess()

    def schedules(step: int) -> int:
        with Launches() as launches:
            when: Any
            for when in ("before_step", "after_step"):
                run_schedules(when, groups, TrainProgress(step, 20), access)
        return sum(launches.by_name.values())

    for _ in range(2):
        _micro_batch(model)  # from here on there are gradients to add to
    scheduled = schedules(1)
    first, second = _micro_batch(model), _micro_batch(model)
    return *second, scheduled + sum(first) - sum(second)


def _micro_batch(model: Any) -> tuple[int, int]:
    """Run one and return the launches of its forward and of its backward pass."""
    embedding = model.get_input_embeddings()
    if any(parameter.requires_grad for parameter in embedding.parameters()):
        inputs: dict[str, Tensor] = {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
    else:
        inputs = {"inputs_embeds": torch.zeros(2, 16, SIZES["hidden_size"], dtype=torch.bfloat16, requires_grad=True)}
    with Launches() as forward:
        logits = model(**inputs, use_cache=False).logits
    loss: Any = with_penalties(logits.float().sum(), model)
    with Launches() as backward:
        loss.backward()
    return sum(forward.by_name.values()), sum(backward.by_name.values())


def print_reads(stages: Iterable[int]) -> None:
    """Print the table of host reads."""
    for stage in stages:
        with tempfile.TemporaryDirectory() as folder:
            found = reads_per_step(Path(folder), stage)
        print(f"ZeRO {stage}: {sum(found.values()):.1f} reads a step at 2 micro-batches")
        for place, count in sorted(found.items(), key=lambda item: -item[1]):
            print(f"{count:8.1f}  {place}")


def print_launches(methods: Iterable[str]) -> None:
    """Print the table of launches."""
    frozen = layer_launches(None)
    print(f"frozen layer: forward {frozen.forward:g}, backward {frozen.backward:g}; above it:")
    print(f"{'method':12} {'forward':>8} {'backward':>8} {'both':>8} {'a step':>8}")
    for method in methods:
        above = layer_launches(method) - frozen
        columns = (above.forward, above.backward, above.micro_batch, above.step)
        print(f"{method:12}", *(f"{value:8g}" for value in columns))


def main() -> None:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("reads", "launches"))
    parser.add_argument("which", nargs="*", help="ZeRO stages, or methods")
    args = parser.parse_args()
    if args.what == "reads":
        print_reads([int(stage) for stage in args.which] or [0, 1, 2])
    else:
        print_launches(args.which or list_methods())


if __name__ == "__main__":
    main()
