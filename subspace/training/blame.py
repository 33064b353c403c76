"""Where a loss that is not finite comes from: a frozen weight, or a layer's output for a row.

The adapters are looked at by :mod:`subspace.training.health_checks`, but a NaN that they did not make is in their
gradients, too, so they are the last to be blamed. All of this takes minutes in a large model, and a run that ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from subspace.adapters.base import Adapter
from subspace.adapters.inject import adapters, trained_parameters
from subspace.common.patching import patched
from subspace.data.dataset import Data
from subspace.data.sampler import StepPlan
from subspace.distributed.collectives import broadcast_object, gather_objects
from subspace.distributed.zero import gathered
from subspace.models.bitsandbytes_compat import int8_tensors, scale_tensors
from subspace.models.lm_head import SummedLoss


class LossTrace:
    """Finds what makes the loss of a step not finite, between two steps. Collective over ranks.

    Args:
        engine: DeepSpeed's.
        summed_loss: of the engine's model.
        data: the rows.
        plan: the rows of each step.
    """

    def __init__(self, engine: Any, summed_loss: SummedLoss, data: Data, plan: StepPlan) -> None:
        self.engine, self.summed_loss, self.data, self.plan = engine, summed_loss, data, plan

    def bad_frozen_weight(self) -> str | None:
        """Return a sentence on the first frozen tensor with a value that is not finite; None if there is none.

        Infinity in a buffer may be meant, as in a mask.
        """
        model, found = self.engine.module, list[str]()
        trained = {id(parameter) for parameter in trained_parameters(model).values()}
        for name, parameter in model.named_parameters():
            if id(parameter) not in trained:
                with gathered([parameter]):
                    bad = sum(map(_not_finite, [parameter.detach(), *scale_tensors(parameter)]))
                    size = parameter.numel()
                found += [_describe(self._name(name), bad, size)] if bad else []
        for name, module in model.named_modules():
            bad = sum(map(_not_finite, int8_tensors(getattr(module, "state", None))))
            found += [_describe(f"{self._name(name)}.weight", bad, None)] if bad else []
        for name, buffer in model.named_buffers():
            bad = int(buffer.isnan().sum()) if buffer.is_floating_point() else 0
            found += [_describe(self._name(name), bad, buffer.numel())] if bad else []
        everywhere = gather_objects(found[:1])
        return next((first[0] for first in everywhere if first), None)

    def bad_output(self, step: int, *, without_adapters: bool = False) -> str | None:
        """Return a sentence on the first layer whose output is not finite, and for which row of a step; None if none.

        The rows run one by one, without dropout, with the adapters as they are now. Or ``without_adapters``, where
        that is possible: where these stand beside layers that are not trained.
        """
        bypassed = list(adapters(self.engine.module).values()) if without_adapters else []
        if not all(map(_can_be_bypassed, bypassed)):
            return None
        self.engine.eval()
        with ExitStack() as stack:
            for adapter in bypassed:
                stack.enter_context(patched(adapter, "forward", adapter.base.__call__))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for row in self.plan[step - 1]:
                if not self._is_finite(row):
                    with _first_bad_module(self.engine.module) as modules:
                        self._is_finite(row)
                    return str(broadcast_object(self._sentence(modules, row)))
        return None

    def rows(self, step: int) -> str:
        """Return the places of a step's rows, the first of them."""
        rows = self.plan[step - 1]
        more = f" and {len(rows) - 4:,} more" if len(rows) > 4 else ""
        return "; ".join(map(self.data.where, rows[:4])) + more

    def _is_finite(self, row: int) -> bool:
        batch = self.data.batch([row], one_sequence=self.summed_loss.one_sequence)
        finite = bool(torch.isfinite(self.summed_loss(batch.to(self.engine.device))))
        return all(gather_objects(finite))  # the same for all, so that all go on with the same row

    def _sentence(self, modules: Sequence[str], row: int) -> str:
        where = f"for {self.data.where(row)}"
        if not modules:
            return f"the loss itself is the first that is not finite, {where}"
        name = modules[0]
        adapter = adapters(self.engine.module).get(name)
        layer = f"method {adapter.name} at {name}" if adapter else f"the frozen {self._name(name)}"
        return f"the output of {layer} is the first that is not finite, {where}"

    def _name(self, name: str) -> str:
        """Return the name that a module or tensor has in the model without adapters."""
        sites = adapters(self.engine.module)
        return re.sub(r"^(.+?)\.base(?=\.|$)", lambda found: found[1] if found[1] in sites else found[0], name)


def _can_be_bypassed(adapter: Adapter) -> bool:
    return adapter.site in ("linear", "sublayer") and not any(p.requires_grad for p in adapter.base.parameters())


def _not_finite(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0


def _describe(name: str, bad: int, size: int | None) -> str:
    of = f" of {size:,}" if size else ""
    return f"the frozen {name} holds {bad:,}{of} values that are not finite, so the base model is damaged"


@contextmanager
def _first_bad_module(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of the modules whose output is not finite, in the order in which they return it."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        values = output if isinstance(output, tuple | list) else (output,)
        if any(isinstance(value, Tensor) and _not_finite(value) for value in values):
            found.append(name)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            handle = module.register_forward_hook(lambda module, inputs, output, name=name: look(name, output))
            stack.callback(handle.remove)
        yield found
