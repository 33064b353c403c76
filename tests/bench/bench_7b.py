"""Open a model of LLaMA-7B's true shape in NF4 and train LoRA r 32 on it for 3 steps: this project, or HF PEFT.

    python -m tests.bench.random_model llama-7b FOLDER       13.5 GB of random weights; remove them afterwards
    python -m tests.bench.bench_7b FOLDER
    python -m tests.bench.bench_7b FOLDER --with peft

One row of 256 tokens a step, loss on all of them, gradient checkpointing, on one process. Printed is the memory that
the process holds (resident; on a GPU, allocated): the most while loading, after it, the most in a step, at the end.
The two sides are two commands, because what one leaves behind would count for the other.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from subspace.adapters.inject import inject, trained_parameters
from subspace.common.host_memory import manage_malloc, resident_memory, set_malloc_trim
from subspace.distributed.deepspeed_config import compute_batch_layout, resolve_deepspeed_config
from subspace.distributed.engine import init_distributed, init_engine
from subspace.models.config import ModelConfig
from subspace.models.lm_head import summed_loss
from subspace.models.loading import open_model

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
TOKENS = 256


def held(*, most: bool = False) -> int:
    """Return what this process holds, or the most it has held since :func:`forget_most`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()
    return resident_memory("VmHWM" if most else "VmRSS")


def forget_most() -> None:
    """Begin to look for the most that is held again."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def rows(vocabulary: int) -> dict[str, torch.Tensor]:
    """Return one row of random tokens, all with a label."""
    ids = torch.randint(2, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def ours(folder: str) -> tuple[Any, Any]:
    """Open, adapt and start this project's engine; return the model, and what does a step."""
    model = open_model(ModelConfig(path=folder, dtype="bfloat16", quantize="nf4", gradient_checkpointing=True))

    def start() -> Any:
        inject(model, "lora", {"r": 32, "alpha": 64}, targets=TARGETS)
        raw = {"zero_optimization": {"stage": 0}}
        config = resolve_deepspeed_config(raw, compute_batch_layout(1, None, 1), dtype="bfloat16", clip=1.0).settings
        optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=1e-4, fused=True)
        engine = init_engine(model, config, optimizer, lambda step: 1.0)
        engine.train()

        def step(batch: dict[str, torch.Tensor]) -> float:
            loss = summed_loss(engine, batch) / (TOKENS - 1)
            engine.backward(loss)
            engine.step()
            return loss.item()

        return step

    return model, start


def theirs(folder: str) -> tuple[Any, Any]:
    """Open and adapt as HF PEFT's examples do; return the model, and what does a step."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=quantization,
        dtype=torch.bfloat16,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    )

    def start() -> Any:
        prepared = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[no-untyped-call]
        adapted = peft.get_peft_model(
            prepared, peft.LoraConfig(r=32, lora_alpha=64, target_modules=TARGETS, task_type="CAUSAL_LM")
        )
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4, fused=True)
        adapted.train()

        def step(batch: dict[str, torch.Tensor]) -> float:
            loss = adapted(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.item())

        return step

    return model, start


def measure(side: str, folder: str, steps: int) -> dict[str, Any]:
    """Open the model and train; return the bytes and the losses."""
    if side == "subspace":
        init_distributed()
        set_malloc_trim(True)
    before = held()
    forget_most()
    began = time.perf_counter()
    model, start = (ours if side == "subspace" else theirs)(folder)
    loading, seconds = held(most=True), time.perf_counter() - began
    gc.collect()
    loaded = held()
    step, batch = start(), rows(model.config.vocab_size)
    forget_most()
    losses = [step(batch) for _ in range(steps)]
    return {
        "side": side,
        "libraries": before,
        "most_while_loading": loading,
        "loaded": loaded,
        "loading_over_loaded": round(loading / loaded, 3),
        "most_in_a_step": held(most=True),
        "at_the_end": held(),
        "seconds_to_load": round(seconds, 1),
        "losses": [round(loss, 4) for loss in losses],
    }


def main() -> None:
    """Measure one side and print it."""
    manage_malloc()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--with", dest="side", choices=("subspace", "peft"), default="subspace")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(json.dumps(measure(options.side, options.folder, options.steps), indent=2))


if __name__ == "__main__":
    main()
