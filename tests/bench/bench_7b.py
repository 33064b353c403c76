"""Open a model of LLaMA-7B's true shape in NF4 and train LoRA r 32 on it for 3 steps: this project, or HF PEFT.

    python -m tests.bench.random_model llama-7b FOLDER       13.5 GB of random weights; remove them afterwards
    python -m tests.bench.bench_7b FOLDER
    python -m tests.bench.bench_7b FOLDER --with peft
    python -m tests.bench.bench_7b FOLDER --quantize none    in bfloat16

One row of 256 tokens a step, loss on all of them, gradient checkpointing, on one process. Printed is the memory that
the process holds (resident; on a GPU, allocated): the most while loading, after it, the most in a step, at the end.
The two sides are two commands, because what one leaves behind would count for the other.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspace.adapters.inject import adapters, inject, trained_parameters
from subspace.common.host_memory import manage_malloc, resident_memory, set_malloc_trim
from subspace.data.collate import Batch
from subspace.distributed.deepspeed_config import compute_batch_layout, resolve_deepspeed_config
from subspace.distributed.device import device
from subspace.distributed.engine import init_distributed, init_engine
from subspace.models.config import ModelConfig
from subspace.models.lm_head import SummedLoss
from subspace.models.loading import open_model
from subspace.models.padding import needs_padding_mask

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
TOKENS = 256
Rows = dict[str, Tensor]
Step = Callable[[Rows], Tensor]


def held(*, most: bool = False) -> int:
    """Return what this process holds, or the most it has held since :func:`forget_most`."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()
    return resident_memory("VmHWM" if most else "VmRSS")


def forget_most() -> None:
    """Begin to look for the most that is held again."""
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def rows(vocabulary: int, count: int = 1, tokens: int = TOKENS) -> Rows:
    """Return rows of random tokens, all with a label."""
    ids = torch.randint(2, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    return {name: tensor.to(device()) for name, tensor in batch.items()}


def mean_loss(model: Any) -> Step:
    """Return this project's loss of rows, as its loop computes it: from what is known of them beforehand."""
    summed_loss = SummedLoss(model, masks_padding=needs_padding_mask(model))

    @functools.cache
    def known(ids: Tensor, labels: Tensor, mask: Tensor) -> Batch:
        return Batch.from_labels({"input_ids": ids, "labels": labels, "attention_mask": mask})

    def loss(given: Rows) -> Tensor:
        batch = known(given["input_ids"], given["labels"], given["attention_mask"])
        return summed_loss(batch) / batch.num_labelled

    return loss


def ours(folder: str, quantize: str, *, checkpointing: bool = True) -> tuple[Any, Callable[[], Step]]:
    """Open a model; return it, and what adapts it and starts this project's engine."""
    settings: dict[str, Any] = {"dtype": "bfloat16", "quantize": quantize, "gradient_checkpointing": checkpointing}
    model = open_model(ModelConfig(path=folder, **settings))

    def start() -> Step:
        inject(model, "lora", {"r": 32, "alpha": 64}, targets=TARGETS)
        raw = {"zero_optimization": {"stage": 0}}
        config = resolve_deepspeed_config(raw, compute_batch_layout(1, None, 1), dtype="bfloat16", clip=1.0).settings
        optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=1e-4, fused=True)
        engine = init_engine(model, config, optimizer, lambda step: 1.0)
        engine.train()
        mean = mean_loss(engine)

        def step(batch: Rows) -> Tensor:
            loss = mean(batch)
            engine.backward(loss)
            engine.step()
            for adapter in adapters(model).values():
                adapter.clear_cache()
            return loss.detach()

        return step

    return model, start


@contextmanager
def frozen(model: Any) -> Iterator[Step]:
    """Yield what runs a model without adapters forward, and back to the embedded input."""
    model.train()
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())

    mean = mean_loss(model)

    def step(batch: Rows) -> Tensor:
        loss = mean(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    yield step
    hook.remove()


def theirs(folder: str, quantize: str, *, checkpointing: bool = True) -> tuple[Any, Callable[[], Step]]:
    """Open a model as HF PEFT's examples do; return it, and what adapts it."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=None if quantize == "none" else quantization,
        dtype=torch.bfloat16,
        device_map={"": device()},
    )

    def start() -> Step:
        recomputed: dict[str, Any] = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        if quantize == "none":
            prepared = model
            if checkpointing:
                model.gradient_checkpointing_enable(**recomputed)
                model.enable_input_require_grads()
        else:
            prepared = peft.prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
                model, use_gradient_checkpointing=checkpointing, **recomputed
            )
        adapted = peft.get_peft_model(
            prepared, peft.LoraConfig(r=32, lora_alpha=64, target_modules=TARGETS, task_type="CAUSAL_LM")
        )
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4, fused=True)
        adapted.train()

        def step(batch: Rows) -> Tensor:
            loss: Tensor = adapted(**batch, use_cache=False).loss
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    return model, start


def measure(side: str, folder: str, steps: int, quantize: str = "nf4") -> dict[str, Any]:
    """Open the model and train; return the bytes and the losses."""
    if side == "subspace":
        init_distributed()
        set_malloc_trim(True)
    before = held()
    forget_most()
    began = time.perf_counter()
    model, start = (ours if side == "subspace" else theirs)(folder, quantize)
    loading, seconds = held(most=True), time.perf_counter() - began
    gc.collect()
    loaded = held()
    step, batch = start(), rows(model.config.vocab_size)
    forget_most()
    losses = [step(batch).item() for _ in range(steps)]
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
    parser.add_argument("--quantize", choices=("nf4", "fp4", "none"), default="nf4")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(json.dumps(measure(options.side, options.folder, options.steps, options.quantize), indent=2))


if __name__ == "__main__":
    main()
