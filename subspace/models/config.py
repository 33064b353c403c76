"""The settings of the frozen base model."""

from __future__ import annotations

from dataclasses import dataclass

from subspace.common.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """Settings of the base model: its source, and the dtype, quantisation and kernels of its frozen weights."""

    path: str = setting("smollm2-135m", "a prepared model's name, a hub id, or a local folder or GGUF file")
    revision: str | None = setting(
        None, "a hub model's branch, tag or commit, also given as path@revision; null for its main branch"
    )
    dtype: str = setting(
        "bfloat16", "dtype of the frozen weights and of computation", choices=("float32", "bfloat16", "float16")
    )
    quantize: str = setting("none", "quantisation of the frozen linear layers", choices=("none", "nf4", "fp4", "int8"))
    double_quant: bool = setting(False, "4-bit: quantise the scales too; saves 0.4 bits per weight")
    attention: str = setting("sdpa", "attention kernel", choices=("sdpa", "eager", "flash_attention_2"))
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    trust_remote_code: bool = setting(
        False, "run Python code from the model's folder; obeyed only where the command line of this call says it"
    )

    def __str__(self) -> str:
        double = ", double_quant: true" if self.double_quant else ""
        return f"`dtype: {self.dtype}, quantize: {self.quantize}{double}, attention: {self.attention}`"
