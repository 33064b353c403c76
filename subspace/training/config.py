"""The settings of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from subspace.common.settings import Settings, setting

#: The bytes of state for each trained number: two float32 values, or two of 8 bits with a float32 scale for 256.
STATE_BYTES: Mapping[str, float] = {
    "adamw": 8,
    "adamw8bit": 2 + 2 * 4 / 256,
    "paged_adamw": 8,
    "paged_adamw8bit": 2 + 2 * 4 / 256,
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """How to train."""

    epochs: float = setting(3.0, "passes over the data", min=0)
    steps: int | None = setting(None, "optimizer steps; where given, it replaces epochs", min=1)
    batch_size: int = setting(
        16, "rows of an optimizer step, over all processes and micro-batches", min=1, formerly="batch"
    )
    micro_batch_size: int | None = setting(
        None, "rows that a process feeds at once; none is its whole share", min=1, formerly="micro_batch"
    )
    optimizer: str = setting(
        "adamw",
        "8bit keeps its state in a quarter of the room; paged moves it to the host when a GPU is full",
        choices=tuple(STATE_BYTES),
    )
    compile: bool = setting(False, "compile the model's layers at the first step; needs a C++ compiler")
    liger: bool = setting(False, "on a GPU, Liger's kernels for norms, rotary embedding and MLP")
    offload_activations: bool = setting(False, "on a GPU, hold in the host's memory what the backward pass needs")
    keep_memory: bool = setting(
        False,
        "on a CPU, keep what a step frees for the next: a quarter to twice as fast, a quarter to half more memory",
    )
    learning_rate: float = setting(2e-4, "peak learning rate", min=0)
    schedule: str = setting("linear", "learning rate after warm-up", choices=("linear", "cosine", "constant"))
    warmup_steps: int = setting(100, "optimizer steps of linear warm-up", min=0)
    weight_decay: float = setting(0.0, "AdamW's decay, of factors only, never of scales, biases or prompts", min=0)
    lora_plus_lr_ratio: float = setting(
        1.0, "learning rate of up factors over that of the others (LoRA+)", min=0, formerly="lora_plus"
    )
    lora_plus_rule: str = setting(
        "role",
        "what lora_plus_lr_ratio speeds up: up factors, or as HF PEFT also 1-d scales and biases",
        choices=("role", "peft"),
    )
    max_grad_norm: float = setting(1.0, "largest norm of the whole gradient; 0 is no clipping", min=0, formerly="clip")
    seed: int = setting(0, "of the adapters' start, the data's order and dropout", min=0)
    log_every: int = setting(10, "optimizer steps from one line of log.jsonl to the next", min=1)
    validate_every: int = setting(0, "optimizer steps between losses on the held-out rows; 0 is never", min=0)
    patience: int = setting(0, "stop after so many validations without a better loss; 0 is never", min=0)
    save_every: int = setting(200, "optimizer steps between checkpoints; 0 is none but of the best", min=0)
    keep_checkpoints: int = setting(2, "how many of the last checkpoints stay, besides the best", min=1)
    hang_minutes: float = setting(30.0, "minutes without a sign of life that end the run; 0 is never", min=0)
    save_final: str = setting("last", "the adapter that the run ends with", choices=("last", "best"), formerly="keep")
    trackers: list[str] = setting(["tensorboard"], "where the log goes besides log.jsonl: tensorboard, wandb")
