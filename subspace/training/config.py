"""The settings of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from subspace.common.settings import MOST_COUNT, MOST_ROWS, Settings, setting

#: Bytes of optimizer state per trainable parameter: two float32 values, or two of 8 bits with a float32 scale per 256.
STATE_BYTES: Mapping[str, float] = {
    "adamw": 8,
    "adamw8bit": 2 + 2 * 4 / 256,
    "paged_adamw": 8,
    "paged_adamw8bit": 2 + 2 * 4 / 256,
}

#: Steps of warm-up where none are given, in a run of ten times as many or more; in a shorter one a tenth of its steps.
WARMUP_STEPS, WARMUP_SHARE = 100, 10


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Settings of training."""

    epochs: float = setting(3.0, "passes over the data; the last step has the rows that are left", min=0, max=1e6)
    steps: int | None = setting(
        None, "optimizer steps, all of batch_size rows; overrides epochs", min=1, max=MOST_COUNT
    )
    batch_size: int = setting(
        16, "rows per optimizer step, over all processes and micro-batches", min=1, max=MOST_ROWS, formerly="batch"
    )
    micro_batch_size: int | None = setting(
        None,
        "rows per forward pass of a process; null for its whole share",
        min=1,
        max=MOST_ROWS,
        formerly="micro_batch",
    )
    optimizer: str = setting(
        "adamw",
        "8bit stores its state in a quarter of the memory; paged moves it to CPU memory when a GPU is full",
        choices=tuple(STATE_BYTES),
    )
    compile: bool = setting(False, "compile the model's layers at the first step; needs a C++ compiler")
    liger: bool = setting(False, "on a GPU, use Liger kernels for norms, rotary embedding and MLP")
    offload_activations: bool = setting(False, "on a GPU, offload saved activations to CPU memory")
    deterministic: bool = setting(
        False, "on a GPU, give the same bits each time, as a CPU always does, so that resuming is exact; slower"
    )
    keep_memory: bool = setting(
        True,
        "on a CPU, reuse a step's freed memory in the next: 1.25 to 2 times as fast, 1.25 to 1.5 times the memory",
    )
    learning_rate: float = setting(2e-4, "peak learning rate", min=0, max=1e6)
    schedule: str = setting("linear", "learning rate schedule after warm-up", choices=("linear", "cosine", "constant"))
    warmup_steps: int | None = setting(
        None, "optimizer steps of linear warm-up; null for 100, at most a tenth of the run", min=0, max=MOST_COUNT
    )
    weight_decay: float = setting(
        0.0, "AdamW's weight decay, on factors only, never on scales, biases or prompts", min=0, max=1e3
    )
    lora_plus_lr_ratio: float = setting(
        1.0, "learning rate ratio of up factors to the other parameters (LoRA+)", min=0, max=1e6, formerly="lora_plus"
    )
    lora_plus_rule: str = setting(
        "role",
        "parameters that lora_plus_lr_ratio applies to: up factors, or as in HF PEFT also 1-d scales and biases",
        choices=("role", "peft"),
    )
    max_grad_norm: float = setting(1.0, "maximum gradient norm; 0 disables clipping", min=0, max=1e9, formerly="clip")
    seed: int = setting(0, "random seed of adapter initialisation, data order and dropout", min=0, max=2**32 - 1)
    log_every: int = setting(
        10, "optimizer steps between lines of log.jsonl and looks for values that are not finite", min=1, max=MOST_COUNT
    )
    validate_every: int | None = setting(
        None,
        "optimizer steps between validations on the held-out rows; 0 disables them; null for once an epoch where "
        "train.patience or train.save_final=best needs them, else none",
        min=0,
        max=MOST_COUNT,
    )
    patience: int = setting(
        0, "stop after so many validations without a better loss; 0 disables early stopping", min=0, max=MOST_COUNT
    )
    save_every: int = setting(200, "optimizer steps between checkpoints; 0 saves only the best", min=0, max=MOST_COUNT)
    keep_checkpoints: int = setting(2, "number of last checkpoints to keep, besides the best", min=1, max=MOST_COUNT)
    hang_minutes: float = setting(
        30.0, "minutes without progress after which the run is ended; 0 disables the watchdog", min=0, max=1e6
    )
    start_from: str | None = setting(
        None, "a run's or adapter's folder whose values the adapters begin with; null for their method's own start"
    )
    save_final: str = setting("last", "the adapter to save at the end", choices=("last", "best"), formerly="keep")
    trackers: list[str] = setting(
        ["tensorboard"], "trackers to log to besides log.jsonl; [] for none", choices=("tensorboard", "wandb")
    )

    @property
    def validates(self) -> bool:
        """Whether validations are due."""
        if self.validate_every is None:
            return bool(self.patience) or self.save_final == "best"
        return self.validate_every > 0

    def warmup(self, steps: int) -> int:
        """Return the optimizer steps of warm-up in a run of so many steps."""
        return min(WARMUP_STEPS, steps // WARMUP_SHARE) if self.warmup_steps is None else self.warmup_steps

    def validation_period(self, rows: int) -> int:
        """Return the optimizer steps between validations in a run on so many rows; 0 without validations."""
        if self.validate_every is None:
            return max(1, round(rows / self.batch_size)) if self.validates else 0
        return self.validate_every
