"""The contract of a method, which every file in ``subspace/methods`` fulfils.

A method is an ``nn.Module`` that takes the place of a frozen module of the model and keeps it as its child ``base``.
There are several kinds, by what they wrap: a linear layer (:class:`LinearAdapter`, the one most methods are), the
linear layer that ends a sub-layer (:class:`SublayerAdapter`), a whole attention or the token embedding
(``virtual_tokens``). What the other families share lies in ``low_rank``, ``singular_values`` and ``bottleneck``.

A method declares its tensors in ``__init__``; nothing is created later. What its start needs of W, it takes in
:meth:`Adapter.start`. What changes with the optimizer's steps, it does in :meth:`Adapter.before_step` and
:meth:`Adapter.after_step`. It knows neither DeepSpeed nor bitsandbytes nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import TypeVar

from subspace.adapters.penalties import LossTap, charge_penalty
from subspace.common.settings import Settings
from subspace.kernels.working_copies import WorkingCopies
from subspace.models.frozen_weights import as_stored, dequantized_weight, gather_weight_fp32, layer_sizes

Role = Literal["down", "up", "core", "scale", "bias", "prompt", "weight"]
Site = Literal["linear", "sublayer", "attention", "mlp", "embedding", "module"]
Family = Literal["reconstruction", "extension", "combination", "reference"]
WeightAccess = Literal["nothing", "row norms", "largest", "smallest", "spectrum", "late", "values", "rows"]

ROLES: Mapping[Role, str] = {
    "down": "first factor, from the layer's input",
    "up": "last factor, to the layer's output; LoRA+ trains it faster",
    "core": "between the factors",
    "scale": "multiplies what is there; starts at one or at a norm",
    "bias": "is added as it is",
    "prompt": "virtual tokens, keys or values",
    "weight": "a matrix of the model itself",
}
COPIED_ROLES: frozenset[Role] = frozenset({"down", "up", "core", "scale", "bias"})
SITES: tuple[Site, ...] = get_args(Site)
FAMILIES: tuple[Family, ...] = get_args(Family)
WEIGHT_ACCESS: Mapping[WeightAccess, str] = {
    "nothing": "W only to merge",
    "row norms": "the lengths of W's rows, once",
    "largest": "W's largest singular vectors, once; those of a quantised W will do",
    "smallest": "W's smallest singular vectors, once, from the unquantised checkpoint",
    "spectrum": "all singular vectors of W, once",
    "late": "all singular vectors of W at one step of the run, from the unquantised checkpoint",
    "values": "the values of W in every pass",
    "rows": "some rows of the embedding, once",
}


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Settings):
    """Base of every method's settings."""


#: How the names begin under which a ``state_dict`` holds what schedules remember.
HISTORY = "history."

#: A method's own Config: ``class Mine(LinearAdapter["Mine.Config"])`` types ``self.config``.
C = TypeVar("C", bound=MethodConfig, default=Any)


@dataclass(frozen=True)
class TrainProgress:
    """Progress of a run in optimizer steps: ``step`` is 1 for the first of ``steps``."""

    step: int
    steps: int

    def fraction(self, warm_up: float, cool_down: float) -> float:
        """Return how much of the run's middle has passed: at most 0 in its first share, above 1 in its last."""
        first, last = int(warm_up * self.steps), self.steps - int(cool_down * self.steps)
        return (self.step - first) / max(1, last - first)


class OptimizerAccess(Protocol):
    """Access of a schedule to trained tensors, whatever ZeRO stage shards them. Collective over ranks.

    ``grads`` is ``grad`` for many tensors, in one collective. ``reset_optimizer_state`` lets the optimizer begin anew
    where ``where`` is true: for what a schedule clears, and for what has had no gradient until then.
    ``for_each_weight`` calls ``look`` with each adapter and its frozen W, float32, on one process each, and broadcasts
    the buffers it changed.
    """

    def grad(self, parameter: nn.Parameter) -> Tensor: ...
    def grads(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]: ...
    def value(self, parameter: nn.Parameter) -> Tensor: ...
    def write(self, parameter: nn.Parameter, value: Tensor) -> None: ...
    def reset_optimizer_state(self, parameter: nn.Parameter, where: Tensor) -> None: ...
    def for_each_weight(self, adapters: Sequence[Any], look: Callable[[Any, Tensor], None]) -> None: ...


class Adapter(nn.Module, Generic[C]):
    """One method's tensors at one place of the model."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    name: ClassVar[str]
    family: ClassVar[Family]
    num_params: ClassVar[str]
    site: ClassVar[Site]
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: Each trained tensor's role: it decides weight decay and LoRA+'s learning rate.
    roles: ClassVar[Mapping[str, Role]]
    #: Whether what it does at a site can be folded into the layer; an instance may know better.
    mergeable: bool = True
    #: Whether the model computes the same before the first step as without the adapter, and up to which part.
    identity_at_init: ClassVar[bool] = True
    identity_tolerance: ClassVar[float] = 0.0
    #: What it reads of W, a key of WEIGHT_ACCESS.
    weight_access: ClassVar[WeightAccess] = "nothing"
    #: The setting that makes the method larger or smaller, if it has one.
    size_setting: ClassVar[str | None] = None
    #: The tensor that multiplies the layer's input first, ``(r, in)``. Sites with the same input may share the product.
    input_factor: ClassVar[str | None] = None
    #: Buffers of a factor's size, which :meth:`in_dtype` is asked for.
    copied_buffers: ClassVar[Sequence[str]] = ()
    #: Settings with one value for all adapters of an injection, as a schedule's, so that no pattern may set them.
    whole_run: ClassVar[frozenset[str]] = frozenset()
    #: Trained tensors whose first gradient comes with a later step of a schedule.
    delayed_grad_params: ClassVar[frozenset[str]] = frozenset()

    #: How many matrices of the model it adapts: those of a stack of experts, else one.
    num_matrices: int = 1
    #: The share a of its update that is in force: W + a (W' - W) stands in the place of W'.
    update_scale: float = 1.0

    #: Frozen parameters of the base that the adapter holds in its place, by their names there.
    original_params: Mapping[str, nn.Parameter] = {}
    base: Any  # the frozen module, of whatever class the model or bitsandbytes made it
    config: C

    def __init__(self, base: nn.Module, config: C) -> None:
        super().__init__()
        self.base = base
        self.config = config
        self.group = 0  # which injection made it, and so whose schedule it follows; set by inject
        self.num_siblings = 1  # matrices that the injection adapts, its own included; set by inject
        self.loss_tap = LossTap()  # one for all adapters of the model; set by inject
        self.copies = WorkingCopies()  # one for all adapters of the model; set by inject
        self.scheduled = False  # somebody tells it of the optimizer's steps, or was told that nobody does
        self.ends_sublayer = False  # its input is not that of its module's other sites; set by inject
        #: What a schedule remembers from step to step. Saved with checkpoints, and in a ``state_dict`` under names that
        #: begin with ``HISTORY``; no buffers, because engines cast those.
        self.history: dict[str, Tensor] = {}
        #: The model's folder and W's name in it, where W is to be read there because the model holds it quantised.
        self.weight_source: tuple[str, str] | None = None
        #: What was computed from the trained tensors' present values. None where nobody promises to clear it when they
        #: move; the training loop does.
        self._cache: dict[Any, Tensor] | None = None
        self.register_state_dict_post_hook(_save_history)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_load_history)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_clear_cache)  # type: ignore[no-untyped-call]
        if type(self).penalty is not Adapter.penalty:
            self.register_forward_hook(_charge_penalty)

    @property
    def method_class(self) -> type[Adapter]:
        """The class of the method, which says what it is and acts for all of its adapters."""
        return type(self)

    def attach(self, model: nn.Module) -> None:
        """Register hooks on the surrounding model. Default: none."""

    def detach(self) -> None:
        """Remove the hooks of :meth:`attach`, before the frozen module takes its place back."""

    @classmethod
    def target_kind(cls, config: C) -> Site:
        """Return the kind of site that these settings ask for."""
        return cls.site

    @classmethod
    def default_targets(cls, config: C) -> Sequence[str] | None:
        """Return the targets where a user names none; None for those of the site's kind."""
        return None

    @classmethod
    def check_quantization(cls, config: C, storage: str) -> str | None:
        """Return why these settings cannot serve a W stored as ``4bit`` or ``int8``, and what can; None if they do."""
        return None

    @classmethod
    def settings_of_file(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the settings in a saved adapter as today's, where a setting is younger than the file."""
        return settings

    @classmethod
    def check_model(cls, model: nn.Module) -> str | None:
        """Return why the method does not fit a model, and what does; None where it fits."""
        return None

    @classmethod
    def check_module(cls, config: C, site: nn.Module) -> str | None:
        """Return why the method does not fit a module, and what would make it fit; None where it fits."""
        return None

    @classmethod
    def config_for(cls, config: C, name: str) -> C:
        """Return the settings for the site of this name, where they depend on it."""
        return config

    def init_from_weight(self, W: Tensor) -> None:
        """Set initial values that depend on the frozen W, ``(out, in)``, float32; called once. Default: nothing.

        One process calls it for each adapter; the others get its tensors.
        """

    def merged(self) -> dict[str, Tensor | None]:
        """Return the tensors that, in place of the base's of these names, make it compute what the adapter does."""
        raise NotImplementedError

    def scale_update(self, scale: float) -> None:
        """Let a share of the update be in force, from here on. A method that can be merged knows how."""
        self.update_scale = scale

    def penalty(self) -> Tensor | None:
        """Return this adapter's share of a term to add to the loss. Default: none is added."""
        return None

    @classmethod
    def before_step(cls, adapters: Sequence[Self], progress: TrainProgress, access: OptimizerAccess) -> None:
        """Act between the step's last backward pass and the optimizer. Default: nothing."""

    @classmethod
    def after_step(cls, adapters: Sequence[Self], progress: TrainProgress, access: OptimizerAccess) -> None:
        """Act after the optimizer has moved the tensors. Default: nothing."""

    def own_tensors(self) -> dict[str, Tensor]:
        """Return this adapter's trained tensors and persistent buffers, without its base's."""
        buffers = {k: b for k, b in self.named_buffers(recurse=False) if k not in self._non_persistent_buffers_set}
        return {**self.trained(), **buffers}

    def trained(self) -> dict[str, nn.Parameter]:
        """Return this adapter's trained tensors by their names in the class."""
        return {name: p for name, p in self.named_parameters(recurse=False) if name in self.roles}

    def in_dtype(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return an own tensor in the dtype of the layer's input: a cast, or where all are cast by one call, its."""
        tensor: Tensor = getattr(self, name)
        if tensor.dtype == dtype or torch.compiler.is_compiling():
            return tensor.to(dtype)
        copy = self.copies.get(self, name, tensor, dtype)
        return tensor.to(dtype) if copy is None else copy

    def copied_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that :meth:`in_dtype` is asked for in a forward pass, all small, by their names."""
        trained = {name: p for name, p in self.trained().items() if self.roles[name] in COPIED_ROLES}
        return {**trained, **{name: getattr(self, name) for name in self.copied_buffers}}

    def idle_params(self) -> int:
        """Return how many numbers of its trained tensors have no part in what it computes, and so do not count."""
        return 0

    def input_dropout(self) -> float:
        """Return the probability with which this site drops values of its input, by a mask of its own."""
        return float(getattr(self.config, "dropout", 0.0)) if self.training else 0.0

    def cached(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Return what ``compute`` gives for the trained tensors' present values, from memory where that is safe."""
        cache = self._cache
        if cache is None and not any(p.requires_grad for p in self.trained().values()):
            cache = self._cache = {}  # a loaded adapter that nobody trains
        if cache is None:
            return compute()
        if key not in cache:
            cache[key] = compute()
        return cache[key]

    def clear_cache(self) -> None:
        """Drop what :meth:`cached` holds. Whoever moves the trained tensors promises to call it after each move."""
        self._cache = {}

    def extra_repr(self) -> str:
        return str(self.config)


def _save_history(adapter: Adapter, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state.update({f"{prefix}{HISTORY}{key}": value for key, value in adapter.history.items()})


def _load_history(
    adapter: Adapter, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *others: Any
) -> None:
    """Take the history out of a ``state_dict``, in which torch would find no place for it."""
    older = state.pop(f"{prefix}_extra_state", {})  # one dictionary, which most writers of tensors refuse
    for key, own in adapter.history.items():
        name = f"{prefix}{HISTORY}{key}"
        value = state.pop(name, older.get(key))
        if value is None:
            missing.append(name)
        elif value.shape != own.shape:
            others[-1].append(f"size mismatch for {name}: {tuple(value.shape)}, the model takes {tuple(own.shape)}")
        else:
            adapter.history[key] = value.detach().clone()


def _clear_cache(adapter: nn.Module, keys: Any) -> None:
    if adapter._cache:
        adapter._cache.clear()  # type: ignore[operator, union-attr]


def _charge_penalty(adapter: Adapter, inputs: Any, output: Tensor) -> Tensor:
    if not (adapter.training and torch.is_grad_enabled()):
        return output
    penalty = adapter.penalty()
    return output if penalty is None else charge_penalty(output, penalty, adapter.loss_tap)


def _scale_output(adapter: LinearAdapter, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return what W + a (W' - W) gives, to which a linear layer's output is as far on the way as its weight."""
    return torch.lerp(adapter.frozen(*inputs), output, adapter.update_scale)


class LinearAdapter(Adapter[C]):
    """A method at a linear layer, defined by the weight that replaces W."""

    site = "linear"
    _scales_output = False  # once it has been asked for a share of its update

    def __init__(self, base: nn.Module, config: C) -> None:
        super().__init__(base, config)
        self.in_features, self.out_features = layer_sizes(self.base)

    def weight(self, W: Tensor) -> Tensor:
        """Return the weight that replaces W; both ``(out, in)``. This is the paper's equation."""
        raise NotImplementedError

    def bias(self, b: Tensor | None) -> Tensor | None:
        """Return the bias that replaces b; both ``(out,)`` or None."""
        return b

    def to_lora(self) -> tuple[Tensor, Tensor] | None:
        """Return ``A (q, in)`` and ``B (out, q)`` with ``W' = W + B A`` where the update is exactly that, else None."""
        return None

    def merged(self) -> dict[str, Tensor | None]:
        W, b = gather_weight_fp32(self.base), self.base_bias()
        assert W is not None
        return {"weight": as_stored(self.base, self.weight(W)), "bias": self.bias(None if b is None else b.float())}

    def scale_update(self, scale: float) -> None:
        super().scale_update(scale)
        if not self._scales_output:
            self.register_forward_hook(_scale_output)
            self._scales_output = True

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
        W = dequantized_weight(self.base)
        b = self.bias(self.base_bias())
        return F.linear(x, self.weight(W).to(x.dtype), None if b is None else b.to(x.dtype))


class SublayerAdapter(Adapter[C]):
    """A method at the linear layer that ends an attention or an MLP, so that it sees what enters the residual stream.

    Where a norm stands between that layer and the residual addition (Gemma 2 and 3), the adapter comes before the norm.
    """

    site = "sublayer"
    mergeable = False

    def __init__(self, base: nn.Module, config: C) -> None:
        super().__init__(base, config)
        self.in_features, self.out_features = layer_sizes(self.base)
