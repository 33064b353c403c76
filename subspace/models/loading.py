"""The one place where a model and its tokenizer are opened.

The model comes out frozen, in eval mode, on this process's device, or spread over all of them as it loads (ZeRO-3).
It is a decoder with a language-model head. Quantisation is bitsandbytes' and leaves embedding and head as they are.

Precision: the frozen weights have ``dtype``, or are quantised and computed with in ``dtype``; adapters stay in float32
whatever the base is, so that small steps are not rounded away.

Nothing is downloaded: several processes open the same model at a time, and only ``subspace prepare`` fetches files.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subspace.distributed.zero import full_shape, is_sharded
from subspace.errors import UserError, nearest
from subspace.kernels.attention import ATTENTION_NAME, row_blocked_attention
from subspace.kernels.rms_norm import patch_rms_norm
from subspace.models import declared as declared_module
from subspace.models.files import ModelFiles, as_user_error, suppress_library_logs
from subspace.models.frozen_weights import make_int8_zero3_compatible, weight_memory_bytes
from subspace.models.lazy_safetensors import streaming_safetensors
from subspace.models.prepare import model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subspace.models.config import ModelConfig

# Tokens that checkpoints carry unused, in the order in which they are taken for padding.
SPARE_TOKENS = (
    r"<pad>|\[PAD\]|<\|pad\|>|<\|padding\|>|<\|finetune_right_pad_id\|>",
    r"<\|endoftext\|>",
    r"<\|reserved_special_token_\d+\|>|<unused\d+>|<\|placeholder\d+\|>|<\|dummy_\d+\|>",
    r"<unk>|\[UNK\]|<\|unk\|>",
)


def open_model(config: ModelConfig, zero3: dict[str, Any] | None = None) -> PreTrainedModel:
    """Open the model, frozen, in eval mode.

    Args:
        config: which model and how.
        zero3: the engine's configuration, with a number for every "auto", where ZeRO-3 is to spread the weights over
            the processes while they load; ``torch.distributed`` must be running. A quantised model loads whole on each
            of them, and the engine spreads it when it starts.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    files = _find(config)
    architecture = files.architecture(trust_remote_code=config.trust_remote_code)
    files.check_weights()
    quantization = _quantization(config, files, sharded=zero3 is not None)

    # Whether to spread is read from a global, which an earlier model may have set. It is a weak reference, and
    # generate() reads it again, so the model keeps its object alive.
    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    spread = None
    if zero3 is not None and not quantization:
        # Weights that spread as they load take their dtype from here; without the section, float32.
        as_asked = {"bf16": {"enabled": config.dtype == "bfloat16"}}
        spread = HfDeepSpeedConfig({**zero3, **as_asked})  # type: ignore[no-untyped-call]
    reading = streaming_safetensors(
        keep=None if spread or quantization else getattr(torch, config.dtype), later=spread is not None
    )
    with as_user_error(f"cannot open model {config.path!r} with {config}"), suppress_library_logs(), reading:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files.folder,
            gguf_file=files.gguf,
            config=architecture,
            dtype=getattr(torch, config.dtype),
            quantization_config=quantization,
            device_map=None if spread else {"": device()},
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below instead, by name
            output_loading_info=True,
        )
    model, report = loaded
    if report["mismatched_keys"]:
        name, stored, expected = min(report["mismatched_keys"])
        raise UserError(
            f"cannot open model {config.path!r}: its files do not fit its config.json, e.g. {name} is {tuple(stored)}, "
            f"not {tuple(expected)}. Download or export the folder again"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"cannot open model {config.path!r}: its files lack {', '.join(missing[:3])} of {type(model).__name__} "
            f"({len(missing)} missing in all). Download or export the folder again"
        )

    model.zero3 = spread
    if files.gguf:  # its weights are plain now, but it would refuse to be saved
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    _keep_as_stored(model)
    if zero3 is not None:
        make_int8_zero3_compatible(model)
    _take_kernels(model, config)
    model.requires_grad_(False)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
    opened: PreTrainedModel = model.eval()
    return opened


def open_shape(config: ModelConfig) -> PreTrainedModel:
    """Open the model without its weights, on the meta device, to count and to plan in. Frozen linears are as asked for.

    For the architectures of ``data/shapes.yaml``, by their names or their checkpoints', no file is needed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes = declared_shapes()
    if config.path in shapes and not Path(config.path).exists():
        architecture: Any = AutoConfig.for_model(**shapes[config.path].config)
    else:
        try:
            architecture = _find(config).architecture(trust_remote_code=config.trust_remote_code)
        except UserError as error:
            raise UserError(f"{error}. Without files: {nearest(config.path, shapes)}") from None
    with torch.device("meta"), as_user_error(f"cannot open model {config.path!r}"), suppress_library_logs():
        shape: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            architecture, dtype=getattr(torch, config.dtype), attn_implementation=config.attention
        )
        if config.quantize != "none":
            _quantise_shape(shape, config)
    _take_kernels(shape, config)
    shape.requires_grad_(False)
    if config.gradient_checkpointing:
        shape.activation_checkpointing_enable({"use_reentrant": False})
    opened: PreTrainedModel = shape
    return opened


def _take_kernels(model: Any, config: ModelConfig) -> None:
    """Let training on a CPU run what is faster there."""
    if device().type != "cpu":
        return
    patch_rms_norm(model)
    if config.attention != "sdpa" or config.dtype != "bfloat16":
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION_NAME, partial(row_blocked_attention, sdpa_attention_forward))
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    model.set_attn_implementation(ATTENTION_NAME)


def _quantise_shape(shape: Any, config: ModelConfig) -> None:
    """Put bitsandbytes' linears where loading would put them."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Int8Params, Params4bit  # type: ignore[attr-defined]
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(_bitsandbytes(config), pre_quantized=False)
    quantizer.preprocess_model(model=shape, device_map={"": "meta"})
    kind, double = config.quantize, config.double_quant
    for layer in shape.modules():
        if type(layer).__name__ == "Linear8bitLt":
            scales, values = torch.empty(layer.out_features), torch.empty(layer.weight.shape, dtype=torch.int8)
            layer.weight = Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
        elif type(layer).__name__ == "Linear4bit":
            packed, state = quantize_4bit(layer.weight.data, blocksize=64, quant_type=kind, compress_statistics=double)
            layer.weight = Params4bit(
                packed, False, state, 64, compress_statistics=double, quant_type=kind, bnb_quantized=True
            )
    _keep_as_stored(shape)


def declared_shapes() -> dict[str, declared_module.ModelShape]:
    """Return the declared architectures by their names and their checkpoints'."""
    shapes = declared_module.model_shapes()
    return {**{path: shape for shape in shapes.values() for path in shape.checkpoints}, **shapes}


def open_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Open the model's tokenizer, with an end token, and with a pad token that is another one.

    Where such a pad token is lacking, an unused, reserved or unknown token of the vocabulary takes its place, so no
    embedding is resized. Padding is told by position everywhere in this project, never by its id, so any token will do.
    """
    from transformers import AutoTokenizer

    files = _find(config)
    files.check_tokenizer()
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
    pad, rows = tokenizer.pad_token_id, architecture.vocab_size
    if pad is None or pad == tokenizer.eos_token_id or pad >= rows:
        tokenizer.pad_token = _spare_token(config, tokenizer, rows)
    return tokenizer


@dataclass(frozen=True)
class ModelSummary:
    """What was opened, for the log."""

    path: str
    architecture: str
    dtype: str
    quantize: str
    attention: str
    parameters: int  # of the whole model, a shared one once
    bytes: int  # held by this process
    device: str
    sharded: bool

    def __str__(self) -> str:
        quantized = "" if self.quantize == "none" else f", linears in {self.quantize}"
        share = " (this process's share)" if self.sharded else ""
        size = f"{self.parameters / 1e6:,.1f} M parameters, {self.bytes / 1e6:,.1f} MB{share} on {self.device}"
        return f"{self.path}: {self.architecture}, {size}, {self.dtype}{quantized}, {self.attention} attention"


def summarize_model(model: PreTrainedModel, config: ModelConfig) -> ModelSummary:
    """Say what was opened."""
    parameters = list(model.parameters())
    return ModelSummary(
        path=config.path,
        architecture=type(model).__name__,
        dtype=config.dtype,
        quantize=config.quantize,
        attention=config.attention,
        parameters=sum(_count(parameter) for parameter in parameters),
        bytes=weight_memory_bytes(model),
        device=str(device()),
        sharded=any(is_sharded(parameter) for parameter in parameters),
    )


def device() -> torch.device:
    """Return the device that this process computes on: the GPU of its local rank, unless DeepSpeed is told not."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def _find(config: ModelConfig) -> ModelFiles:
    path = Path(config.path).expanduser()
    return ModelFiles.at(config.path, path if path.exists() else model_folder(config.path))


def _quantization(config: ModelConfig, files: ModelFiles, *, sharded: bool) -> Any:
    """Return transformers' configuration of bitsandbytes, or None."""
    if files.gguf and (sharded or config.quantize != "none"):
        raise UserError(
            f"model {config.path!r} is a GGUF file, which is opened dequantised and whole: `quantize` and ZeRO-3 need "
            "a folder with safetensors, such as `subspace prepare` makes of the embedded model"
        )
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


def _keep_as_stored(model: Any) -> None:
    """Switch off a CPU fast path that destroys weights.

    On CPUs with AVX512-BF16, a 4-bit layer of bitsandbytes that runs in eval mode without gradients repacks its weight
    in place, for good; afterwards backward passes and dequantisation give garbage, under ZeRO-3 without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _spare_token(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, rows: int) -> str:
    """Return a token to pad with: within the embedding's rows, and neither start nor end."""
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


def _count(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)  # 4-bit weights are packed, two in a byte
    return int((full_shape(parameter) if state is None else state.shape).numel())
