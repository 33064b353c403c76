"""How a model reads a text of some length: what of it a token sees, and what its positions depend on.

Padding between tokens, tokens that are masked afterwards, and texts of several lengths in a batch change nothing for a
model of attention over the whole text. These functions tell of the others.
"""

from __future__ import annotations

from typing import Any

from subspace.models.transformers_compat import is_stateful

#: Kinds of layers, of transformers' ``layer_types``, that read earlier tokens through attention and nothing else.
ATTENTION = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
#: Architectures whose attention adds the distance of two tokens, taken from a mask of two dimensions (ALiBi).
DISTANCES = {"bloom", "mpt"}
UNLIMITED = 1 << 30


def max_positions(config: Any) -> int:
    """Return how many tokens a model reads at once; ``UNLIMITED`` if its configuration has no such number."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or UNLIMITED


def attention_window(config: Any) -> int | None:
    """Return from how many tokens on some layer of a model sees only a part of a text; None where all see the whole."""
    text = config.get_text_config()
    spans = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((span for span in spans if span), default=None)


def has_recurrent_layers(model: Any) -> bool:
    """Return True if a layer keeps a state of what it has read (Mamba, linear attention, convolutions).

    What has been read cannot be taken back, and what is masked leaves a trace.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return is_stateful(model) or not ATTENTION.issuperset(kinds)


def adds_distances(config: Any) -> bool:
    """Return True if attention depends on the distance of two tokens in the batch, and not on their positions."""
    text = config.get_text_config()
    return text.model_type in DISTANCES or bool(getattr(text, "alibi", False))


def rotation_limit(config: Any) -> int | None:
    """Return the number of tokens beyond which rotary positions depend on the longest text of a batch, or None.

    That is so of the rotary type ``longrope``: beyond the length that a model was trained with first, all its positions
    turn at other speeds. (``dynamic`` changes beyond the number of positions, which no text has.)
    """
    rope: dict[str, Any] = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [each for each in (rope, *rope.values()) if isinstance(each, dict) and each.get("rope_type") == "longrope"]
    return min((each["original_max_position_embeddings"] for each in kinds), default=None)
