"""Adapters written as HF PEFT's, for what reads those: PEFT itself, vLLM and other servers, the hub.

Every method whose update is ``W' = W + B A`` becomes PEFT's LoRA, exactly: LoRA and DoRA by their own tensors and
scale, others (PiSSA, AdaLoRA, LoRA-Dash, ...) by the factors of their whole update, with alpha = r. IA3 and SSL
become IA3, prompts prompt tuning. What has no equal there is refused: a merged model says the same anywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from subspace.adapters.base import Adapter, LinearAdapter
from subspace.adapters.inject import adapters
from subspace.adapters.virtual_tokens import PromptAdapter
from subspace.common.files import write_folder, write_json
from subspace.distributed.zero import is_sharded
from subspace.errors import UserError
from subspace.integrations.peft.reading import CONFIG, TENSORS

PREFIX = "base_model.model."


class Written(NamedTuple):
    """What one site is in PEFT's files; ``r`` and ``alpha`` of LoRA alone, whose update is (alpha / r) B A."""

    kind: str
    tensors: dict[str, Tensor]
    r: int = 0
    alpha: float = 0.0


def export_peft(
    model: nn.Module, folder: str | Path, *, base: str | None = None, revision: str | None = None,
    dtype: torch.dtype = torch.float32, card: Callable[[Mapping[str, Any]], str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a model's adapters as a folder of HF PEFT's; return its configuration. The folder appears whole or not.

    Args:
        model: the one with the adapters.
        folder: to write; it must not exist, or be empty.
        base: what the base model is called for those who load the adapter.
        revision: its revision there.
        dtype: of the tensors.
        card: returns the text of a ``README.md`` for the configuration.

    Raises:
        UserError: no adapters, or ones that have no equal in PEFT.
    """
    folder = Path(folder)
    config, tensors = peft_files(model)
    config |= {"base_model_name_or_path": base, "revision": revision}
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"the adapter was not written to {folder}: {broken[0]} is not finite in {dtype}. Use float32")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"cannot write the adapter to {folder}: it exists. Give another folder, or remove it")
    with write_folder(folder, replace=False) as work:
        save_file(tensors, work / TENSORS, metadata={"format": "pt"})
        with safe_open(work / TENSORS, framework="pt") as stored:
            if not all(torch.equal(stored.get_tensor(name), tensor) for name, tensor in tensors.items()):
                raise UserError(f"{folder} was not written: it reads back differently. Is the disk sound?")
        write_json(work / CONFIG, config)
        if card:
            (work / "README.md").write_text(card(config), encoding="utf-8")
    return config


def peft_files(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what PEFT's two files hold for a model's adapters: the configuration, and the tensors by name."""
    by_site = adapters(model)
    if not by_site:
        raise UserError("the model has no adapters to export")
    if any(is_sharded(tensor) for adapter in by_site.values() for tensor in adapter.own_tensors().values()):
        raise UserError(
            "the adapters cannot be exported: ZeRO-3 holds them in parts. Save them (subspace.save_adapter, on all "
            "processes), and export what was saved"
        )
    with torch.no_grad():
        sites = {site: _written(site, adapter) for site, adapter in by_site.items()}
    kinds = {each.kind for each in sites.values()}
    if len(kinds) > 1:
        raise UserError(
            f"an adapter of PEFT's is of one type, and this would be {' and '.join(sorted(kinds))}. Merge it instead: "
            "`subspace merge`"
        )
    (kind,) = kinds
    if kind == "PROMPT_TUNING":
        ((_, prompt),) = sites.items()
        return _prompt_config(model, prompt), prompt.tensors
    config = {"LoRA": _lora_config, "DoRA": _lora_config, "IA3": _ia3_config}[kind](model, sites, by_site)
    return config, {f"{PREFIX}{site}.{name}": t for site, each in sites.items() for name, t in each.tensors.items()}


def _written(site: str, adapter: Any) -> Written:
    """Return what a site is in PEFT's files; raise UserError if it has no equal there."""
    scale, name = adapter.update_scale, adapter.name
    if isinstance(adapter, PromptAdapter):
        return Written("PROMPT_TUNING", {"prompt_embeddings": adapter.vectors()})
    linear = isinstance(adapter, LinearAdapter)  # no type guard, which would hide what each method has besides
    if linear and scale == 1:
        if name == "ssl" or (name == "ia3" and adapter.config.side == "input"):
            return Written("IA3", {"ia3_l": (adapter.d if name == "ssl" else adapter.l)[None]})
        if name == "ia3" and (adapter.config.scale_bias or adapter.base_bias() is None):
            return Written("IA3", {"ia3_l": adapter.l[:, None]})
        if name == "dora":
            return _dora(adapter)
    factors = adapter.to_lora() if linear and adapter.mergeable else None
    if factors is None:
        raise UserError(
            f"method {name} at {site} has no equal in PEFT, whose readers would compute something else. Merge it into "
            "an ordinary model: `subspace merge`"
        )
    if name == "lora":  # its own tensors, to the bit
        A, B, r = adapter.A, adapter.B, len(adapter.A)
        return Written("LoRA", _factors(A, B), r, scale * adapter.scale * r)
    A, B = factors
    return Written("LoRA", _factors(A, B), len(A), scale * len(A))


def _factors(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    return {"lora_A.weight": A, "lora_B.weight": B}


def _dora(adapter: Any) -> Written:
    if adapter.config.direction:
        A, B, alpha = adapter.A, adapter.B, adapter.scale * len(adapter.A)
    else:  # lengths alone: an update of zero
        A, B, alpha = adapter.m.new_zeros(1, adapter.in_features), adapter.m.new_zeros(adapter.out_features, 1), 1.0
    return Written("DoRA", {**_factors(A, B), "lora_magnitude_vector": adapter.m}, len(A), alpha)


# Configurations.


def _lora_config(model: nn.Module, sites: Mapping[str, Written], by_site: Mapping[str, Adapter]) -> dict[str, Any]:
    r, alpha = Counter((each.r, each.alpha) for each in sites.values()).most_common(1)[0][0]
    dropout = {getattr(adapter.config, "dropout", 0.0) for adapter in by_site.values()}
    return {
        **_common("LORA", model, sites),
        "r": r,
        "lora_alpha": _whole(alpha),
        "lora_dropout": dropout.pop() if len(dropout) == 1 else 0.0,
        "use_rslora": False,  # the scale is in alpha
        "use_dora": next(iter(sites.values())).kind == "DoRA",
        "rank_pattern": {site: each.r for site, each in sites.items() if each.r != r},
        "alpha_pattern": {site: _whole(each.alpha) for site, each in sites.items() if each.alpha != alpha},
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _ia3_config(model: nn.Module, sites: Mapping[str, Written], by_site: Mapping[str, Adapter]) -> dict[str, Any]:
    inputs = [site for site, each in sites.items() if len(each.tensors["ia3_l"]) == 1]
    return {
        **_common("IA3", model, sites),
        "feedforward_modules": short_targets(model, inputs),
        "init_ia3_weights": True,
        "modules_to_save": None,
    }


def _prompt_config(model: Any, prompt: Written) -> dict[str, Any]:
    n, width = prompt.tensors["prompt_embeddings"].shape
    described = model.config.get_text_config()
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": n,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": described.num_attention_heads,
        "num_layers": described.num_hidden_layers,
        "prompt_tuning_init": "RANDOM",
    }


def _common(kind: str, model: nn.Module, sites: Mapping[str, Any]) -> dict[str, Any]:
    transposed = any(type(adapter.base).__name__ == "Conv1D" for adapter in adapters(model).values())
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "target_modules": short_targets(model, list(sites)),
        "fan_in_fan_out": transposed,
    }


def short_targets(model: nn.Module, sites: list[str]) -> list[str]:
    """Return names by which PEFT finds exactly these sites: their last parts if those do, else whole names."""
    last = {site.rpartition(".")[2] for site in sites}
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if named == set(sites) else sites)


def _whole(alpha: float) -> float:
    """Return a scale as an integer if it is one, up to float32's rounding, as its readers declare it."""
    near = round(alpha)
    return near if near and abs(alpha - near) < 1e-7 * near else alpha
