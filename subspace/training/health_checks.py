"""Checks for non-finite values and for trainable tensors that never change.

Losses and gradients are looked at every few steps, because looking at one makes a GPU finish all its work first. Until
then they are on the device. A step after a bad one may spoil the adapters in memory, but what is saved or validated is
looked at before, so that every checkpoint is good.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from subspace.adapters.base import OptimizerAccess
from subspace.adapters.inject import adapters, trained_parameters
from subspace.adapters.serialization import read_adapter
from subspace.distributed.collectives import all_reduce_host, broadcast_object, is_main, world_size
from subspace.distributed.deepspeed_compat import loss_scale_exhausted, skipped_steps
from subspace.errors import RunFailed, RunStopped, UserError
from subspace.training.blame import LossTrace
from subspace.training.checkpoint import last_checkpoint_hint
from subspace.training.steps import StepStats

#: Steps after which every trained tensor must have changed. One is not enough: where one factor starts at zero, the
#: other's first gradient is zero too.
MAX_STEPS_UNCHANGED = 2
#: Consecutive steps that float16 may skip before the run fails.
MAX_SKIPPED_STEPS = 50


class TrainingHealthCheck:
    """Checks that trained tensors change from their initial values, and that loss and gradients stay finite.

    As a context manager it tells of a loss or gradient that is not finite in place of an error that came of it.

    Args:
        model: with adapters.
        access: to its gradients and values.
        start: checksums of the trained tensors' initial values, for a resumed run; None computes them now.
        folder: the run's, whose last checkpoint is named in errors.

    Attributes:
        trace: finds what makes a loss not finite, if it is set.
    """

    def __init__(
        self, model: nn.Module, access: OptimizerAccess, start: Mapping[str, str] | None = None, folder: Path = Path()
    ) -> None:
        self.access, self.folder = access, folder
        self.trace: LossTrace | None = None
        self.parameters: Mapping[str, nn.Parameter] = trained_parameters(model)
        self.late = {
            f"{site}.{name}" for site, adapter in adapters(model).items() for name in adapter.delayed_grad_params
        }
        self.start = dict(start or {name: checksum(access.value(p)) for name, p in self.parameters.items()})
        self.without_gradient = {name for name in self.parameters if name not in self.late}
        self._hooks = [
            self.parameters[name].register_post_accumulate_grad_hook(partial(self._reached, name))  # type: ignore[no-untyped-call]
            for name in self.without_gradient
        ]
        self.skipped_in_a_row = 0
        self.loss = math.nan  # of the last step that was read
        self.unread: list[tuple[int, Tensor]] = []  # steps, each with loss and largest gradient
        self.not_updated: int | None = None  # the step whose gradients are there, and whose update is still to come

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A method's schedule may fail on such values, before it is time to look at them.
        unread: list[tuple[int, float, float]] = []
        if isinstance(error, Exception) and not isinstance(error, (UserError, RunFailed, RunStopped)):
            with contextlib.suppress(RuntimeError):  # after an error of the GPU nothing can be read from it
                unread = self._take_unread()
            for step, loss, gradient in unread:
                if not math.isfinite(loss + gradient):
                    # Not collective: the other ranks may have no error.
                    raise self._late_failure(step, _describe(loss), None) from error

    def record(self, step: int, stats: StepStats) -> None:
        """Remember a step's loss and largest gradient, between its last backward pass and its update; read nothing.

        Raises:
            RunFailed: in the first step, trained tensors to which no gradient came. Collective over ranks.
        """
        if self._hooks:
            self._check_reached()
        self.unread.append((step, torch.stack([stats.loss, stats.max_gradient])))
        self.not_updated = step

    def _reached(self, name: str, parameter: Tensor) -> None:
        self.without_gradient.discard(name)

    def _check_reached(self) -> None:
        """Raise RunFailed for tensors that no process's loss reached. An expert without tokens has zeros: it is one."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        missed = all_reduce_host([int(name in self.without_gradient) for name in self.parameters])
        cut_off = [name for name, count in zip(self.parameters, missed, strict=True) if count == world_size()]
        if cut_off:
            raise RunFailed(
                f"after the first backward pass {len(cut_off)} of {len(self.parameters)} trained tensors have no "
                f"gradient, first {cut_off[0]}: the loss does not depend on them. Leave their layers out of `targets`"
            )

    def read(self, engine: Any) -> float:
        """Read what was recorded since the last time, and return the last step's loss.

        In float16 a gradient may overflow: the engine then skips the step and reduces the loss scale. That is an error
        only if it happens too often, or if the scale is at its minimum. So in float16 call this before every update.

        Raises:
            RunFailed: a loss or a gradient is not finite. Collective over ranks.
        """
        for step, loss, gradient in self._take_unread():
            self.loss = loss
            if not math.isfinite(loss) or not (math.isfinite(gradient) or engine.fp16_enabled()):
                raise self._failure(step, _describe(loss), trace=None if math.isfinite(loss) else self.trace)
            if math.isfinite(gradient):
                self.skipped_in_a_row = 0
                continue
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row > MAX_SKIPPED_STEPS or loss_scale_exhausted(engine):
                what = f"gradients overflow float16 at every loss scale, {self.skipped_in_a_row} steps in a row"
                raise self._failure(step, f"{what} (try model.dtype=bfloat16)")
        return self.loss

    def check_updated(self, step: int, engine: Any) -> None:
        """Raise RunFailed after an update that was skipped or left tensors at their initial values. Collective."""
        self.not_updated = None
        if not (engine.was_step_applied() or engine.fp16_enabled()):
            # With an offloaded optimizer only DeepSpeed sees the gradients. It skips the step if one is not finite.
            raise RunFailed(
                f"step {step}: a gradient is not finite. The step was not taken. {last_checkpoint_hint(self.folder)}"
            )
        self.check_changed(step - skipped_steps(engine))

    def check_changed(self, taken: int) -> None:
        """Raise RunFailed if a tensor still has its initial values after so many steps. Collective over ranks."""
        if taken != MAX_STEPS_UNCHANGED:
            return
        expected = {name: p for name, p in self.parameters.items() if name not in self.late}
        still = [name for name, p in expected.items() if checksum(self.access.value(p)) == self.start[name]]
        if still:
            raise RunFailed(
                f"after {taken} steps {len(still)} of {len(expected)} trained tensors have not moved, first "
                f"{still[0]}. Is the learning rate zero, or the method's branch cut off from the loss?"
            )

    def check_file(self, folder: Path) -> None:
        """Raise RunFailed if a saved adapter has only initial values. Collective over ranks."""
        tensors = read_adapter(folder)[1] if is_main() else {}
        changed = broadcast_object(
            any(checksum(tensors[name]) != start for name, start in self.start.items() if is_main())
        )
        if not changed:
            raise RunFailed(f"the adapter in {folder} holds the values that training began with: nothing was learnt")

    def _take_unread(self) -> list[tuple[int, float, float]]:
        """Return step, loss and largest gradient of each recorded step, and forget them; one read of the device."""
        if not self.unread:
            return []
        steps, results = zip(*self.unread, strict=True)
        self.unread = []
        return [(step, *values) for step, values in zip(steps, torch.stack(results).tolist(), strict=True)]

    def _failure(self, step: int, what: str, trace: LossTrace | None = None) -> RunFailed:
        """Return an error that names what is not finite first, and the last checkpoint. Collective.

        ``trace`` is given where the loss is not: then all gradients are not either, whatever made it so.
        """
        where = trace.bad_frozen_weight() if trace else None
        if step != self.not_updated:
            # By now the update has spoilt the adapters. What still makes no finite loss without them, did so before.
            where = where or (trace.bad_output(step, without_adapters=True) if trace else None)
            rows = f"its rows are {trace.rows(step)}" if trace else None
            return self._late_failure(step, what, where or rows)
        where = where or self._bad_value() or (trace.bad_output(step) if trace else None) or self._bad_gradient()
        return RunFailed(f"step {step}: {what}; {where}. The step was not taken. {last_checkpoint_hint(self.folder)}")

    def _bad_value(self) -> str | None:
        values = [name for name, p in self.parameters.items() if not torch.isfinite(self.access.value(p)).all()]
        return f"{values[0]} holds a value that is not finite" if values else None

    def _bad_gradient(self) -> str:
        found = zip(self.parameters, self.access.grads(list(self.parameters.values())), strict=True)
        gradients = [name for name, gradient in found if not torch.isfinite(gradient).all()]
        if not gradients:
            return "every trained tensor is finite, and so is the loss of each row alone"
        return f"the gradient of {gradients[0]} is not finite ({len(gradients)} of {len(self.parameters)} tensors)"

    def _late_failure(self, step: int, what: str, where: str | None) -> RunFailed:
        """Return an error for a step whose update has been made, but not saved."""
        return RunFailed(
            f"step {step}: {what}, which was found a few steps later{f'; {where}' if where else ''}. "
            f"{last_checkpoint_hint(self.folder)}; nothing was saved from that step on. With train.log_every=1 the "
            "tensor that it begins in is named"
        )


def _describe(loss: float) -> str:
    """Return what is wrong with a step whose loss or gradients are not finite."""
    return "a gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"


def checksum(tensor: Tensor) -> str:
    """Return a checksum of the values, equal for every dtype that represents them exactly."""
    content = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.blake2b(content.tobytes(), digest_size=12).hexdigest()
