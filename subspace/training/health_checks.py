"""Checks for non-finite values and for trainable tensors that never change."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspace.adapters.base import OptimizerAccess
from subspace.adapters.inject import adapters, trained_parameters
from subspace.adapters.serialization import read_adapter
from subspace.distributed.collectives import broadcast_object, is_main
from subspace.distributed.deepspeed_compat import loss_scale_exhausted
from subspace.errors import RunFailed
from subspace.training.checkpoint import last_checkpoint_hint
from subspace.training.steps import StepStats

#: Steps after which every trained tensor must have changed. One is not enough: where one factor starts at zero, the
#: other's first gradient is zero too.
MAX_STEPS_UNCHANGED = 2
#: Consecutive steps that float16 may skip before the run fails.
MAX_SKIPPED_STEPS = 50


class TrainingHealthCheck:
    """Checks that trained tensors change from their initial values, and that loss and gradients stay finite.

    Args:
        model: with adapters.
        access: to its gradients and values.
        start: checksums of the trained tensors' initial values, for a resumed run; None computes them now.
        folder: the run's, whose last checkpoint is named in errors.
    """

    def __init__(
        self, model: nn.Module, access: OptimizerAccess, start: Mapping[str, str] | None = None, folder: Path = Path()
    ) -> None:
        self.access, self.folder = access, folder
        self.parameters: Mapping[str, nn.Parameter] = trained_parameters(model)
        self.late = {
            f"{site}.{name}" for site, adapter in adapters(model).items() for name in adapter.delayed_grad_params
        }
        self.start = dict(start or {name: checksum(access.value(p)) for name, p in self.parameters.items()})
        self.skipped_in_a_row = 0

    def check_finite(self, step: int, stats: StepStats, engine: Any) -> None:
        """Raise RunFailed for a loss or a gradient that is not finite. Between last backward pass and step; collective.

        In float16 a gradient may overflow: the engine then skips the step and reduces the loss scale. That is an error
        only if it happens too often, or if the scale is at its minimum.
        """
        if not torch.isfinite(stats.loss):
            raise self._failure(step, f"the loss is {stats.loss.item()}")
        if torch.isfinite(stats.max_gradient):
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        if not engine.fp16_enabled():
            raise self._failure(step, "a gradient is not finite")
        if self.skipped_in_a_row > MAX_SKIPPED_STEPS or loss_scale_exhausted(engine):
            what = f"gradients overflow float16 at every loss scale, {self.skipped_in_a_row} steps in a row"
            raise self._failure(step, f"{what} (try model.dtype=bfloat16)")

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

    def _failure(self, step: int, what: str) -> RunFailed:
        """Return an error that names the first non-finite tensor and the last checkpoint. Collective."""
        values = [name for name, p in self.parameters.items() if not torch.isfinite(self.access.value(p)).all()]
        found = zip(self.parameters, self.access.grads(list(self.parameters.values())), strict=True)
        gradients = [name for name, gradient in found if not torch.isfinite(gradient).all()]
        where = (
            f"{values[0]} holds a value that is not finite"
            if values
            else f"the gradient of {gradients[0]} is not finite ({len(gradients)} of {len(self.parameters)} tensors)"
            if gradients
            else "every trained tensor is finite: the frozen model or the data gives it"
        )
        return RunFailed(f"step {step}: {what}; {where}. The step was not taken. {last_checkpoint_hint(self.folder)}")


def checksum(tensor: Tensor) -> str:
    """Return a checksum of the values, equal for every dtype that represents them exactly."""
    content = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.blake2b(content.tobytes(), digest_size=12).hexdigest()
