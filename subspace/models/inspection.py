"""What a model's files are, before they are loaded: their quantisation, and whether every tensor has its place.

``train``, ``plan``, ``doctor``, ``evaluate`` and ``merge`` all ask here, so they refuse the same files in the same
words. Only the descriptions of the tensors are read, not the tensors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subspace.distributed.launcher import launched_rank
from subspace.errors import UserError
from subspace.models.base_record import stamp
from subspace.models.config import ModelConfig
from subspace.models.files import ModelFiles, as_user_error, suppress_library_logs
from subspace.models.prepare import find_files
from subspace.models.transformers_compat import unsharded_loading

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger("subspace")

#: Tensors that old files hold and that are computed today: angles of rotary positions, positions, causal masks.
COMPUTED = re.compile(r"(^|\.)(rotary_emb|rotary_pos_emb|rope)\.|(^|\.)(inv_freq|position_ids|masked_bias)$")
#: A causal mask, which has four dimensions, unlike a bias of that name.
MASK = re.compile(r"(^|\.)attn(ention)?\.bias$")
AHEAD = "layers for predicting several tokens at once"
#: Parts of a checkpoint that its language model works without, and what they are.
EXTRAS = {
    r"(^|\.)(mtp|nextn)(\.|_)": AHEAD,
    r"(^|\.)(vision|visual|image|audio|speech|multi_modal|mm)_?\w*\.": "parts for images or sound",
}
#: Quantised formats that are opened dequantised: their tensors are computed in ``model.dtype``.
DEQUANTIZED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
WORKING = (
    "What is read: bitsandbytes' nf4, fp4 and int8 as they are, fp8 and mxfp4 dequantised. Else give the original "
    "model, with model.quantize=nf4 or int8"
)


# Quantisation.


@dataclass(frozen=True)
class StoredQuantization:
    """How a checkpoint's linear layers are quantised in its files.

    Attributes:
        method: as its configuration names it, such as ``bitsandbytes`` or ``gptq``.
        quantize: the value of ``model.quantize`` that opens such layers: ``none`` where they are dequantised.
        double_quant: 4-bit: whether the scales are quantised too.
    """

    method: str
    quantize: str = "none"
    double_quant: bool = False


def stored_quantization(files: ModelFiles) -> StoredQuantization | None:
    """Return how the files' layers are quantised; None if they are not.

    Raises:
        UserError: in a way that is not read.
    """
    settings = files.settings()
    about = settings.get("quantization_config") or settings.get("compression_config")
    if not about:
        return None
    method = str(about.get("quant_method") or "bitsandbytes")
    if about.get("load_in_8bit"):
        return StoredQuantization("bitsandbytes", "int8")
    if about.get("load_in_4bit"):
        double = bool(about.get("bnb_4bit_use_double_quant"))
        return StoredQuantization("bitsandbytes", str(about.get("bnb_4bit_quant_type", "fp4")), double)
    if method in DEQUANTIZED:
        return StoredQuantization(method)
    bits = f" in {about['bits']} bits" if "bits" in about else ""
    raise UserError(
        f"cannot open model {files.name!r}: its weights are quantised{bits} by {method}, which is not read "
        f"here. {WORKING}"
    )


def settle(config: ModelConfig) -> ModelConfig:
    """Return the settings as they are of the model that they open: its commit, and how its layers are quantised.

    Raises:
        UserError: no such model, or one whose files are quantised in another way than asked for.
    """
    files = find_files(config)
    settled = replace(config, path=files.name)
    if not Path(files.name).expanduser().exists():
        settled = replace(settled, revision=files.commit)
    stored = stored_quantization(files)
    if stored is None:
        return settled
    if stored.quantize == "none" and config.quantize != "none":
        raise UserError(
            f"model {files.name!r} was asked for with `quantize: {config.quantize}`, but its files are quantised by "
            f"{stored.method}, and are opened dequantised. Leave out model.quantize, or give the original model"
        )
    if config.quantize not in ("none", stored.quantize) or (config.double_quant and not stored.double_quant):
        asked = f"{config.quantize}{', double_quant: true' if config.double_quant else ''}"
        raise UserError(
            f"model {files.name!r} was asked for with `quantize: {asked}`, but its files are quantised already, in "
            f"{stored.quantize}{', double_quant: true' if stored.double_quant else ''}. Leave out model.quantize, set "
            f"it to {stored.quantize}, or give the original model"
        )
    return replace(settled, quantize=stored.quantize, double_quant=stored.double_quant)


# Tensors.

_inspected: set[str] = set()
_told: set[str] = set()


def inspect_model(config: ModelConfig) -> ModelConfig:
    """Return :func:`settle`'s settings, after a look at all that the files say of themselves.

    Raises:
        UserError: what :func:`settle` refuses; files that are missing, cut or no weights; tensors for which the
            configuration has no place, or which it asks for and the files lack.
    """
    settled = settle(config)
    files = find_files(settled)
    files.check_weights()
    files.check_tokenizer()
    key = repr((stamp(files), files.settings(), config.trust_remote_code))
    if not files.gguf and key not in _inspected and stored_quantization(files) is None:
        architecture = files.architecture(trust_remote_code=config.trust_remote_code)
        model, report = _load_without_values(files, architecture, trust_remote_code=config.trust_remote_code)
        check_report(report, files, model)
        _inspected.add(key)
    return settled


def _load_without_values(
    files: ModelFiles, architecture: PreTrainedConfig, *, trust_remote_code: bool
) -> tuple[Any, dict[str, Any]]:
    """Return a model without values, and transformers' report of tensors that are missing, unexpected or misshapen.

    It is loaded onto the meta device: by the names that each architecture's conversions make, but no value is
    read from the disk.
    """
    from transformers import AutoModelForCausalLM

    in_words = as_user_error(f"cannot open model {files.name!r}")
    with in_words, suppress_library_logs(), unsharded_loading(), torch.device("meta"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files.folder,
            config=architecture,
            dtype=torch.bfloat16,
            device_map={"": "meta"},
            attn_implementation="eager",
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model, report = loaded
    return model, report


def check_report(report: Mapping[str, Any], files: ModelFiles, model: Any) -> None:
    """Raise UserError for tensors that are missing, which transformers fills with random values, or have no place.

    Tensors that no model needs are passed over; of whole parts that are left out, a note says what they are.
    """
    architecture, config = type(model).__name__, model.config
    again = "Download or export the folder again"
    if report["mismatched_keys"]:
        name, stored, expected = min(report["mismatched_keys"])
        raise UserError(
            f"cannot open model {files.name!r}: its files do not fit its config.json, e.g. {name} is {tuple(stored)}, "
            f"not {tuple(expected)}. {again}"
        )
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"cannot open model {files.name!r}: its files lack {', '.join(missing[:3])} of {architecture} "
            f"({len(missing)} missing in all). {again}"
        )
    unused = [name for name in report["unexpected_keys"] if not _is_computed(name, files)]
    extras = {name: part for name in unused if (part := _extra_part(name, config))}
    if homeless := sorted(set(unused) - set(extras)):
        raise UserError(
            f"cannot open model {files.name!r}: its config.json has no place for {', '.join(homeless[:3])} of its "
            f"files ({len(homeless)} in all), and without them it is another model. {_likely(homeless, config)}"
        )
    # transformers passes over these in silence, in the architectures that it knows to have them.
    ahead = {name for name in files.headers() if _extra_part(name, config) == AHEAD}
    extras |= dict.fromkeys(ahead - {name for name, _ in model.named_parameters()}, AHEAD)
    for part in sorted(set(extras.values())):
        names = sorted(name for name, of in extras.items() if of == part)
        _tell(f"model {files.name!r}: {len(names)} tensors are not used, {part} ({names[0]})")


def _is_computed(name: str, files: ModelFiles) -> bool:
    if COMPUTED.search(name):
        return True
    shapes = [tensor.shape for stored, tensor in files.headers().items() if stored.endswith(name)]
    return bool(MASK.search(name)) and all(len(shape) == 4 for shape in shapes)


def _extra_part(name: str, config: Any) -> str | None:
    """Return what part of the checkpoint a tensor is of, if the language model works without that part."""
    layers, ahead = getattr(config, "num_hidden_layers", 0), getattr(config, "num_nextn_predict_layers", 0) or 0
    if (found := re.search(r"(^|\.)layers\.(\d+)\.", name)) and layers <= int(found[2]) < layers + ahead:
        return AHEAD
    return next((part for pattern, part in EXTRAS.items() if re.search(pattern, name)), None)


def _likely(homeless: Iterable[str], config: Any) -> str:
    numbers = [int(found[1]) for name in homeless if (found := re.search(r"\.layers\.(\d+)\.", name))]
    layers = getattr(config, "num_hidden_layers", 0)
    if numbers and max(numbers) >= layers:
        return f"Is num_hidden_layers {layers} right, where the files have layer {max(numbers)}?"
    if all(name.endswith(".bias") for name in homeless):
        return "Should config.json announce biases (attention_bias, mlp_bias)?"
    return "Take the config.json that belongs to these files"


def _tell(note: str) -> None:
    if note not in _told and launched_rank() == 0:
        _told.add(note)
        logger.warning("note: %s", note)
