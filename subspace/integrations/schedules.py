"""Methods' schedules in a user's own training loop, in accelerate's, or in HF Trainer's.

AdaLoRA, FlexLoRA and LoRA-Dash change with the optimizer's steps. ``subspace train`` runs their schedules; elsewhere
hooks of the optimizer do, so that the loop stays as it is::

    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    subspace.follow_schedules(model, optimizer, steps=1000)  # then train 1,000 steps

What has to survive an interruption is where torch keeps such things: in the optimizer's ``state_dict`` the number of
steps and, for elements that a schedule began later, when; in the model's, importances. So a loop that loads both goes
on as if it had not been interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from subspace.adapters.base import Adapter, TrainProgress
from subspace.adapters.inject import adapter_groups, adapters, has_schedule, take_over_schedules
from subspace.errors import UserError
from subspace.training.late_starts import late_starts
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess

#: The key of an optimizer's first group for the steps that schedules have seen, and of a tensor's state for the step
#: counts at which its elements began.
STEP, BEGUN = "subspace_step", "subspace_begun"

#: The hooks of each optimizer that is followed.
_following: WeakKeyDictionary[torch.optim.Optimizer, Sequence[RemovableHandle]] = WeakKeyDictionary()


def follow_schedules(model: nn.Module, optimizer: Any, *, steps: int, accumulate: int = 1) -> None:
    """Let the schedules of a model's adapters act with the steps of an optimizer, from the next one on.

    Under several processes each calls it, and all step together. Gradients are seen as they are when the optimizer
    steps, so clipped where the loop clips them. A call for the same optimizer replaces the one before.

    Args:
        model: the one with the adapters, wrapped (DDP) or not.
        optimizer: torch's or bitsandbytes' that steps the adapters' tensors themselves, or accelerate's around it.
        steps: how many the whole training takes, those before an interruption included.
        accumulate: backward passes of a step, over which a method's penalty is spread so that it counts once. A loop
            that scales its loss, for float16, wraps it by :func:`subspace.adapters.penalties.with_penalties` instead.

    Raises:
        UserError: the optimizer does not hold the tensors of an adapter with a schedule, as DeepSpeed's and FSDP's,
            which hold copies. `subspace train` runs schedules at every ZeRO stage.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if min(steps, accumulate) < 1:
        raise UserError(f"follow_schedules was given steps={steps} and accumulate={accumulate}: both are at least 1")
    if not (found := adapters(model)):
        raise UserError("follow_schedules was called for a model without adapters. Inject them first")
    groups = [group for group in adapter_groups(model) if has_schedule(group[0].method_class)]
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for group in groups:
        for adapter in group:
            if any(id(p) not in held for p in adapter.trained().values() if p.requires_grad):
                raise UserError(
                    f"the schedule of {adapter.name} cannot follow this {type(optimizer).__name__}, which "
                    "does not hold the adapters' tensors. Make it after inject, of parameters that require a "
                    "gradient; with DeepSpeed or FSDP, train by `subspace train`"
                )
    for handle in _following.pop(optimizer, ()):
        handle.remove()
    if groups:
        late_starts(optimizer)  # its hooks come first, and none may be added while hooks run
        schedules = _Schedules(groups, optimizer, steps)
        _following[optimizer] = (
            optimizer.register_step_pre_hook(schedules.before_step),
            optimizer.register_step_post_hook(schedules.after_step),
        )
    for adapter in found.values():
        tensor = next(iter(adapter.own_tensors().values()))
        adapter.loss_tap.gradient = torch.full((), 1 / accumulate, device=tensor.device)
    take_over_schedules(model)


class _Access(DeepSpeedOptimizerAccess):
    """Access to a plain optimizer that notes which tensors' state was reset."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer=optimizer)
        self.reset: list[nn.Parameter] = []

    def reset_optimizer_state(self, parameter: nn.Parameter, where: Tensor) -> None:
        super().reset_optimizer_state(parameter, where)
        self.reset.append(parameter)


class _Schedules:
    """The hooks of one optimizer that run schedules."""

    def __init__(self, groups: Sequence[Sequence[Adapter]], optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.groups, self.steps, self.access = groups, steps, _Access(optimizer)
        self.trained = [p for group in groups for adapter in group for p in adapter.trained().values()]
        #: What is known to be both in the optimizer's state and in force.
        self.begun: dict[nn.Parameter, Tensor] = {}

    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._restore(optimizer)
        self._run("before_step", optimizer)

    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._run("after_step", optimizer)
        optimizer.param_groups[0][STEP] = self._progress(optimizer).step
        for parameter in self.access.reset:
            self._note(optimizer, parameter)
        self.access.reset = []

    def _progress(self, optimizer: torch.optim.Optimizer) -> TrainProgress:
        return TrainProgress(optimizer.param_groups[0].get(STEP, 0) + 1, self.steps)

    def _run(self, when: str, optimizer: torch.optim.Optimizer) -> None:
        for group in self.groups:
            with torch.no_grad():
                getattr(group[0].method_class, when)(group, self._progress(optimizer), self.access)

    def _note(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
        """Write into the optimizer's state when a tensor's elements began, if some began later than others."""
        begun, state = late_starts(optimizer).begun(parameter), optimizer.state.get(parameter, {})
        self.begun.pop(parameter, None)
        state.pop(BEGUN, None)
        if begun is not None:
            state[BEGUN] = self.begun[parameter] = begun

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Put in force what an optimizer's state says that was loaded since."""
        for parameter in self.trained:
            found = optimizer.state.get(parameter, {}).get(BEGUN)
            if found is not self.begun.get(parameter):
                none = torch.zeros(parameter.numel(), device=parameter.device)
                late_starts(optimizer).restore(optimizer, parameter, none if found is None else found)
                self._note(optimizer, parameter)
