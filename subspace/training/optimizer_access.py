"""How a method's start and schedule reach what an engine holds: gradients, values, the optimizer's memory, weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subspace.adapters.base import Adapter
from subspace.adapters.inject import initialize_distributed
from subspace.common.progress import no_progress, show_progress
from subspace.distributed.collectives import is_main
from subspace.distributed.zero import gathered, is_sharded

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedOptimizerAccess:
    """What a method's schedule may do to trained tensors, whatever ZeRO stage holds them. All ranks call alike."""

    def __init__(self, engine: Any = None, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.engine = engine
        self.optimizer = optimizer  # a plain one, where no engine has it

    def grad(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole gradient, averaged over ranks, without the loss scale of float16.

        Valid between the last backward and the step.
        """
        gradient: Tensor | None = parameter.grad
        if is_sharded(parameter) or hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_get_full_grad

            gradient = safe_get_full_grad(parameter)
        if gradient is None:
            return torch.zeros_like(parameter)
        scaled = self.engine is not None and self.engine.fp16_enabled()
        return gradient.detach() / self.engine.optimizer.cur_scale if scaled else gradient.detach()

    def value(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole parameter."""
        if not is_sharded(parameter):
            return parameter.detach()
        with gathered([parameter]):
            return parameter.detach().clone()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the whole parameter, in the model and in the optimizer's float32 copy."""
        if is_sharded(parameter):
            with gathered([parameter], modified_by_main=True):
                parameter.data.copy_(value)
        else:
            parameter.data.copy_(value)
        if is_sharded(parameter) or hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value.to(torch.float32))

    def reset_optimizer_state(self, parameter: nn.Parameter, where: Tensor) -> None:
        """Set what Adam remembers of the values where ``where`` is true to zero."""
        if is_sharded(parameter) or hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

            for key in MOMENTS:
                moment = safe_get_full_optimizer_state(parameter, key)
                if moment is not None:
                    safe_set_full_optimizer_state(parameter, moment.masked_fill(where.to(moment.device), 0), key)
            return
        optimizer = self.engine.optimizer if self.engine is not None else self.optimizer
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for key in MOMENTS:
            if key in state:
                state[key].masked_fill_(where.to(state[key].device), 0)

    def for_each_weight(self, adapters: Sequence[Adapter], look: Callable[[Any, Tensor], None]) -> None:
        """Let each adapter look at its frozen W on one process; see :func:`initialize_distributed`."""
        initialize_distributed(adapters, look, show_progress if is_main() and self.engine is not None else no_progress)
