"""The settings of the frozen base model."""

from __future__ import annotations

from dataclasses import dataclass

from subspace.common.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """Which model, and how its frozen weights are stored and computed with."""

    path: str = setting("smollm2-135m", "a local folder or GGUF file, the name of a prepared model, or a hub id")
    dtype: str = setting(
        "bfloat16", "dtype of the frozen weights and of the computation", choices=("float32", "bfloat16", "float16")
    )
    quantize: str = setting("none", "quantisation of the frozen linears", choices=("none", "nf4", "fp4", "int8"))
    double_quant: bool = setting(False, "4-bit: quantise the scales too, which saves 0.4 bits a weight")
    attention: str = setting("sdpa", "attention kernel", choices=("sdpa", "eager", "flash_attention_2"))
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass, to save memory")
    trust_remote_code: bool = setting(False, "run the Python code that the model's folder brings along")

    def __str__(self) -> str:
        double = ", double_quant: true" if self.double_quant else ""
        return f"`dtype: {self.dtype}, quantize: {self.quantize}{double}, attention: {self.attention}`"
