"""Settings of a model's folder in the words of transformers 4 beside those of 5, which alone would be misread there.

transformers 5 writes what 4.57 passes by without a word (the rope's base frequency, so that logits differ) or stops at
(the tokenizer's class). Version 5 reads both. What version 4 wrote is returned as it is.
"""

from __future__ import annotations

from typing import Any

#: What a tokenizer of transformers 5 is called that is read from ``tokenizer.json`` alone, and its name in both.
BACKEND, BOTH = "TokenizersBackend", "PreTrainedTokenizerFast"
#: By version 5's name of a kind of layer: version 4's setting for its base frequency.
FREQUENCIES = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
#: By version 5's name of a setting, which all models have there: version 4's name in some (Qwen's mixtures).
RENAMED = {"num_local_experts": "num_experts"}


def readable_config(config: dict[str, Any], version: str = "") -> dict[str, Any]:
    """Return what a ``config.json`` holds, with version 4's settings beside what version 5 calls otherwise.

    Args:
        config: the file's content.
        version: of the library that wrote it, where ``config`` is a part that does not say so.
    """
    version = str(config.get("transformers_version") or version)
    parts = {key: value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)}
    nested = {key: readable_config(value, version) for key, value in parts.items()}
    rope = config.get("rope_parameters")
    older = _rope(rope) if isinstance(rope, dict) else {}
    if version.startswith("5"):
        older |= {old: config[new] for new, old in RENAMED.items() if new in config}
    return {**{key: value for key, value in older.items() if key not in config}, **config, **nested}


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    if kinds := {kind: rope[kind] for kind in FREQUENCIES if isinstance(rope.get(kind), dict)}:
        found = _rope(kinds["full_attention"]) if "full_attention" in kinds else {}
        return found | {FREQUENCIES[kind]: own["rope_theta"] for kind, own in kinds.items() if "rope_theta" in own}
    found = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in found}
    if scaling.get("rope_type", "default") != "default":
        found["rope_scaling"] = scaling
    return found


def readable_tokenizer_config(settings: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    """Return what a ``tokenizer_config.json`` holds, as version 4 takes it too.

    Args:
        settings: the file's.
        whole: whether a ``tokenizer.json`` lies beside it, which says all of how a text is encoded.
    """
    extra = settings.get("extra_special_tokens")
    if "backend" not in settings and settings.get("tokenizer_class") != BACKEND and not isinstance(extra, list):
        return settings
    kept = {key: value for key, value in settings.items() if key not in ("backend", "is_local", "local_files_only")}
    if isinstance(extra, list):
        del kept["extra_special_tokens"]
        kept["additional_special_tokens"] = extra
    if whole:  # version 4's classes of a model would add to what the file says
        kept["tokenizer_class"] = BOTH
    return kept
