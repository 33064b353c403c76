r"""Adam for elements that begin later than the rest of their tensor: each is corrected for its own number of steps.

Adam's moments start at zero, for which it divides them by :math:`1 - \beta^t`, where t counts the steps of the tensor
that it was given. An element that a schedule begins after step :math:`t_0`, with moments of zero, needs
:math:`1 - \beta^{t - t_0}`. By t, and under a constant gradient, it would be moved by up to six times the learning rate
in each of its first steps. The count is one number for a whole tensor, and under ZeRO for all tensors of a group, which
are one flat tensor; so it cannot be set back for some elements.

The moments themselves do not depend on the count. Of m and v after step t, with the learning rate :math:`\eta`, an
optimizer subtracts :math:`\eta\,u(t)`, and here :math:`\eta\,(u(t - t_0) - u(t))` is subtracted after it:

.. math:: u(n) = \frac{m / (1 - \beta_1^n)}{\sqrt{v / (1 - \beta_2^n)} + \epsilon}

That is done by hooks of the optimizer, on the tensors that it was given and before anyone reads them: at every ZeRO
stage, wherever the state is, for torch's optimizers and bitsandbytes'. It costs as much as there are such elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from subspace.errors import UserError
from subspace.models.bitsandbytes_compat import clear_moment, read_moment

#: The names of the two moments in the state of torch's optimizers and of bitsandbytes'.
MOMENTS = (("exp_avg", "exp_avg_sq"), ("state1", "state2"))

State = dict[str, Any]


@dataclass
class _Late:
    """The elements of one tensor that began late.

    Attributes:
        index: their places in the flattened tensor, ``(n,)``, each once.
        which: for each, the place of its beginning in ``counts``, ``(n,)``.
        counts: the optimizer's step counts at the beginnings, ``(k,)``, float64.
        to_clear: places whose moments are to be set to zero as soon as they are in memory.
        before: both moments before the step, where the optimizer keeps them rounded.
    """

    index: Tensor
    which: Tensor
    counts: Tensor
    to_clear: Tensor
    before: tuple[Tensor, Tensor] | None = None


class LateStarts:
    """The late elements of one optimizer, by the tensors that it updates; see :func:`late_starts`."""

    def __init__(self) -> None:
        self._late: dict[Tensor, _Late] = {}

    def begin(self, optimizer: torch.optim.Optimizer, key: Tensor, index: Tensor) -> None:
        """Let the optimizer treat these elements of a tensor as if it had never updated them.

        Args:
            optimizer: the one whose late elements these are.
            key: a tensor that it updates.
            index: places in the flattened ``key``, ``(n,)``, each once.
        """
        state: State = optimizer.state.get(key, {})
        if not state or not len(index):
            return  # before the first step everything is as new
        if not any(names[0] in state for names in MOMENTS):
            raise UserError(
                f"a schedule was to let {type(optimizer).__name__} begin anew for some elements, which is known of "
                f"optimizers that keep Adam's two moments; this one keeps {', '.join(map(str, state))}. Take AdamW"
            )
        if len(index) == key.numel():
            self._late.pop(key, None)
            _clear(state, index)
            state["step"] = state["step"] * 0  # whatever its type
            return
        late = self._late.setdefault(key, _nothing_late(key))
        others = ~torch.isin(late.index, index)
        count = torch.as_tensor(state["step"], dtype=torch.float64, device=key.device).view(1)
        which = torch.full_like(index, len(late.counts), dtype=torch.int32)
        late.index = torch.cat([late.index[others], index])
        late.which = torch.cat([late.which[others], which])
        late.counts = torch.cat([late.counts, count])
        late.to_clear = torch.cat([late.to_clear, index])
        _clear_due(late, state)

    def begun(self, key: Tensor) -> Tensor | None:
        """Return the optimizer's step count at which each element of a tensor began, ``(elements,)``, float32.

        None where none began late.
        """
        if key not in self._late:
            return None
        late, found = self._late[key], torch.zeros(key.numel(), device=key.device)
        found[late.index] = late.counts.float()[late.which]
        return found

    def restore(self, optimizer: torch.optim.Optimizer, key: Tensor, begun: Tensor) -> None:
        """Restore what :meth:`begun` returned, or what it would return for these elements in another tensor."""
        self._late.pop(key, None)
        index = begun.nonzero().view(-1)
        counts, which = torch.unique(begun[index].double(), return_inverse=True)
        if len(index) == key.numel() and len(counts) == 1:
            state: State = optimizer.state[key]
            state["step"] = state["step"] - int(counts)
        elif len(index):
            self._late[key] = _Late(index, which.int(), counts, index[:0])

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Do what has to be done while the state is as the last step left it: a hook of the optimizer."""
        for _, key, late in self._stepping(optimizer):
            state = optimizer.state[key]
            _clear_due(late, state)
            if _is_rounded(state):
                first, second = _names(state)
                late.before = read_moment(state, first, late.index), read_moment(state, second, late.index)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Correct the step of all late elements: a hook of the optimizer."""
        for group, key, late in self._stepping(optimizer):
            state = optimizer.state[key]
            m, v = _moments(key, state, late, group["betas"])
            step = state["step"].double() if torch.is_tensor(state["step"]) else state["step"]
            made = _update(m, v, group, *_corrections(step, group["betas"]))
            of_age = (c.to(m.dtype)[late.which] for c in _corrections(step - late.counts, group["betas"]))
            values = key.detach().view(-1)
            values.index_copy_(0, late.index, values[late.index] - (_update(m, v, group, *of_age) - made))

    def _stepping(self, optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], Tensor, _Late]]:
        """Return the tensors with late elements that this step updates, each with its group."""
        return [
            (group, key, self._late[key])
            for group in optimizer.param_groups
            for key in group["params"]
            if key in self._late and key.grad is not None
        ]


_OF_OPTIMIZERS: WeakKeyDictionary[torch.optim.Optimizer, LateStarts] = WeakKeyDictionary()


def late_starts(optimizer: torch.optim.Optimizer) -> LateStarts:
    """Return an optimizer's late elements; from the first call on its steps heed them."""
    if optimizer not in _OF_OPTIMIZERS:
        found = _OF_OPTIMIZERS[optimizer] = LateStarts()
        optimizer.register_step_pre_hook(found.before_step)
        optimizer.register_step_post_hook(found.after_step)
    return _OF_OPTIMIZERS[optimizer]


def _nothing_late(key: Tensor) -> _Late:
    places = torch.empty(0, dtype=torch.int64, device=key.device)
    return _Late(places, places.int(), places.double(), places)


def _names(state: State) -> tuple[str, str]:
    return next(names for names in MOMENTS if names[0] in state)


def _is_rounded(state: State) -> bool:
    return not state[_names(state)[0]].is_floating_point()


def _corrections(count: Any, betas: tuple[float, float]) -> tuple[Any, Any]:
    """Return what the first moment and the root of the second are divided by after so many steps."""
    return 1 - betas[0] ** count, (1 - betas[1] ** count) ** 0.5


def _update(m: Tensor, v: Tensor, group: dict[str, Any], first: Any, second: Any) -> Tensor:
    """Return what is subtracted for these moments and corrections, without weight decay."""
    update: Tensor = group["lr"] * (m / first) / (v.sqrt() / second + group["eps"])
    return update


def _moments(key: Tensor, state: State, late: _Late, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return both moments of a tensor's late elements after the step."""
    if late.before is None:
        first, second = (state[name].view(-1) for name in _names(state))
        places = late.index.to(first.device)  # bitsandbytes' pages are the host's
        return first[places].to(key.device), second[places].to(key.device)
    # The optimizer computed with these, and rounded them only to keep them. A second moment may be rounded to zero.
    assert key.grad is not None
    (m, v), gradient = late.before, key.grad.view(-1)[late.index].to(key.dtype)
    late.before = None
    return m.lerp(gradient, 1 - betas[0]), v.lerp(gradient.square(), 1 - betas[1])


def _clear_due(late: _Late, state: State) -> None:
    """Set to zero what is due, if it is in memory: what DeepSpeed has swapped to a disk is empty until the step."""
    if len(late.to_clear) and all(state[name].numel() for name in _names(state)):
        _clear(state, late.to_clear)
        late.to_clear = late.to_clear[:0]


def _clear(state: State, index: Tensor) -> None:
    for name in _names(state):
        if _is_rounded(state):
            clear_moment(state, name, index)
        else:
            state[name].view(-1).index_fill_(0, index.to(state[name].device), 0)
