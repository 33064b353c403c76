"""Base of the bottleneck adapters: an MLP after a sub-layer, with a residual connection."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import TypeVar

from subspace.adapters.base import MethodConfig, SublayerAdapter
from subspace.common.settings import MOST_RANK, setting

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}
NUM_PARAMS = "2 * bottleneck * n_out + bias * (bottleneck + n_out)"


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(MethodConfig):
    """Settings shared by the bottleneck adapters."""

    bottleneck: int = setting(64, "width b of the bottleneck", min=1, max=MOST_RANK)
    activation: str = setting("relu", "the nonlinearity f", choices=tuple(ACTIVATIONS))
    bias: bool = setting(True, "train the biases c and e")
    scale: float = setting(1.0, "scaling factor s of the adapter's output")
    start: str = setting(
        "zero", "initialisation: U at zero, or D and U Gaussian near zero", choices=("zero", "gaussian")
    )


C = TypeVar("C", bound=BottleneckConfig, default=Any)


class BottleneckAdapter(SublayerAdapter[C]):
    """``h' = h + s (U f(D h + c) + e)`` for what the sub-layer returns, h ``(..., out)``."""

    size_setting: ClassVar = "bottleneck"
    roles: ClassVar = {"D": "down", "U": "up", "c": "bias", "e": "bias"}

    def __init__(self, base: nn.Module, config: C) -> None:
        super().__init__(base, config)
        self.f = ACTIVATIONS[config.activation]
        self.D = nn.Parameter(torch.empty(config.bottleneck, self.out_features))
        self.U = nn.Parameter(torch.zeros(self.out_features, config.bottleneck))
        self.c = nn.Parameter(torch.zeros(config.bottleneck)) if config.bias else None
        self.e = nn.Parameter(torch.zeros(self.out_features)) if config.bias else None
        if config.start == "gaussian":  # as BERT's layers start, which the published implementations take
            nn.init.normal_(self.D, std=0.02)
            nn.init.normal_(self.U, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))
        self.residual: ResidualStream | None = None  # which the network reads besides h, if set

    def detach(self) -> None:
        if self.residual is not None:
            self.residual.remove()

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.base(x)
        read = h if self.residual is None else h + self.residual.take().reshape(h.shape)
        c, e = (None if getattr(self, name) is None else self.in_dtype(name, h.dtype) for name in ("c", "e"))
        update = F.linear(self.f(F.linear(read, self.in_dtype("D", h.dtype), c)), self.in_dtype("U", h.dtype), e)
        return h + update * float(self.config.scale)


class ResidualStream:
    """The hidden states that an MLP's output is added to, caught by hooks while their decoder layer runs.

    They are what entered the norm whose output enters the MLP; where no norm stands before the MLP (OLMo 2), what
    enters the MLP.
    """

    def __init__(self, model: nn.Module, site: nn.Module) -> None:
        """Find the decoder layer round a site and hook its parts."""
        path = _path_to(model, site)
        inside = next(
            at for at in reversed(range(len(path) - 1)) if any(_is_norm(part) for part in path[at].children())
        )
        layer, block = path[inside], path[inside + 1]
        #: Where each norm's output lies, and what entered the norm. Addresses, since ZeRO-3's hooks make aliases.
        self.norms: list[tuple[int, Tensor]] = []
        self.value: Tensor | None = None
        self.hooks = [part.register_forward_hook(self._leave_norm) for part in layer.children() if _is_norm(part)]
        if block is not site:  # else the last norm is the one before the MLP, whose parts are the layer's own (OPT)
            self.hooks.append(block.register_forward_pre_hook(self._enter_block))
        self.hooks.append(layer.register_forward_hook(self._leave_layer))

    def take(self) -> Tensor:
        """Return the hidden states, ``(..., width)``, once in a pass of the layer."""
        value = self.norms[-1][1] if self.value is None else self.value
        self.norms, self.value = [], None
        return value

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()

    def _leave_norm(self, norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.norms.append((output.data_ptr(), args[0]))

    def _enter_block(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        entered = [before for at, before in self.norms if at == args[0].data_ptr()]
        self.norms, self.value = [], entered[-1] if entered else args[0]

    def _leave_layer(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.norms, self.value = [], None  # what the norms after the MLP left


def _path_to(model: nn.Module, site: nn.Module) -> list[nn.Module]:
    """Return the modules from the model down to one of its parts."""
    name = next(name for name, module in model.named_modules() if module is site)
    path = [model]
    for part in name.split("."):
        path.append(getattr(path[-1], part))
    return path


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
