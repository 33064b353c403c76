"""Loading of models and tokenizers.

The model is returned frozen, in eval mode, on this process's device, or sharded over all of them as it loads (ZeRO-3).
It is a decoder with a language-model head. Quantisation uses bitsandbytes and excludes embedding and head.

Precision: the frozen weights have ``dtype``, or are quantised with computation in ``dtype``; adapters are always
float32, so that small updates are not rounded away.

Nothing is downloaded: several processes may load the same model at once, and only ``subspace prepare`` downloads files.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subspace.common.progress import signs
from subspace.data.chat.limits import ModelLimits
from subspace.distributed.device import device
from subspace.distributed.zero import is_sharded
from subspace.errors import UserError, nearest
from subspace.kernels.attention import ATTENTION_NAME, row_blocked_attention
from subspace.kernels.rms_norm import patch_rms_norm
from subspace.models.base_record import note_origin
from subspace.models.bitsandbytes_compat import (
    keep_4bit_weights_intact,
    make_int8_zero3_compatible,
    quantization_kind,
    quantize_meta_weights,
)
from subspace.models.config import ModelConfig
from subspace.models.declared import ModelShape, model_shapes
from subspace.models.experts.weights import dtype_of_experts
from subspace.models.files import ModelFiles, as_user_error, read_json, suppress_library_logs
from subspace.models.frozen_weights import num_parameters, weight_memory_bytes
from subspace.models.inspection import DEQUANTIZED, check_report, inspect_model, settle, stored_quantization
from subspace.models.lazy_safetensors import DTYPES, streaming_safetensors
from subspace.models.prepare import find_files
from subspace.models.transformers_compat import (
    keep_alive_with,
    mark_unquantized,
    register_attention,
    replace_linears,
    unsharded_loading,
    zero3_loading,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Unused tokens in common checkpoints, in order of preference for padding.
SPARE_TOKENS = (
    r"<pad>|\[PAD\]|<\|pad\|>|<\|padding\|>|<\|finetune_right_pad_id\|>",
    r"<\|endoftext\|>",
    r"<\|reserved_special_token_\d+\|>|<unused\d+>|<\|placeholder\d+\|>|<\|dummy_\d+\|>",
    r"<unk>|\[UNK\]|<\|unk\|>",
)


def open_model(
    config: ModelConfig,
    zero3: dict[str, Any] | None = None,
    *,
    held: torch.dtype | None = None,
    where: torch.device | None = None,
) -> PreTrainedModel:
    """Load the model, frozen, in eval mode.

    Args:
        config: the model's settings.
        zero3: the engine's configuration, with a number for every "auto", if ZeRO-3 is to shard the weights over
            the processes while they load; ``torch.distributed`` must be running. A quantised model loads whole on each
            of them, and the engine shards it when it starts.
        held: dtype of the weights, where it is not the one to compute in: see
            :mod:`subspace.models.float32_blocks`.
        where: the device; default: this process's.

    Raises:
        UserError: no such model, damaged or mismatched files, or an unsupported combination of settings.
    """
    signs.note("the loading of the model")
    config = settle(config)
    files = find_files(config)
    files.check_weights()
    if zero3 is not None and not files.gguf:
        inspect_model(config)  # loading reports nothing of tensors without a place while it shards
    where = where or device()
    model, report = _load_weights(config, files, zero3, held or getattr(torch, config.dtype), where)
    check_report(report, files, model)
    if files.gguf or _dequantized(files):
        mark_unquantized(model)
    elif stored_quantization(files) is not None:
        _cast_unquantized(model, held or getattr(torch, config.dtype))
    keep_4bit_weights_intact(model)
    if zero3 is not None:
        make_int8_zero3_compatible(model)
    _prepare_to_train(model, config, where)
    if config.gradient_checkpointing:
        model.config.use_cache = False
    note_origin(model, config, files)
    opened: PreTrainedModel = model.eval()
    return opened


def _load_weights(
    config: ModelConfig, files: ModelFiles, zero3: dict[str, Any] | None, dtype: torch.dtype, where: torch.device
) -> tuple[Any, dict[str, Any]]:
    """Return the model as transformers loads it, and its report of missing, unexpected and mismatched tensors."""
    from transformers import AutoModelForCausalLM

    architecture: Any = files.architecture(trust_remote_code=config.trust_remote_code)
    quantization = _quantization(config, files, architecture, sharded=zero3 is not None)
    whole = quantization is not None or stored_quantization(files) is not None
    sharding = zero3 is not None and not whole
    # Weights that are sharded as they load take their dtype from the engine's bf16 section; without it, float32.
    engine = {**zero3, "bf16": {"enabled": config.dtype == "bfloat16"}} if zero3 is not None and sharding else None
    loading = zero3_loading(engine)
    reading: contextlib.AbstractContextManager[None]
    if sharding or where.type == "cpu":
        reading = streaming_safetensors(files.folder, mmap_dtype=None if sharding or whole else dtype, lazy=sharding)
    else:  # each tensor is copied to the device from the mapped file, whose pages the system may drop
        reading = contextlib.nullcontext()
    with as_user_error(f"cannot open model {config.path!r} with {config}"), suppress_library_logs(), reading:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files.folder,
            gguf_file=files.gguf,
            config=architecture,
            dtype=dtype,
            quantization_config=quantization,
            device_map=None if sharding else {"": where},
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # check_report raises for them, by name
            output_loading_info=True,
        )
    model, report = loaded
    keep_alive_with(model, loading)
    return model, report


def stored_dtype(config: ModelConfig) -> torch.dtype:
    """Return the 16-bit dtype that all tensors in the model's files have; float32 if they do not have one."""
    found = {DTYPES.get(tensor.dtype) for tensor in find_files(config).headers().values()}
    return next((dtype for dtype in (torch.float16, torch.bfloat16) if found == {dtype}), torch.float32)


def _cast_unquantized(model: Any, dtype: torch.dtype) -> None:
    """Give a quantised model's other weights their dtype: from quantised files they come as they are stored."""
    for parameter in model.parameters():
        if quantization_kind(parameter) == "none" and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _dequantized(files: ModelFiles) -> bool:
    stored = stored_quantization(files)
    return stored is not None and stored.method in DEQUANTIZED


def _prepare_to_train(model: Any, config: ModelConfig, where: torch.device) -> None:
    """Freeze a model, with values or on the meta device, and apply the settings of ``config`` for a device."""
    if where.type == "cpu":
        patch_rms_norm(model)
        if config.attention == "sdpa" and config.dtype == "bfloat16":
            register_attention(ATTENTION_NAME, row_blocked_attention)
            model.set_attn_implementation(ATTENTION_NAME)
    model.requires_grad_(False)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})


def open_shape(config: ModelConfig, planned: torch.device | None = None) -> PreTrainedModel:
    """Build the model on the meta device, quantised as configured, for counting parameters and planning.

    The architectures of ``data/shapes.yaml``, given by name or by a checkpoint's name, need no files. ``planned`` is
    where the model is to compute; default: this process's device.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes = {} if Path(config.path).exists() else declared_shapes()
    if config.path in shapes:
        architecture: Any = AutoConfig.for_model(**shapes[config.path].config)
    else:
        try:
            files = find_files(config)
        except UserError as error:
            raise UserError(f"{error}. Without files: {nearest(config.path, shapes)}") from None
        config = inspect_model(config) if files.weight_files() else settle(config)  # a shape needs no weights
        architecture = files.architecture(trust_remote_code=config.trust_remote_code)
    named = as_user_error(f"cannot open model {config.path!r}")
    with torch.device("meta"), named, suppress_library_logs(), unsharded_loading():
        shape: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            architecture, dtype=getattr(torch, config.dtype), attn_implementation=config.attention
        )
        if config.quantize != "none":
            replace_linears(shape, _bitsandbytes(config))
            quantize_meta_weights(shape, config.quantize, double_quant=config.double_quant)
            keep_4bit_weights_intact(shape)
    _prepare_to_train(shape, config, planned or device())
    opened: PreTrainedModel = shape
    return opened


def declared_shapes() -> dict[str, ModelShape]:
    """Return the declared architectures by their names and their checkpoints' names."""
    shapes = model_shapes()
    return {**{path: shape for shape in shapes.values() for path in shape.checkpoints}, **shapes}


def open_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with an EOS token and a different pad token.

    If there is no such pad token, an unused, reserved or unknown token of the vocabulary is used, so no embedding is
    resized. All code identifies padding by its position, never by its id, so any token will do.
    """
    from transformers import AutoTokenizer

    files = find_files(config)
    files.check_tokenizer()
    _check_special_tokens(files)
    architecture = files.architecture(trust_remote_code=config.trust_remote_code)
    with as_user_error(f"cannot open the tokenizer of model {config.path!r}"), suppress_library_logs():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            files.folder, gguf_file=files.gguf, trust_remote_code=config.trust_remote_code, local_files_only=True
        )
    if tokenizer.eos_token_id is None:
        ends = architecture.eos_token_id
        end = ends[0] if isinstance(ends, list) else ends
        if end is None:
            raise UserError(
                f"the tokenizer of model {config.path!r} has no end token, so no answer could be learnt to end. "
                f'Add "eos_token": "..." to {files.folder / "tokenizer_config.json"}'
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    pad, rows = tokenizer.pad_token_id, architecture.get_text_config().vocab_size
    if tokenizer.eos_token_id >= rows:
        raise UserError(
            f"the tokenizer of model {config.path!r} ends a text with {tokenizer.eos_token!r}, its token "
            f"{tokenizer.eos_token_id}, but the model's embedding has {rows} rows. Is it the tokenizer of this model? "
            f'"eos_token" of {files.folder / "tokenizer_config.json"} must name a token of the vocabulary'
        )
    if pad is None or pad == tokenizer.eos_token_id or pad >= rows:
        tokenizer.pad_token = _spare_token(config, tokenizer, rows)
    return tokenizer


def _check_special_tokens(files: ModelFiles) -> None:
    """Raise UserError for special tokens that are empty texts, which some exports write where there is none."""
    if files.gguf:
        return
    for file in (files.folder / "tokenizer_config.json", files.folder / "special_tokens_map.json"):
        for name, token in read_json(file).items():
            text = token.get("content") if isinstance(token, dict) else token
            if re.fullmatch(r"(bos|eos|unk|pad)_token", name) and text == "":
                raise UserError(
                    f"the tokenizer of model {files.name!r} has an empty {name}, which no text can hold, in {file}. "
                    f'Set "{name}" there to the text of that token, or to null'
                )


def model_limits(config: ModelConfig) -> ModelLimits:
    """Return how long a row may be for the model, and how many rows its embedding has."""
    files = find_files(config)
    architecture: Any = files.architecture(trust_remote_code=config.trust_remote_code)
    text = architecture.get_text_config()
    positions, scaling = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
    original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if positions and original and factor:
        positions = max(positions, int(original * factor))
    return ModelLimits(positions, getattr(text, "vocab_size", None))


@dataclass(frozen=True)
class ModelSummary:
    """Summary of a loaded model, for the log."""

    path: str
    revision: str | None  # the hub's commit
    architecture: str
    dtype: str
    quantize: str  # what the linear layers are
    attention: str
    parameters: int  # of the full model; shared ones count once
    bytes: int  # on this process
    device: str
    sharded: bool
    experts: str = ""  # the dtype of experts' matrices, which bitsandbytes cannot quantise

    def __str__(self) -> str:
        quantized = "" if self.quantize == "none" else f", linears in {self.quantize}"
        if quantized and self.experts:
            quantized += f" (not the experts, which bitsandbytes leaves in {self.experts})"
        share = " (this process's share)" if self.sharded else ""
        size = f"{self.parameters / 1e6:,.1f} M parameters, {self.bytes / 1e6:,.1f} MB{share} on {self.device}"
        return f"{self.path}: {self.architecture}, {size}, {self.dtype}{quantized}, {self.attention} attention"


def summarize_model(model: PreTrainedModel, config: ModelConfig) -> ModelSummary:
    """Return a summary of the loaded model, before anything is put into it."""
    parameters = list(model.parameters())
    kinds = sorted({quantization_kind(parameter) for parameter in parameters} - {"none"})
    return ModelSummary(
        path=config.path,
        revision=config.revision,
        architecture=type(model).__name__,
        dtype=config.dtype,
        quantize=", ".join(kinds) or "none",
        attention=config.attention,
        parameters=sum(num_parameters(parameter) for parameter in parameters),
        bytes=weight_memory_bytes(model),
        device=str(device()),
        sharded=any(is_sharded(parameter) for parameter in parameters),
        experts=dtype_of_experts(model),
    )


def _quantization(config: ModelConfig, files: ModelFiles, architecture: Any, *, sharded: bool) -> Any:
    """Return transformers' configuration of what is to be quantised or dequantised as it loads, or None."""
    if files.gguf and (sharded or config.quantize != "none"):
        raise UserError(
            f"model {config.path!r} is a GGUF file, which is opened dequantised and whole: `quantize` and ZeRO-3 need "
            "a folder with safetensors, such as `subspace prepare` makes of the embedded model"
        )
    stored = stored_quantization(files)
    if stored is not None and stored.method in DEQUANTIZED:
        import transformers

        return getattr(transformers, DEQUANTIZED[stored.method])(dequantize=True)
    if stored is not None:  # the files' own, but for the dtype to compute in
        architecture.quantization_config["bnb_4bit_compute_dtype"] = config.dtype
        return None
    if config.quantize == "none":
        return None
    with as_user_error(f"cannot quantise model {config.path!r} with {config}"):
        return _bitsandbytes(config)


def _bitsandbytes(config: ModelConfig) -> Any:
    from transformers import BitsAndBytesConfig

    if config.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantize,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )


def _spare_token(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, rows: int) -> str:
    """Return a token to pad with: within the embedding's rows, and neither BOS nor EOS."""
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    free = [token for token, number in vocabulary if number not in taken and number < rows]
    for pattern in SPARE_TOKENS:
        for token in free:
            if re.fullmatch(pattern, token):
                return token
    special = [token for token in tokenizer.all_special_tokens if token in free]
    if special:
        return special[-1]
    raise UserError(
        f"the tokenizer of model {config.path!r} has no pad token besides its end token {tokenizer.eos_token!r}, and "
        'no unused token to take. Add "pad_token": "..." to its tokenizer_config.json, naming a token but the end token'
    )
