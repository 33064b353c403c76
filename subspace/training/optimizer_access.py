"""Access to gradients, parameters, optimizer state and frozen weights under any ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subspace.adapters.base import Adapter
from subspace.adapters.inject import initialize_distributed
from subspace.common.progress import no_progress, show_progress
from subspace.distributed.collectives import is_main
from subspace.distributed.deepspeed_compat import OptimizerSlice, basic_optimizer, loss_scale, optimizer_slice
from subspace.distributed.zero import full_gradients, gathered, is_sharded, write_parameter
from subspace.training.late_starts import late_starts


class DeepSpeedOptimizerAccess:
    """The training loop's access for a method's schedule; see :class:`subspace.adapters.base.OptimizerAccess`.

    All ranks make the same calls. Without an engine it works on a plain optimizer or none, for tests.
    """

    def __init__(self, engine: Any = None, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.engine = engine
        self.optimizer = optimizer

    def grad(self, parameter: nn.Parameter) -> Tensor:
        """Return the full gradient of one parameter; :meth:`grads` is cheaper for many."""
        return self.grads([parameter])[0]

    def grads(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the full gradients, averaged over ranks, without the loss scale of float16, in one all-reduce.

        Valid between the last backward pass and the step.
        """
        scaled = self.engine is not None and self.engine.fp16_enabled()
        scale = loss_scale(self.engine) if scaled else 1.0
        found = [
            torch.zeros_like(parameter) if gradient is None else gradient.detach()
            for parameter, gradient in zip(parameters, full_gradients(parameters), strict=True)
        ]
        return [gradient / scale for gradient in found] if scaled else found

    def value(self, parameter: nn.Parameter) -> Tensor:
        """Return the full parameter."""
        if not is_sharded(parameter):
            return parameter.detach()
        with gathered([parameter]):
            return parameter.detach().clone()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the full parameter, in the model and in the optimizer's float32 copy."""
        write_parameter(parameter, value)

    def reset_optimizer_state(self, parameter: nn.Parameter, where: Tensor) -> None:
        """Let Adam begin anew where ``where`` is true: with moments of zero, and counting its steps from there."""
        engine, at = self.engine, OptimizerSlice(0, parameter, 0, parameter.numel())
        optimizer = self.optimizer if engine is None else basic_optimizer(engine)
        own = at if engine is None else optimizer_slice(engine, parameter)
        if optimizer is not None and own is not None:
            places = where.flatten()[own.start : own.start + own.length].nonzero().view(-1)
            late_starts(optimizer).begin(optimizer, own.key, places.to(own.key.device) + own.offset)

    def for_each_weight(self, adapters: Sequence[Adapter], look: Callable[[Any, Tensor], None]) -> None:
        """Call ``look(adapter, W)`` for each adapter on one rank; see :func:`initialize_distributed`."""
        initialize_distributed(adapters, look, show_progress if is_main() and self.engine is not None else no_progress)
