"""Target modules: the search for the sites of a method in a model, and how much of the model they reach.

A *site* is a module that an adapter can wrap. There are six kinds:

=============  =====================================================================================================
``linear``     a linear layer, or a mixture's stack of experts' matrices, chosen by ``targets``
``sublayer``   the linear that ends a sub-layer (attention or MLP); what it returns is what the sub-layer returns
``attention``  a whole attention module, whose keys and values a method may extend
``mlp``        a whole feed-forward block
``embedding``  the token embedding
``module``     whatever holds values of its own: linear layers, norms, embedding, head
=============  =====================================================================================================

Sites are looked for in the text decoder and its head, not in the towers of a model that sees or hears. Nothing else in
the project names a module of a model. The usual names are LLaMA's; what other architectures call the same part, or fuse
into one linear layer, answers to the usual name too, so that ``targets: [q_proj, up_proj]`` means the same everywhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from subspace.common.foreign.limits import limited
from subspace.common.synonyms import hint
from subspace.errors import UserError, shown
from subspace.models.experts.weights import ExpertWeight, expert_weights
from subspace.models.frozen_weights import is_linear, is_matrix, num_parameters
from subspace.models.transformers_compat import bypassed_layers, is_router

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
#: The target that means every linear layer but the head, and every expert.
ALL_LINEAR = "all-linear"
#: LLaMA's linear layers of attention and MLP.
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
#: The usual names that a linear layer answers to, by the end of its own name in other architectures.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "qkv_proj": QKV,  # Phi-3
    "query_key_value": QKV,  # GPT-NeoX, Falcon, Bloom
    "Wqkv": QKV,  # MPT
    "q_a_proj": ("q_proj",),  # DeepSeek's factors of the projections
    "q_b_proj": ("q_proj",),
    "kv_a_proj_with_mqa": ("k_proj", "v_proj"),
    "kv_b_proj": ("k_proj", "v_proj"),
    "in_proj_qkvz": QKV,  # linear attention: Qwen3-Next
    "in_proj_qkv": QKV,  # Qwen3.5
    "out_proj": ("o_proj",),  # OPT, GPT-J, GPT-Neo, MPT, LFM2, linear attention
    "self_attn.dense": ("o_proj",),  # Phi
    "attention.dense": ("o_proj",),  # GPT-NeoX
    "self_attention.dense": ("o_proj",),  # Falcon, Bloom
    "gate_up_proj": GATE_UP,  # Phi-3, GLM
    "w1": ("gate_proj",),  # LFM2
    "w3": ("up_proj",),
    "w2": ("down_proj",),
    "fc1": ("up_proj",),  # OPT, Phi
    "fc2": ("down_proj",),
    "fc_in": ("up_proj",),  # GPT-J
    "fc_out": ("down_proj",),
    "attn.c_attn": QKV,  # GPT-2, StarCoder
    "attn.c_proj": ("o_proj",),
    "mlp.c_fc": ("up_proj",),  # GPT-2, GPT-Neo, StarCoder
    "mlp.c_proj": ("down_proj",),
    "shared_mlp.input_linear": GATE_UP,  # Granite's mixtures
    "shared_mlp.output_linear": ("down_proj",),
    "dense_h_to_4h": ("up_proj",),  # GPT-NeoX, Falcon, Bloom
    "dense_4h_to_h": ("down_proj",),
}
#: The linear layers that end a sub-layer: what they return enters the residual stream.
ENDS = ("o_proj", "down_proj")
#: Whole parts, each by the last component of its name.
PARTS: dict[str, tuple[str, ...]] = {
    "attention": ("self_attn",),
    "mlp": ("mlp", "feed_forward", "ffn"),
    "embedding": ("embed_tokens",),
}


def find_target_modules(
    model: nn.Module, kind: str, targets: Sequence[str] | str | None = None, *, no_experts: str = ""
) -> dict[str, nn.Module]:
    r"""Return the sites of a kind in a model, by name, in the model's order.

    Each target is a regular expression for a whole module name, or for its end after a dot: ``q_proj``,
    ``self_attn\.(q|v)_proj``, ``layers\.[0-3]\..*``; ``all-linear`` is every one but the head. Without targets,
    ``linear`` means those of ``DEFAULT_TARGETS`` that the model has, or all if it has none, and another kind all of its
    sites. The output head is a site only for a target that names it. Experts' stacks of matrices are linear layers in
    all of this, each one site.

    Args:
        model: in which to look.
        kind: of sites.
        targets: which of them.
        no_experts: why experts' matrices are no sites, a sentence; they are where it is empty.

    Raises:
        UserError: a target without a site, or one of whose sites some hold another adapter already.
    """
    sites = _sites(model, kind)
    experts = [name for name, module in sites.items() if no_experts and isinstance(module, ExpertWeight)]
    sites = {name: module for name, module in sites.items() if name not in experts}
    if targets is None:
        return _usual_sites(model, kind, sites)
    targets = [targets] if isinstance(targets, str) else targets
    if not targets:
        raise UserError(f"targets is empty, so no {kind} would be adapted. {_known(sites)}")
    found: set[str] = set()
    occupied = _occupied(model, kind)
    for target in targets:
        matches, taken = (_matches(target, _reach(model, kind, names, target)) for names in (sites, occupied))
        if not matches:
            if passed := sorted(_matches(target, _bypassed(model))):
                raise UserError(
                    f"target {target!r} is a layer of a state-space mixer, {passed[0]}, whose weight the model's code "
                    f"takes out of it: an adapter there would never be called. {_known(sites, target)}"
                )
            if _matches(target, experts):
                raise UserError(f"target {target!r} is the experts' of a mixture. {no_experts}".rstrip(".") + ".")
            reason = "already holds an adapter" if taken else f"matches no {kind} of {type(model).__name__}"
            raise UserError(f"target {target!r} {reason}. {_known(sites, target)}")
        if taken:
            raise UserError(
                f"target {target!r} matches {len(matches) + len(taken)} sites, of which {len(taken)} already hold an "
                f"adapter, first {sorted(taken)[0]}: this method would get the other {len(matches)}. "
                f"Say by `targets` where each method goes; free are {_free(matches)}"
            )
        found |= matches
    return {name: module for name, module in sites.items() if name in found}


def _usual_sites(model: nn.Module, kind: str, sites: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the sites where a user names no targets."""
    usual = DEFAULT_TARGETS if kind == "linear" else (".*",)
    found = set().union(*(_matches(target, _reach(model, kind, sites, target)) for target in usual))
    taken = sorted(set().union(*(_matches(target, _occupied(model, kind)) for target in usual)))
    if taken:
        raise UserError(
            f"{len(taken)} of the usual sites already hold an adapter, first {taken[0]}, so that this method would get "
            f"only {len(found)} of {len(found) + len(taken)}. Say by `targets` where each method goes"
        )
    if not found:
        found = set(_reach(model, kind, sites, ".*"))
    if not found:
        raise UserError(f"{type(model).__name__} has no {kind} that an adapter could be put at")
    return {name: module for name, module in sites.items() if name in found}


def _sites(model: nn.Module, kind: str) -> dict[str, nn.Module]:
    """Return all modules of a kind that hold no adapter yet."""
    inside, bypassed = decoder_prefixes(model), set(_bypassed(model)) if kind in ("linear", "sublayer") else set()
    return {
        name: module
        for name, module in _candidates(model, kind)
        if name not in bypassed and is_inside(name, inside) and _is_of_kind(kind, name, module)
    }


def _bypassed(model: nn.Module) -> list[str]:
    """Return the names of the linear layers whose weights the model's code takes out of them."""
    return [
        f"{name}.{child}"
        for name, module in _outside_adapters(model)
        for child in bypassed_layers(module)
        if isinstance(getattr(module, child, None), nn.Linear)
    ]


def _candidates(model: nn.Module, kind: str) -> Iterator[tuple[str, nn.Module]]:
    """Walk a model's modules outside adapters and, for linear layers, the stacks of matrices that they hold."""
    for name, module in _outside_adapters(model):
        yield name, module
        if kind == "linear":
            for key, stack in expert_weights(module):
                yield f"{name}.{key}", stack


def _occupied(model: nn.Module, kind: str) -> list[str]:
    """Return the names of the modules of a kind that adapters wrap already."""
    wrapped = {name[: -len(".base")]: module for name, module in model.named_modules() if name.endswith(".base")}
    return [name for name, module in wrapped.items() if _is_of_kind(kind, name, module)]


def _reach(model: nn.Module, kind: str, sites: Iterable[str], target: str) -> list[str]:
    """Return the sites that a target may match: the head only if it is named."""
    head = head_name(model).rpartition(".")[2]
    return [name for name in sites if kind == "module" or name.rpartition(".")[2] != head or head in target]


def _matches(target: str, names: Sequence[str]) -> set[str]:
    if target == ALL_LINEAR:
        return set(names)
    pattern = _pattern(target)
    with limited(f"the target {shown(target)} as a regular expression"):
        return {name for name in names if any(pattern.fullmatch(alias) for alias in _aliases(name))}


def _outside_adapters(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Walk a model's modules, but not adapters, nor what they wrap and keep as their child ``base``; only its parts."""
    children = dict(module.named_children())
    if "base" in children:
        children = {f"base.{name}": child for name, child in children["base"].named_children()}
    else:
        yield name, module
    for child_name, child in children.items():
        yield from _outside_adapters(child, f"{name}.{child_name}" if name else child_name)


def _is_of_kind(kind: str, name: str, module: nn.Module) -> bool:
    if kind == "linear":
        return (is_linear(module) or isinstance(module, ExpertWeight)) and not is_router(module)
    if kind == "sublayer":
        return is_linear(module) and ends_sublayer(name)
    if kind == "module":
        return next(module.parameters(recurse=False), None) is not None
    return name.rpartition(".")[2] in PARTS[kind]


def matches_target(target: str, name: str) -> bool:
    """Return True if a target matches the module of this name."""
    return bool(_matches(target, [name]))


#: Characters of a regular expression for targets.
MOST_PATTERN = 4096


def _pattern(target: str) -> re.Pattern[str]:
    try:
        if len(target) > MOST_PATTERN:
            raise UserError(f"target {shown(target)} has more than {MOST_PATTERN} characters")
        re.compile(target)  # by itself first: "q)|(v" would be valid inside the brackets below
        return re.compile(rf"(?:.*\.)?(?:{target})")
    except (re.error, RecursionError, OverflowError) as error:
        plain = ", ".join(DEFAULT_TARGETS)
        raise UserError(
            f"target {shown(target)} is no regular expression: {error}. Plain names work: {plain}"
        ) from None


def _known(sites: Mapping[str, nn.Module], word: str = "") -> str:
    """Return which targets would match, for messages."""
    known = {alias.rpartition(".")[2] for name in sites for alias in _aliases(name)}
    return hint("targets", word, known) if known else "No such site is left in it."


def _free(names: Iterable[str]) -> str:
    """Return the last components of these names, for messages."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _aliases(name: str) -> list[str]:
    """Return the names that a module answers to: its own, and the usual ones of what it is or fuses."""
    stem, dot, _ = name.rpartition(".")
    return [name, *(f"{stem}{dot}{usual}" for usual in usual_names(name))]


def usual_names(name: str) -> tuple[str, ...]:
    """Return the usual names, each a last component, that the module of this name answers to besides its own."""
    last = name.rpartition(".")[2]
    if last in USUAL_NAMES:
        return USUAL_NAMES[last]
    return next((usual for own, usual in USUAL_NAMES.items() if "." in own and f".{name}".endswith(f".{own}")), ())


def decoder_prefixes(model: Any) -> tuple[str, ...]:
    """Return the names of the modules in which adapters have a place: the text decoder, and the head.

    A model that sees or hears has other towers, which the loss of a text does not reach. ``("",)`` is the whole model.
    """
    find = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else model
    names = {id(module): name for name, module in model.named_modules()}
    inside = names.get(id(decoder), "")
    if not inside:
        return ("",)
    head = model.get_output_embeddings()
    return (inside, *([names[id(head)]] if id(head) in names else []))


def is_inside(name: str, prefixes: tuple[str, ...]) -> bool:
    """Return True if a module of this name is one of the named modules or inside one."""
    return any(not prefix or name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def head_name(model: Any) -> str:
    """Return the name of the output head; LLaMA's where the model does not say."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return next((name for name, module in model.named_modules() if module is head and head is not None), "lm_head")


def ends_sublayer(name: str) -> bool:
    """Return True if the linear layer of this name ends an attention or an MLP."""
    return any(alias.rpartition(".")[2] in ENDS for alias in _aliases(name))


@dataclass(frozen=True)
class Coverage:
    """How much of a decoder's weights, without embedding and head, an injection's sites reach.

    Attributes:
        reached: numbers of the weights (tensors of two and more dimensions) at the sites, or of the blocks they end.
        total: numbers of all of them.
        missing: names of those that are not reached, with ``*`` for layers' numbers, the largest first.
    """

    reached: int
    total: int
    missing: tuple[str, ...]

    def __str__(self) -> str:
        share = f"over {self.reached / max(self.total, 1):.0%} of the decoder's weights"
        names = ", ".join(name.rpartition("*.")[2] for name in self.missing[:4])
        return share + (f" (not {names}{' and others' if len(self.missing) > 4 else ''})" if names else "")


def coverage(model: nn.Module, kind: str, sites: Sequence[str]) -> Coverage:
    """Return how much of the model the sites of a kind reach.

    A linear layer's adapter reaches its weight, a sub-layer's everything that its block returns, and one at the
    embedding the whole model.
    """
    inside, head = decoder_prefixes(model), head_name(model)
    if kind == "embedding":
        reach: tuple[str, ...] = ("",)
    else:
        reach = tuple(site.rpartition(".")[0] if kind == "sublayer" else site for site in sites)
    reached, missing = Counter[bool](), Counter[str]()
    for name, module in model.named_modules():
        plain = name.removesuffix(".base")
        if isinstance(module, nn.Embedding) or plain == head or not is_inside(plain, inside):
            continue
        own = () if hasattr(module, "base") else module.named_parameters(recurse=False)  # an adapter's are no weights
        for tensor, parameter in own:
            full = plain if tensor == "weight" else f"{plain}.{tensor}"
            if is_matrix(parameter) and not tensor.endswith("bias"):  # experts' biases are stacks, too
                reached[is_inside(full, reach)] += num_parameters(parameter)
                if not is_inside(full, reach):
                    missing[re.sub(r"\.\d+\.", ".*.", full)] += num_parameters(parameter)
    return Coverage(reached[True], reached.total(), tuple(name for name, _ in missing.most_common()))
