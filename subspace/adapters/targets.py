"""Target modules: the names that decoder architectures give their parts, and the search for them in a model.

A *site* is a module that an adapter can wrap. There are six kinds:

=============  =====================================================================================================
``linear``     a linear layer, chosen by ``targets``
``sublayer``   the linear that ends a sub-layer (attention or MLP); what it returns is what the sub-layer returns
``attention``  a whole attention module, whose keys and values a method may extend
``mlp``        a whole feed-forward block
``embedding``  the token embedding
``module``     whatever holds values of its own: linear layers, norms, embedding, head
=============  =====================================================================================================

Nothing else in the project names a module of a model. An architecture that is not in the table has LLaMA's names.
Phi-3 fuses several projections into one linear; the usual name of each still finds it there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from subspace.errors import UserError, nearest

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LayerNames:
    """The names of one architecture's parts, each the last component of a module's name.

    ``fused`` maps a linear that holds several projections to the usual names of those: each of them, as a target,
    means the fused linear.
    """

    attention: str = "self_attn"
    mlp: str = "mlp"
    ends: tuple[str, ...] = ("o_proj", "down_proj")
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# Keyed by transformers' ``config.model_type``.
ARCHITECTURES = {
    "phi3": LayerNames(fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}),
}
LLAMA_LIKE = LayerNames()


def layer_names(model: nn.Module) -> LayerNames:
    """Return what a model's architecture calls its parts."""
    return ARCHITECTURES.get(getattr(getattr(model, "config", None), "model_type", ""), LLAMA_LIKE)


def find_target_modules(model: nn.Module, kind: str, targets: Sequence[str] | None = None) -> dict[str, nn.Module]:
    r"""Return the sites of a kind in a model, by name, in the model's order.

    Each target is a regular expression for a whole module name, or for its end after a dot: ``q_proj``,
    ``self_attn\.(q|v)_proj``, ``layers\.[0-3]\..*``. Without targets, ``linear`` means ``DEFAULT_TARGETS`` and another
    kind all of its sites. The output head is a site only for a target that names it. Every target must have a site.
    """
    names = layer_names(model)
    sites = {name: module for name, module in _outside_adapters(model) if _is(kind, name, module, names)}
    if targets is None and kind != "linear":
        targets = [".*"]
    elif targets is None:
        targets = DEFAULT_TARGETS
    elif not targets:
        raise UserError(f"targets is empty, so no {kind} would be adapted. {_known(sites, names)}")

    found: set[str] = set()
    for target in targets:
        pattern = _pattern(target)
        reach = [
            name for name in sites if kind == "module" or name.rpartition(".")[2] != names.head or names.head in target
        ]
        matches = {name for name in reach if any(pattern.fullmatch(alias) for alias in _aliases(name, names))}
        if not matches:
            adapted = any(name.endswith(".base") and pattern.fullmatch(name[:-5]) for name, _ in model.named_modules())
            reason = "already holds an adapter" if adapted else f"matches no {kind} of {type(model).__name__}"
            raise UserError(f"target {target!r} {reason}. {_known(sites, names, target)}")
        found |= matches
    return {name: module for name, module in sites.items() if name in found}


def _outside_adapters(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Walk a model's modules, but not adapters, nor what they wrap and keep as their child ``base``; only its parts."""
    children = dict(module.named_children())
    if "base" in children:
        children = {f"base.{name}": child for name, child in children["base"].named_children()}
    else:
        yield name, module
    for child_name, child in children.items():
        yield from _outside_adapters(child, f"{name}.{child_name}" if name else child_name)


def _is(kind: str, name: str, module: nn.Module, names: LayerNames) -> bool:
    last = name.rpartition(".")[2]
    if kind == "linear":
        return isinstance(module, nn.Linear)  # bitsandbytes' quantized layers derive from it
    if kind == "sublayer":
        return isinstance(module, nn.Linear) and last in names.ends
    if kind == "module":
        return next(module.parameters(recurse=False), None) is not None
    return last == {"attention": names.attention, "mlp": names.mlp, "embedding": names.embedding}[kind]


def matches_target(target: str, name: str) -> bool:
    """Return True if a target matches the module of this name."""
    return _pattern(target).fullmatch(name) is not None


def _pattern(target: str) -> re.Pattern[str]:
    try:
        re.compile(target)  # by itself first: "q)|(v" would be valid inside the brackets below
        return re.compile(rf"(?:.*\.)?(?:{target})")
    except re.error as error:
        plain = ", ".join(DEFAULT_TARGETS)
        raise UserError(f"target {target!r} is no regular expression: {error}. Plain names work: {plain}") from None


def _known(sites: Mapping[str, nn.Module], names: LayerNames, word: str = "") -> str:
    """Return which targets would match, for messages."""
    known = {alias.rpartition(".")[2] for name in sites for alias in _aliases(name, names)}
    return nearest(word, known) if known else "No such site is left in it."


def _aliases(name: str, names: LayerNames) -> list[str]:
    """Return the names that a module answers to: its own, and those of the projections that it fuses."""
    stem, dot, last = name.rpartition(".")
    return [name, *(f"{stem}{dot}{projection}" for projection in names.fused.get(last, ()))]
