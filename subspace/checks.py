"""Is it learning? The checks that stop a run whose numbers have gone bad, or whose adapters never move."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from subspace.errors import RunFailed
from subspace.inject import trained_parameters
from subspace.method import Access

#: Steps after which every trained tensor must have moved. One is not enough: where one factor starts at zero, the
#: other's first gradient is zero too.
STEPS_TO_MOVE = 2


class LearningCheck:
    """Watches the first steps: every declared tensor gets a finite gradient, and has moved soon after."""

    def __init__(self, model: nn.Module, access: Access, *, may_skip: bool = False) -> None:
        self.access = access
        self.may_skip = may_skip  # float16 skips steps on purpose, until its loss scale fits
        self.parameters: Mapping[str, nn.Parameter] = trained_parameters(model)
        self.start: dict[str, Tensor] = {name: access.value(p).clone() for name, p in self.parameters.items()}

    def before_step(self, step: int) -> None:
        """Look at the gradients of the first step. Collective over ranks."""
        if step == 1 and not self.may_skip and (bad := self.without_finite_gradient()):
            raise RunFailed(
                f"step 1: {bad[0]} has a gradient that is not finite ({len(bad)} of {len(self.parameters)} tensors)"
            )

    def after_step(self, step: int) -> None:
        """Look at what has moved, after so many steps that were taken. Collective over ranks."""
        if step == STEPS_TO_MOVE and self.start:
            still = [name for name, p in self.parameters.items() if torch.equal(self.access.value(p), self.start[name])]
            if still:
                raise RunFailed(
                    f"after {step} steps {len(still)} of {len(self.parameters)} trained tensors have not moved, first "
                    f"{still[0]}. Is the learning rate zero, or the method's branch cut off from the loss?"
                )
            self.start = {}

    def without_finite_gradient(self) -> list[str]:
        """Name the trained tensors whose gradient holds a NaN or an infinity. Collective over ranks."""
        return [name for name, p in self.parameters.items() if not torch.isfinite(self.access.grad(p)).all()]

    def explain(self, step: int, loss: float, last_good: str) -> RunFailed:
        """Say where a loss that is not finite shows first, and what is left. Collective over ranks."""
        values = [name for name, p in self.parameters.items() if not torch.isfinite(self.access.value(p)).all()]
        gradients = self.without_finite_gradient()
        where = (
            f"{values[0]} holds a value that is not finite"
            if values
            else f"the gradient of {gradients[0]} is not finite ({len(gradients)} tensors)"
            if gradients
            else "every trained tensor is finite: the frozen model or the data gives it"
        )
        return RunFailed(f"step {step}: the loss is {loss}; {where}. The step was not taken. {last_good}")
