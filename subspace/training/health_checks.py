"""Is it learning? The checks that stop a run whose numbers have gone bad, or whose adapters never move."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from subspace.adapters.base import OptimizerAccess
from subspace.adapters.inject import adapters, trained_parameters
from subspace.adapters.serialization import read_adapter
from subspace.distributed.collectives import broadcast_object, is_main
from subspace.errors import RunFailed

#: Steps after which every trained tensor must have moved. One is not enough: where one factor starts at zero, the
#: other's first gradient is zero too.
MAX_STEPS_UNCHANGED = 2


class TrainingHealthCheck:
    """Knows what the trained tensors were at the start, and looks whether they move and stay finite.

    ``start`` has a checksum of each, so that a resumed run can still tell.
    """

    def __init__(self, model: nn.Module, access: OptimizerAccess, start: Mapping[str, str] | None = None) -> None:
        self.access = access
        self.parameters: Mapping[str, nn.Parameter] = trained_parameters(model)
        self.late = {
            f"{site}.{name}" for site, adapter in adapters(model).items() for name in adapter.delayed_grad_params
        }
        self.start = dict(start or {name: checksum(access.value(p)) for name, p in self.parameters.items()})

    def after_step(self, taken: int) -> None:
        """Look at what has moved, after so many steps that were taken. Collective over ranks."""
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
        """Refuse an adapter's folder that holds what training began with. Collective over ranks."""
        tensors = read_adapter(folder)[1] if is_main() else {}
        moved = broadcast_object(
            any(checksum(tensors[name]) != start for name, start in self.start.items() if is_main())
        )
        if not moved:
            raise RunFailed(f"the adapter in {folder} holds the values that training began with: nothing was learnt")

    def explain(self, step: int, what: str, last_good: str) -> RunFailed:
        """Say where a number that is not finite shows first, and what is left. Collective over ranks."""
        values = [name for name, p in self.parameters.items() if not torch.isfinite(self.access.value(p)).all()]
        gradients = [name for name, p in self.parameters.items() if not torch.isfinite(self.access.grad(p)).all()]
        where = (
            f"{values[0]} holds a value that is not finite"
            if values
            else f"the gradient of {gradients[0]} is not finite ({len(gradients)} of {len(self.parameters)} tensors)"
            if gradients
            else "every trained tensor is finite: the frozen model or the data gives it"
        )
        return RunFailed(f"step {step}: {what}; {where}. The step was not taken. {last_good}")


def checksum(tensor: Tensor) -> str:
    """Return a checksum of the values, which is the same in any dtype that holds them exactly."""
    content = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.blake2b(content.tobytes(), digest_size=12).hexdigest()
