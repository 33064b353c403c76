"""Stacks of experts' matrices as sites: a parameter ``(experts, out, in)`` of a mixture, each matrix a linear layer's.

A site is the parameter, under its name in the model: ``model.layers.0.mlp.experts.gate_up_proj``. An adapter is a
module and takes the parameter's place; what it wraps is an :class:`ExpertWeight`, which holds the parameter and knows
where that belongs. Some architectures (gpt-oss, Llama 4) store the matrices transposed, ``(experts, in, out)``.

bitsandbytes quantises linear layers. A stack is none, and stays in the dtype in which the model was opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from subspace.distributed.zero import full_shape
from subspace.models.transformers_compat import experts_are_transposed

#: The parameters that are stacks of matrices, by the names that experts' classes give them.
STACKS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ExpertWeight(nn.Module):
    """A frozen stack of matrices that a module of experts holds as a parameter.

    Attributes:
        weight: the parameter, ``(experts, out, in)``, or ``(experts, in, out)`` if ``transposed``.
    """

    bias = None  # a bias of the experts is added by their own code

    def __init__(self, experts: nn.Module, name: str, *, transposed: bool) -> None:
        super().__init__()
        self.weight: nn.Parameter = getattr(experts, name)
        self.transposed = transposed
        self.num_experts, rows, columns = full_shape(self.weight)
        self.out_features, self.in_features = (columns, rows) if transposed else (rows, columns)
        self._holder = (experts,)  # in a tuple, or torch would take it for a part
        self._name, self._order = name, [key for key, _ in experts.named_parameters(recurse=False)]

    @property
    def experts(self) -> nn.Module:
        """The module whose parameter this is."""
        return self._holder[0]

    def matrices(self) -> Tensor:
        """Return the stack with every matrix ``(out, in)``, without a copy."""
        return self.weight.mT if self.transposed else self.weight

    def restore(self) -> None:
        """Put the parameter back in its place, among the others in their order."""
        self._register(self._name, self.weight)
        others = dict(self.experts.named_parameters(recurse=False))
        for key in self._order[self._order.index(self._name) + 1 :]:
            if key in others:
                self._register(key, others[key])

    def _register(self, key: str, parameter: nn.Parameter) -> None:
        delattr(self.experts, key)
        self.experts.register_parameter(key, parameter)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"


def expert_weights(module: nn.Module) -> Iterator[tuple[str, ExpertWeight]]:
    """Yield the stacks that are parameters of a module itself, by their names in it."""
    own: dict[str, Any] = dict(module.named_parameters(recurse=False))
    stacks = {key: p for key, p in own.items() if key in STACKS and len(full_shape(p)) == 3 and p.dtype in FLOATING}
    if not stacks:
        return
    transposed = experts_are_transposed(module, {key: tuple(full_shape(p)) for key, p in stacks.items()})
    if transposed is not None:
        for key in stacks:
            yield key, ExpertWeight(module, key, transposed=transposed)


def stacks_of_experts(model: nn.Module) -> Iterator[ExpertWeight]:
    """Yield all stacks of a model, those that adapters wrap included."""
    for module in model.modules():
        if isinstance(module, ExpertWeight):
            yield module
        else:
            yield from (stack for _, stack in expert_weights(module))


def dtype_of_experts(model: nn.Module) -> str:
    """Return the name of the dtype of a mixture's stacks; "" for a model that has none."""
    return next((str(stack.weight.dtype).removeprefix("torch.") for stack in stacks_of_experts(model)), "")


def replace_site(model: nn.Module, site: str, module: nn.Module) -> None:
    """Put a module in the place of the one at a site; of a stack of experts' matrices, its parameter."""
    if isinstance(module, ExpertWeight):
        module.restore()
        return
    path, _, name = site.rpartition(".")
    holder = model.get_submodule(path)
    if name in dict(holder.named_parameters(recurse=False)):  # which torch does not let a module replace
        delattr(holder, name)
    setattr(holder, name, module)
