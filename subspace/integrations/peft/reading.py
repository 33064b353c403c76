"""Adapters of HF PEFT, read: the method that each is here, its settings, and its tensors by site.

What a file says is used or refused by name: tensors that have no place, and settings that change what the adapter does
and have no equal here. ``lora_magnitude_vector`` is DoRA's m; the DoRA authors' own fork (NVlabs/DoRA) calls it
``weight_m_wdecomp``. AdaLoRA's update is scaled by alpha over the rank at the start, whatever rank a layer ended with.
P-tuning's file holds the vectors that its network gave, so it is read as prompt tuning.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from subspace.adapters.base import Adapter
from subspace.adapters.inject import inject
from subspace.adapters.serialization import fill_adapters
from subspace.common.download import refuse_lfs_pointer
from subspace.common.foreign.text import checked, read_json
from subspace.errors import UserError, file_trouble

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # as PEFT wrote before 0.6, and its forks still do
#: The key of a tensor that belongs to no layer.
ANYWHERE = ""

Tensors = dict[str, Tensor]


class PeftConfig(TypedDict, total=False):
    """What is read of ``adapter_config.json``; null stands for absent."""

    peft_type: str
    base_model_name_or_path: str | None
    revision: str | None
    peft_version: str | None
    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool
    alpha_pattern: dict[str, float] | None
    dora_simple: bool
    init_r: int
    num_virtual_tokens: int


@dataclass
class Part:
    """Sites that have one method and equal settings."""

    method: str
    settings: dict[str, Any]
    sites: dict[str, Tensors] = field(default_factory=dict)


class PeftAdapter(NamedTuple):
    """An adapter's folder, read."""

    folder: Path
    config: PeftConfig
    parts: list[Part]

    @property
    def base(self) -> str | None:
        """The base model that it names, as ``org/name@revision`` where it names one."""
        name, revision = self.config.get("base_model_name_or_path"), self.config.get("revision")
        return f"{name}@{revision}" if name and revision else name


def load_peft(model: nn.Module, folder: str | Path, *, trained: bool = False) -> dict[str, Adapter]:
    """Inject an adapter that HF PEFT saved into a model, and return the adapters by site.

    Args:
        model: the base that it was trained on.
        folder: holds ``adapter_config.json`` and the tensors.
        trained: leave the adapters trainable; they are frozen otherwise.

    Raises:
        UserError: a kind of adapter that has no equal here, or one that does not fit the model.
    """
    return put_adapters(model, read_peft(Path(folder)), trained=trained)[0]


def put_adapters(model: nn.Module, read: PeftAdapter, *, trained: bool = False) -> tuple[dict[str, Adapter], Tensors]:
    """Inject the adapters that were read, and fill them; return them, and their tensors by the names in the model."""
    found: dict[str, Adapter] = {}
    tensors: Tensors = {}
    for part in read.parts:
        targets = None if ANYWHERE in part.sites else [re.escape(site) for site in part.sites]
        try:
            created = inject(model, part.method, part.settings, targets=targets, start=False)
        except UserError as error:
            raise UserError(f"the adapter in {read.folder} does not fit this model: {error}") from None
        for site in created:
            own = part.sites.get(site, part.sites.get(ANYWHERE, {}))
            tensors |= {f"{site}.{name}": tensor for name, tensor in own.items()}
        found |= created
    fill_adapters(model, tensors, read.folder, trained=trained)
    return found, tensors


def read_peft(folder: Path) -> PeftAdapter:
    """Read an adapter's folder.

    Raises:
        UserError: none of PEFT's, damaged, or of a kind or with settings that have no equal here.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"no adapter of HF PEFT in {folder}: {CONFIG} is not there")
    content: Any = read_json(folder / CONFIG, dict[str, Any])
    given = {key: value for key, value in content.items() if value is not None}
    config: PeftConfig = checked(given, PeftConfig, str(folder / CONFIG))
    kind = config.get("peft_type", "")
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise UserError(
            f"the adapter in {folder} is of PEFT's type {kind or '(none)'}, and only these are read: {known}. Merge it "
            "with PEFT (merge_and_unload), and take the merged model"
        )
    _check_settings(content, KINDS[kind], folder)
    tensors = _read_tensors(folder)
    parts = KINDS[kind].read(config, _by_site(tensors, folder))
    return PeftAdapter(folder, config, parts)


def _read_tensors(folder: Path) -> Tensors:
    """Return the tensors of a folder by their names there, in float32."""
    file = folder / TENSORS if (folder / TENSORS).is_file() else folder / PICKLED
    if not file.is_file():
        raise UserError(f"no adapter of HF PEFT in {folder}: neither {TENSORS} nor {PICKLED} is there")
    refuse_lfs_pointer(file)
    try:
        pickled = file.name == PICKLED
        found = torch.load(file, map_location="cpu", weights_only=True) if pickled else load_file(file)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = file_trouble(error) or " ".join(str(error).split())[:160]
        raise UserError(f"{file} cannot be read: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{file} holds other things than tensors by name")
    found = {str(name): tensor.float() for name, tensor in found.items()}
    if broken := sorted(name for name, tensor in found.items() if not torch.isfinite(tensor).all()):
        raise UserError(f"{file}: {broken[0]} is not finite, in all {len(broken)} of {len(found)} tensors")
    return found


_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<site>.+)\.(?P<name>lora_[ABE]|lora_magnitude_vector|weight_m_wdecomp|ia3_l)"
    r"(?:\.default)?(?:\.weight)?"
)


def _by_site(tensors: Tensors, folder: Path) -> dict[str, Tensors]:
    """Sort tensors by the layers that they are of, and name them as PEFT does."""
    found: dict[str, Tensors] = {}
    misfits = []
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if name == "prompt_embeddings":
            found[ANYWHERE] = {name: tensor}
        elif match and ".base_layer" not in f".{match['site']}":
            found.setdefault(match["site"], {})[match["name"]] = tensor
        else:
            misfits.append(name)
    if misfits:
        raise UserError(
            f"the adapter in {folder} has {len(misfits)} tensors without a place here, first {sorted(misfits)[0]}: "
            "weights of the model itself (modules_to_save, resized embeddings), of embeddings or of experts. Merge it "
            "with PEFT (merge_and_unload), and take the merged model"
        )
    if not found:
        raise UserError(f"the adapter in {folder} has no tensors")
    return found


# What settings mean.

#: Those that change nothing in what a trained adapter does to its base.
IDLE = frozenset(
    {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
        "peft_version", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
        "ensure_weight_tying", "megatron_core", "loftq_config", "eva_config", "qalora_group_size", "merge_weights",
        "corda_config", "lora_ga_config", "runtime_config",
    }
)  # fmt: skip
#: Starts after which the base's weights are as they were; others change them.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "true", "false")


class Kind(NamedTuple):
    """A type of PEFT's: the settings that count or may be passed by, and what its tensors are here."""

    settings: frozenset[str]
    read: Callable[[PeftConfig, dict[str, Tensors]], list[Part]]


def _check_settings(content: Mapping[str, Any], kind: Kind, folder: Path) -> None:
    """Raise UserError for a setting that changes what an adapter does and has no equal here."""
    start = content.get("init_lora_weights")
    if start not in (None, *PLAIN_STARTS):
        raise UserError(
            f"the adapter in {folder} was begun with init_lora_weights={start!r}, which changes the base too. "
            "Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    absent: tuple[Any, ...] = (None, False, "", "none", [], {})
    for key, value in content.items():
        if key not in IDLE | kind.settings | {"init_lora_weights"} and value not in absent:
            raise UserError(
                f"the adapter in {folder} has {key}={str(value)[:80]}, which has no equal here. Merge it with PEFT "
                "(merge_and_unload), and take the merged model"
            )


def _gathered(found: Iterable[tuple[str, dict[str, Any], str, Tensors]]) -> list[Part]:
    """Return parts of sites with one method and equal settings."""
    parts: list[Part] = []
    for method, settings, site, tensors in found:
        part = next((p for p in parts if (p.method, p.settings) == (method, settings)), None)
        if part is None:
            parts.append(part := Part(method, settings))
        part.sites[site] = tensors
    return parts


def _expect(site: str, tensors: Tensors, *allowed: set[str]) -> None:
    """Raise UserError unless a site has exactly one of these sets of tensors, all of them matrices."""
    if tensors.keys() not in allowed:
        wanted = " or ".join(", ".join(sorted(names)) for names in allowed)
        raise UserError(
            f"{site or 'the adapter'} lacks one of its tensors, or has others than its type: it has "
            f"{', '.join(sorted(tensors))}, and takes {wanted}"
        )
    if odd := [name for name, tensor in tensors.items() if tensor.ndim != 2 and name != "lora_magnitude_vector"]:
        raise UserError(f"{site or 'the adapter'}: {odd[0]} has the shape {tuple(tensors[odd[0]].shape)}, no matrix's")


def _lora(config: PeftConfig, by_site: dict[str, Tensors]) -> list[Part]:
    return _gathered(_lora_site(config, site, tensors) for site, tensors in by_site.items())


def _lora_site(config: PeftConfig, site: str, tensors: Tensors) -> tuple[str, dict[str, Any], str, Tensors]:
    factors, m = {"lora_A", "lora_B"}, None
    if config.get("peft_type") == "DORA":  # the authors' fork: some layers may train their lengths alone
        _expect(site, tensors, {*factors, "weight_m_wdecomp"}, {"weight_m_wdecomp"})
        m = tensors["weight_m_wdecomp"]
    elif config.get("use_dora"):
        _expect(site, tensors, {*factors, "lora_magnitude_vector"})
        m = tensors["lora_magnitude_vector"]
    else:
        _expect(site, tensors, factors)
    settings: dict[str, Any] = {
        "alpha": _alpha(config, site), "rslora": bool(config.get("use_rslora", False)),
        "dropout": config.get("lora_dropout", 0.0),
    }  # fmt: skip
    own = {name: tensors[f"lora_{name}"] for name in "AB" if f"lora_{name}" in tensors}
    settings |= {"r": len(own["A"])} if own else {"direction": False}
    if m is None:
        return "lora", settings, site, own
    # Both drop the input of the frozen product too.
    settings |= {"simple": config.get("dora_simple", True), "dropout_form": "official"}
    return "dora", settings, site, {**own, "m": m.flatten()}


def _alpha(config: PeftConfig, site: str) -> float:
    """Return a site's alpha: the first pattern's that ends its name, else all sites'."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", site):
                return float(alpha)
        except re.error as error:
            raise UserError(f"alpha_pattern has {pattern!r}, no regular expression: {error}") from None
    return float(config.get("lora_alpha", 8))


def _adalora(config: PeftConfig, by_site: dict[str, Tensors]) -> list[Part]:
    found = []
    for site, tensors in by_site.items():
        _expect(site, tensors, {"lora_A", "lora_B", "lora_E"})
        A, B, E = (tensors[f"lora_{name}"] for name in "ABE")
        if not len(A):  # nothing is left of its update
            continue
        r, first = len(A), max(1, config.get("init_r", 12))
        alpha = config.get("lora_alpha", 8) or first  # as PEFT takes an alpha of 0
        settings = {
            "r": r, "target_r": r, "alpha": alpha * r / first, "dropout": config.get("lora_dropout", 0.0),
        }  # fmt: skip
        found.append(("adalora", settings, site, {"A": A, "B": B, "E": E.flatten()}))
    return _gathered(found)


def _ia3(config: PeftConfig, by_site: dict[str, Tensors]) -> list[Part]:
    for site, tensors in by_site.items():
        _expect(site, tensors, {"ia3_l"})
    # (1, in) multiplies what enters the layer, (out, 1) what leaves it.
    sides = ((site, tensors["ia3_l"]) for site, tensors in by_site.items())
    return _gathered(
        ("ia3", {"side": "input" if len(l) == 1 else "output"}, site, {"l": l.flatten()}) for site, l in sides
    )


def _prompt(config: PeftConfig, by_site: dict[str, Tensors]) -> list[Part]:
    for site, tensors in by_site.items():
        _expect(site, tensors, {"prompt_embeddings"})
    P = by_site[ANYWHERE]["prompt_embeddings"]
    if len(P) != (n := config.get("num_virtual_tokens", len(P))):
        raise UserError(f"the adapter has {len(P)} vectors, and num_virtual_tokens={n}")
    return [Part("prompt", {"n": len(P)}, {ANYWHERE: {"P": P}})]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LORA = _names(
    "r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern dora_simple Wdecompose_target_modules"
)
_ADALORA = _LORA | _names("init_r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step")
_PROMPT = _names(
    "num_virtual_tokens token_dim num_attention_heads num_layers num_transformer_submodules prompt_tuning_init "
    "prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs encoder_reparameterization_type "
    "encoder_hidden_size encoder_num_layers encoder_dropout"
)
KINDS: dict[str, Kind] = {
    "LORA": Kind(_LORA, _lora),
    "DORA": Kind(_LORA, _lora),
    "ADALORA": Kind(_ADALORA, _adalora),
    "IA3": Kind(_names("feedforward_modules init_ia3_weights"), _ia3),
    "PROMPT_TUNING": Kind(_PROMPT, _prompt),
    "P_TUNING": Kind(_PROMPT, _prompt),
}
