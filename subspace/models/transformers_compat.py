"""All uses of transformers' private names and internals, and the one function of it that is replaced.

The rest of the package uses transformers' public interface, and calls these functions for everything else. Each line of
the table has a canary in `tests/models/test_transformers_compat.py`, which fails with the reason below when an upstream
release changes the name.

| internal name | checked with | what breaks without it | why it is used |
| --- | --- | --- | --- |
| `config._attn_implementation` | 5.23.0 | packing for flash attention, trees, prefixes | no public reader |
| `modeling_utils.safe_open` | 5.23.0 | memory while a model loads | files are read there, and nowhere else |
| `LazyTensor` in `modeling_utils.load_state_dict` | 5.23.0 | ZeRO-3 takes a whole checkpoint at once | same |
| `integrations.deepspeed.unset_hf_deepspeed_config` | 5.23.0 | what follows a ZeRO-3 model loads sharded | a global |
| `integrations.deepspeed._hf_deepspeed_config_weak_ref` | 5.23.0 | what is inspected beside a ZeRO-3 model | same |
| `integrations.deepspeed.HfDeepSpeedConfig` | 5.23.0 | ZeRO-3 loading | its weak reference is the switch |
| `model.hf_quantizer`, `model.is_quantized` | 5.23.0 | models from GGUF cannot be saved; merging | no public way |
| `modeling_auto.MODEL_FOR_*_MAPPING_NAMES` | 5.23.0 | encoders are opened as if they were decoders | no public list |
| `quantizers.auto.AutoHfQuantizer` | 5.23.0 | planning for quantised models | quantises without any file |
| `integrations.sdpa_attention`, `masking_utils.sdpa_mask` | 5.23.0 | attention on a CPU | our fallback |
| `model._no_split_modules` | 5.23.0 | `train.compile` | the only list of a model's layer classes |
| `model._is_stateful` | 5.23.0 | Mamba and its kin are scored by trees and drafts | no public reader |
| `attention.layer_idx`, `embedding.scalar_embed_scale` | 5.23.0 | prefixes, prompts | no public reader |
| `masking_utils.find_packed_sequence_indices` | 5.23.0 | a wait for the GPU in every micro-batch | asks for a value |
| `cu_seq_lens_q` and three more arguments | 5.23.0 | packing with flash attention waits in every layer | documented |
| `norm.variance_epsilon` | 5.23.0 | the fast norm on a CPU | read by `kernels/rms_norm.py` |
| sources of classes with `A_log`; names in `Router` | 5.23.0 | adapters that are passed by, or crash | no list |
| `experts.is_transposed` | 5.23.0 | adapters at experts whose shapes leave it open | no public reader |

Functions that are public but documented as experimental (`AttentionInterface.register`) are used here too.
"""

from __future__ import annotations

import inspect
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace.common.patching import patched
from subspace.distributed.deepspeed_compat import keep_linear_protocol

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

#: Lock held while transformers' file reader is replaced: two threads would restore each other's replacement.
_READER = threading.RLock()
#: Objects to keep alive as long as a model; held here, so that no attribute is set on a user's model.
_KEPT_ALIVE: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def attention_kernel(config: PreTrainedConfig | Any) -> str:
    """Return a model's attention implementation: ``sdpa``, ``eager``, ``flash_attention_2``, or a registered one."""
    kernel: str = config._attn_implementation
    return kernel


def is_stateful(model: Any) -> bool:
    """Return True if transformers says that a model's cache cannot be rolled back."""
    return bool(getattr(model, "_is_stateful", False))


def register_attention(name: str, attention: Callable[..., Any]) -> None:
    """Register an attention function under a name for ``model.set_attn_implementation(name)``.

    Args:
        name: must not be one that transformers uses, so that other code in this process is unaffected.
        attention: the function, whose first argument is transformers' sdpa attention as a fallback. Masks are made as
            for sdpa.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, partial(attention, sdpa_attention_forward))
    AttentionMaskInterface.register(name, sdpa_mask)


def flash_attention_inputs(starts: Tensor, longest: int) -> dict[str, Any]:
    """Return the model's arguments with the bounds of packed rows, which flash attention would derive in every layer.

    Args:
        starts: ``(rows + 1,)``, int32, on the model's device: each row's first token, and the number of all tokens.
        longest: the number of tokens of the longest row.
    """
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


@contextmanager
def known_packing(*, packed: bool) -> Iterator[None]:
    """Inside the block, tell transformers whether sequences have packed rows, where it would look at positions.

    It looks wherever there is no attention mask, and reads a value, for which a GPU would finish all its work first.
    """
    from transformers import masking_utils

    with patched(masking_utils, "find_packed_sequence_indices", _row_numbers if packed else lambda positions: None):
        yield


def _row_numbers(position_ids: Tensor) -> Tensor:
    """Return the number of the row that each token belongs to, ``(B, T)``, from positions that restart with each."""
    first = position_ids[:, :1] - 1
    return (position_ids.diff(dim=-1, prepend=first) != 1).cumsum(-1)


@contextmanager
def reading_files_with(open_file: Callable[..., Any], folder: Path) -> Iterator[None]:
    """Inside the block, make transformers read the safetensors files of one folder by ``open_file``.

    The name is replaced in transformers' module, so for all threads of the process, for as long as the block runs.
    Files of other folders are opened as usual, and a second thread that enters waits.
    """
    from transformers import modeling_utils

    with _READER:
        original = modeling_utils.safe_open  # type: ignore[attr-defined]

        def opened(file: str | Path, *args: Any, **kwargs: Any) -> Any:
            ours = Path(file).parent.resolve() == folder.resolve()
            return (open_file if ours else original)(file, *args, **kwargs)

        with patched(modeling_utils, "safe_open", opened):
            yield


def zero3_loading(engine: Mapping[str, Any] | None) -> Any:
    """Make the next ``from_pretrained`` shard weights as they load (ZeRO-3), or, with None, not shard.

    transformers reads that from a global, a weak reference which an earlier model may have left set.

    Returns:
        The object that keeps the global alive. ``generate`` reads it again: pass it to :func:`keep_alive_with`.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    if engine is not None:
        keep_linear_protocol()
    return None if engine is None else HfDeepSpeedConfig(dict(engine))  # type: ignore[no-untyped-call]


@contextmanager
def unsharded_loading() -> Iterator[None]:
    """Load whole what is loaded inside, whatever a ZeRO-3 model of this process has left set."""
    from transformers.integrations import deepspeed

    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


def keep_alive_with(model: nn.Module, thing: Any) -> None:
    """Keep an object alive as long as the model."""
    if thing is not None:
        _KEPT_ALIVE[model] = thing


def is_causal_lm(model_type: str) -> bool:
    """Return True if transformers has a decoder with a language-model head of this type."""
    from transformers.models.auto import modeling_auto

    return model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def is_masked_lm(model_type: str) -> bool:
    """Return True if this is a bidirectional masked language model, such as BERT."""
    from transformers.models.auto import modeling_auto

    return model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def is_quantized(model: Any) -> bool:
    """Return True if the model was quantised as it was loaded."""
    return bool(getattr(model, "is_quantized", False))


def mark_unquantized(model: Any) -> None:
    """Mark a model that was loaded dequantised, from a GGUF file or fp8, as unquantised, so that it can be saved."""
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def replace_linears(model: nn.Module, quantization: Any) -> None:
    """Replace linear layers by bitsandbytes' on the meta device, as loading with this quantisation would."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "meta"})


def layer_number(attention: Any) -> int:
    """Return an attention layer's index in the key-value cache."""
    number: int = attention.layer_idx
    return number


def embedding_gain(embedding: nn.Module) -> float:
    """Return the factor on the embedding's rows: 1 except for Gemma, whose embedding class has its own."""
    return float(getattr(embedding, "scalar_embed_scale", 1.0))


def is_router(module: nn.Module) -> bool:
    """Return True for a mixture's router, which may derive from a linear layer (Llama 4, Phi) and return more."""
    return type(module).__name__.endswith("Router")


def bypassed_layers(module: nn.Module) -> frozenset[str]:
    """Return the names of the linear layers of a state-space mixer whose weights its code takes out of them.

    Mamba's mixers hand them to fused kernels, so that an adapter in the layer's place would never be called.
    """
    return _weights_read(type(module)) if hasattr(module, "A_log") else frozenset()  # type: ignore[arg-type]


@cache
def _weights_read(mixer: type) -> frozenset[str]:
    try:
        source = inspect.getsource(mixer)
    except (OSError, TypeError):  # there is none
        return frozenset()
    return frozenset(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device))", source))


def experts_are_transposed(experts: Any, shapes: Mapping[str, tuple[int, ...]]) -> bool | None:
    """Return True if experts' matrices are stored ``(experts, in, out)``, False if ``(experts, out, in)``.

    Args:
        experts: the module that holds them.
        shapes: of its parameters ``gate_up_proj`` or ``up_proj``, and ``down_proj``.

    Returns:
        None for a module of another kind.
    """
    declared = getattr(experts, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    if not {"gate_up_proj", "down_proj"} <= shapes.keys():
        return None
    (_, a, b), (_, c, d) = shapes["gate_up_proj"], shapes["down_proj"]  # (2 i, h) and (h, i), or (h, 2 i) and (i, h)
    if (a, b) == (2 * d, c):
        return False
    return True if (a, b) == (d, 2 * c) else None


def experts_per_token(config: Any, experts: int) -> int:
    """Return how many of a mixture's routed experts compute each token; all of them where the model does not say."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    return next((int(found) for name in names if (found := getattr(config, name, None))), experts)


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return the model's decoder layers; empty if the model does not declare them."""
    classes = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in classes]
