"""What a method is: the contract that every file in ``subspace/methods`` fulfils, and the register of them.

A method is an ``nn.Module`` that takes the place of a frozen module of the model and keeps it as its child ``base``.
There are three kinds, by what they wrap: a linear layer (:class:`LinearAdapter`, the one most methods are), the
linear layer that ends a sub-layer (:class:`SublayerAdapter`), and a whole attention (:class:`AttentionAdapter`).

A method declares its tensors in ``__init__``; nothing is created later. What its start needs of W, it takes in
:meth:`Adapter.start`. What changes with the optimizer's steps, it does in :meth:`Adapter.before_step` and
:meth:`Adapter.after_step`. It knows neither DeepSpeed nor bitsandbytes nor transformers.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.base import frozen_weight
from subspace.errors import UserError, nearest
from subspace.settings import Settings

ROLES = {
    "down": "first factor, from the layer's input",
    "up": "last factor, to the layer's output; LoRA+ trains it faster",
    "core": "between the factors",
    "scale": "multiplies what is there; starts at one or at a norm",
    "bias": "is added as it is",
    "prompt": "virtual tokens, keys or values",
}
SITES = ("linear", "sublayer", "attention")
FAMILIES = ("reconstruction", "extension", "combination")


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Settings):
    """Base of every method's settings."""


@dataclass(frozen=True)
class Clock:
    """Where the run is, counted in optimizer steps: ``step`` is 1 for the first of ``steps``."""

    step: int
    steps: int

    def through(self, warm_up: float, cool_down: float) -> float:
        """Return how much of the run's middle has passed: at most 0 in its first share, above 1 in its last."""
        first, last = int(warm_up * self.steps), self.steps - int(cool_down * self.steps)
        return (self.step - first) / max(1, last - first)


class Access(Protocol):
    """How a schedule reads and changes trained tensors, whatever holds them. Collective over ranks."""

    def grad(self, parameter: nn.Parameter) -> Tensor: ...
    def value(self, parameter: nn.Parameter) -> Tensor: ...
    def write(self, parameter: nn.Parameter, value: Tensor) -> None: ...


class Adapter(nn.Module):
    """One method's tensors at one place of the model."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    name: ClassVar[str]
    family: ClassVar[str]
    trains: ClassVar[str]
    site: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    #: Each trained tensor's role: it decides weight decay and LoRA+'s learning rate.
    roles: ClassVar[Mapping[str, str]]
    mergeable: ClassVar[bool] = True
    #: Whether the model computes the same before the first step as without the adapter.
    starts_as_frozen: ClassVar[bool] = True

    base: Any  # the frozen module, of whatever class the model or bitsandbytes made it
    config: Any  # an instance of the method's own Config

    def __init__(self, base: nn.Module, config: Any) -> None:
        super().__init__()
        self.base = base
        self.config = config
        self.num_siblings = 1  # adapters of this method in the model, itself included; set by inject
        #: What a schedule remembers from step to step. Saved with checkpoints; no buffer, because engines cast those.
        self.history: dict[str, Tensor] = {}
        if type(self).penalty is not Adapter.penalty:
            self.register_forward_hook(_charge_penalty)

    def start(self, W: Tensor) -> None:
        """Set initial values that depend on the frozen W, ``(out, in)``, float32. Called once; default: nothing."""

    def penalty(self) -> Tensor:
        """Return this adapter's share of a term to add to the loss. Default: none is added."""
        raise NotImplementedError

    @classmethod
    def before_step(cls, adapters: Sequence[Self], clock: Clock, access: Access) -> None:
        """Act between the step's last backward pass and the optimizer. Default: nothing."""

    @classmethod
    def after_step(cls, adapters: Sequence[Self], clock: Clock, access: Access) -> None:
        """Act after the optimizer has moved the tensors. Default: nothing."""

    def get_extra_state(self) -> dict[str, Tensor]:
        return self.history

    def set_extra_state(self, state: Any) -> None:
        self.history = dict(state)

    def own_tensors(self) -> dict[str, Tensor]:
        """Return this adapter's trained tensors and persistent buffers, without its base's."""
        buffers = {k: b for k, b in self.named_buffers(recurse=False) if k not in self._non_persistent_buffers_set}
        return {**self.trained(), **buffers}

    def trained(self) -> dict[str, nn.Parameter]:
        """Return this adapter's trained tensors by their names in the class."""
        return dict(self.named_parameters(recurse=False))

    def extra_repr(self) -> str:
        return str(self.config)


class LinearAdapter(Adapter):
    """A method at a linear layer, told by the weight that replaces W."""

    site = "linear"

    def __init__(self, base: nn.Module, config: Any) -> None:
        super().__init__(base, config)
        self.in_features: int = self.base.in_features
        self.out_features: int = self.base.out_features

    def weight(self, W: Tensor) -> Tensor:
        """Return the weight that replaces W; both ``(out, in)``. This is the paper's equation."""
        raise NotImplementedError

    def bias(self, b: Tensor | None) -> Tensor | None:
        """Return the bias that replaces b; both ``(out,)`` or None."""
        return b

    def base_bias(self) -> Tensor | None:
        """Return the frozen bias, ``(out,)``, or None."""
        bias: Tensor | None = self.base.bias
        return bias

    def frozen(self, x: Tensor) -> Tensor:
        """Return what the frozen layer makes of x, ``(..., in) -> (..., out)``: W x + b."""
        out: Tensor = self.base(x)
        return out

    def product(self, x: Tensor) -> Tensor:
        """Return W x, ``(..., in) -> (..., out)``, without the frozen bias."""
        bias = self.base_bias()
        return self.frozen(x) if bias is None else self.frozen(x) - bias

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``. Methods override it with a cheaper form of the same function."""
        W = frozen_weight(self.base)
        b = self.bias(self.base_bias())
        return F.linear(x, self.weight(W).to(x.dtype), None if b is None else b.to(x.dtype))


class SublayerAdapter(Adapter):
    """A method at the linear layer that ends an attention or an MLP, so that it sees what enters the residual stream.

    Where a norm stands between that layer and the residual addition (Gemma 2 and 3), the adapter comes before the norm.
    """

    site = "sublayer"
    mergeable = False

    def __init__(self, base: nn.Module, config: Any) -> None:
        super().__init__(base, config)
        self.in_features: int = self.base.in_features
        self.out_features: int = self.base.out_features


class AttentionAdapter(Adapter):
    """A method that lets every query of an attention see further keys and values, from :meth:`prefix`.

    The keys join after the rotary embedding, so they carry none, and real tokens keep their positions. It works with
    any decoder of transformers that hands its keys to ``past_key_values.update`` and masks with a 4-d mask (``sdpa``
    and ``eager``), with gradient checkpointing and with a key-value cache.
    """

    site = "attention"
    mergeable = False
    starts_as_frozen = False

    def __init__(self, base: nn.Module, config: Any) -> None:
        super().__init__(base, config)
        kind = self.base.config._attn_implementation
        if kind not in ("sdpa", "eager"):
            raise UserError(
                f"method {self.name} was asked for with `attention: {kind}`, which cannot show a prefix to every "
                "query. Set `model.attention: sdpa`"
            )
        self.num_kv_heads: int = self.base.config.num_key_value_heads
        self.head_dim: int = self.base.head_dim

    def prefix(self) -> tuple[Tensor, Tensor]:
        """Return the keys and the values that precede the real ones, each ``(kv_heads, n, head_dim)``."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, **context: Any) -> Any:
        """Run the frozen attention, whose mask and key-value cache are in ``context``, with the prefix in front."""
        cache = _PrefixedKeys(context.get("past_key_values"), *self.prefix())
        mask = context.get("attention_mask")
        if mask is None:
            mask = _causal_mask(hidden_states, context.get("past_key_values"), self.base.layer_idx)
        # A boolean mask marks what is seen; a float mask is added to the logits.
        seen = True if mask.dtype == torch.bool else 0.0
        mask = F.pad(mask, (cache.num_tokens, 0), value=seen)
        return self.base(hidden_states, **{**context, "past_key_values": cache, "attention_mask": mask})


class _PrefixedKeys:
    """Stands where an attention expects a key-value cache, and answers with the prefix in front of what that holds."""

    def __init__(self, cache: Any, keys: Tensor, values: Tensor) -> None:
        self.cache, self.keys, self.values = cache, keys, values
        self.num_tokens = keys.shape[-2]

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, layer, *args, **kwargs)
        rows = keys.shape[0]
        return (
            torch.cat([self.keys.to(keys.dtype).expand(rows, -1, -1, -1), keys], dim=-2),
            torch.cat([self.values.to(values.dtype).expand(rows, -1, -1, -1), values], dim=-2),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _causal_mask(hidden_states: Tensor, cache: Any, layer: int) -> Tensor:
    """Return the boolean mask, ``(1, 1, queries, keys)``, that transformers leaves out where a kernel implies it."""
    queries = hidden_states.shape[1]
    past = cache.get_seq_length(layer) if cache is not None else 0
    ones = torch.ones(queries, past + queries, dtype=torch.bool, device=hidden_states.device)
    return ones.tril(diagonal=past)[None, None]


# A penalty is charged where the adapter runs, because only there does ZeRO-3 hold its tensors whole, and once per
# backward pass also when activations are recomputed. Its gradient must carry the factors that the engine puts on the
# loss (loss scale, 1 / accumulation). Those factors are the gradient that arrives at the loss itself, which is
# computed before any other.
_gradient_at_loss: list[Tensor] = []


class _LossTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        _gradient_at_loss[:] = [gradients[0].detach()]
        return gradients[0]


class _Charge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, penalty: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        factor = _gradient_at_loss[0] if _gradient_at_loss else torch.ones((), device=gradients[0].device)
        return gradients[0], factor.to(torch.float32)


def with_penalties(loss: Tensor) -> Tensor:
    """Return the loss, by whose own gradient the adapters' penalties will scale theirs. Its value is unchanged.

    A loop that scales its loss, for accumulation or float16, needs this where a method has a penalty.
    """
    tapped: Tensor = _LossTap.apply(loss)  # type: ignore[no-untyped-call]
    return tapped


def _charge_penalty(adapter: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    if not (adapter.training and torch.is_grad_enabled()):
        return output
    assert isinstance(adapter, Adapter)
    charged: Tensor = _Charge.apply(output, adapter.penalty())  # type: ignore[no-untyped-call]
    return charged


_register: dict[str, type[Adapter]] = {}
_Class = TypeVar("_Class", bound=type[Adapter])


def register(name: str, *, family: str, trains: str, aliases: Sequence[str] = ()) -> Callable[[_Class], _Class]:
    """Enter a method's class into the register.

    ``trains`` is the number of trained values at one site as an expression over the method's settings and ``n_in``,
    ``n_out`` (the layer's features) or ``n_kv`` (key-value heads times head dimension, at an attention).
    """
    assert family in FAMILIES, family

    def enter(cls: _Class) -> _Class:
        cls.name, cls.family, cls.trains, cls.aliases = name, family, trains, tuple(aliases)
        _register[name] = cls
        return cls

    return enter


def methods() -> dict[str, type[Adapter]]:
    """Return every method by name. A file of ``subspace.methods`` registers what it defines when it is imported."""
    package = importlib.import_module("subspace.methods")  # subspace.methods is this function

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_register.items()))


def find_method(name: str) -> type[Adapter]:
    """Return the method of this name or alias, in any letter case and with ``_`` for ``-``."""
    known = methods()
    by_alias = {alias.casefold(): cls for cls in known.values() for alias in (cls.name, *cls.aliases)}
    try:
        return by_alias[name.casefold().replace("_", "-")]
    except KeyError:
        raise UserError(f"no method is called '{name}'. {nearest(name, known)}") from None


def configure(cls: type[Adapter], settings: Mapping[str, Any]) -> MethodConfig:
    """Build a method's Config from a mapping; unknown keys are refused with the nearest known one."""
    import dataclasses

    known = [field.name for field in dataclasses.fields(cls.Config)]
    for key in settings:
        if key not in known:
            raise UserError(f"method {cls.name} has no setting '{key}'. {nearest(key, known)}")
    return cls.Config(**settings)
