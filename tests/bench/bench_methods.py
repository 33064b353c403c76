"""Time and memory of a training step of every method, beside the frozen model alone and beside HF PEFT.

    python -m tests.bench.bench_methods --markdown
    python -m tests.bench.bench_methods --methods lora dora ssb --rounds 5

The model has the width of LLaMA-7B (4096, 11008, 32 heads), 4 layers of it, a vocabulary of 2,048, random weights in
bfloat16, and is built once: all sides share its tensors. A step is forward, backward and AdamW on the adapters, on the
same random tokens, r = 32 on q, k, v, up and down, on the GPU if there is one. The frozen side is forward and the
gradient with respect to the embedded input. Each round takes a step of each side in turn; figures are medians over
rounds of the ratio within a round. Memory is the highest resident size (Linux; on a GPU, allocated) during a step less
that before it, in MB. HF PEFT is left out where it is not installed.

What singular vectors a method works with does not change what a step costs, so here they are random: decomposing 20
weights of this size would take half an hour.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from subspace.adapters import linalg
from subspace.adapters.base import TrainProgress
from subspace.adapters.inject import adapters, inject, trained_parameters
from subspace.adapters.registry import list_methods
from subspace.common.host_memory import resident_memory
from subspace.common.patching import patched
from subspace.distributed.device import device
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
R = 32
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"target_r": 16},
    "lora-dash": {"launch": 1},
    "p-tuning": {"hidden": 4096},
    "parallel": {"bottleneck": R},
}
Step = Callable[[], float]


def main() -> None:
    """Run the rounds of every method and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(list_methods()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2, help="of 256 tokens")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--markdown", action="store_true", help="print a table instead of JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    weights = build(options.layers, getattr(torch, options.dtype))
    torch.manual_seed(1)
    ids = torch.randint(0, 2048, (options.rows, 256)).to(device())
    found = {}
    for name in options.methods:
        with random_decompositions():
            found[name] = measure(weights, name, ids, options.rounds)
        print(json.dumps({name: found[name]}), flush=True)
    if options.markdown:
        print(markdown(found))


def build(layers: int, dtype: torch.dtype, **changes: Any) -> nn.Module:
    """Return the model that all sides share; ``changes`` replace values of its configuration."""
    config = LlamaConfig(**{"num_hidden_layers": layers, "vocab_size": 2048, "tie_word_embeddings": False, **changes})
    torch.set_default_dtype(dtype)
    with device():
        model = LlamaForCausalLM(config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return model


def share(model: Any) -> Any:
    """Return another model with the very same tensors."""
    with torch.device("meta"):
        other = LlamaForCausalLM(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.model.rotary_emb = model.model.rotary_emb
    return other.requires_grad_(False).train()


@contextmanager
def random_decompositions() -> Iterator[None]:
    """Let methods start from random singular vectors; nothing is read from a cache or written there."""

    def random(W: Tensor, kind: str, compute: Callable[[], linalg.SVD]) -> linalg.SVD:
        number = kind.rpartition("-")[2]
        k = int(number) if number.isdigit() else min(W.shape)
        U, sigma, Vt = torch.randn(len(W), k) / 64, torch.rand(k).sort().values.flip(0), torch.randn(k, W.shape[1]) / 64
        return linalg.SVD(U.to(W.device), sigma.to(W.device), Vt.to(W.device))

    with patched(linalg, "_cached", random):
        yield


def measure(weights: nn.Module, name: str, ids: Tensor, rounds: int) -> dict[str, float]:
    """Return the figures of one method."""
    sides = {"frozen": frozen_side(weights, ids), "subspace": our_side(weights, name, ids)}
    theirs = peft_side(weights, name, ids)
    if theirs:
        sides["peft"] = theirs
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, list[float]] = {side: [] for side in sides}
    for round_number in range(rounds + 1):
        for side, step in sides.items():
            if device().type == "cpu":
                gc.collect()
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed counts until it is given back
            before = reset_peak()
            began = time.perf_counter()
            step()  # it ends with its loss read, so that a GPU has done all of it
            took = time.perf_counter() - began
            if round_number:  # the first one warms up
                seconds[side].append(took)
                peaks[side].append(peak() - before)
    ratio = {s: statistics.median(a / b for a, b in zip(seconds[s], seconds["frozen"], strict=True)) for s in sides}
    figures = {
        "trained": float(TRAINED[name]),
        "frozen_seconds": round(statistics.median(seconds["frozen"]), 5),
        "time": round(ratio["subspace"], 3),
        "memory": round(statistics.median(peaks["subspace"])),
        "frozen_memory": round(statistics.median(peaks["frozen"])),
    }
    if "peft" in sides:
        figures |= {"peft_time": round(ratio["peft"], 3), "peft_memory": round(statistics.median(peaks["peft"]))}
        both = zip(seconds["subspace"], seconds["peft"], strict=True)
        figures["over_peft"] = round(statistics.median(a / b for a, b in both), 3)
    return figures


TRAINED: dict[str, int] = {}


def loss_of(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def frozen_side(weights: nn.Module, ids: Tensor) -> Step:
    """The frozen model's forward pass and input gradient."""
    model = share(weights)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())

    def step() -> float:
        loss = loss_of(model, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    return step


def our_side(weights: nn.Module, name: str, ids: Tensor) -> Step:
    """This project's adapters."""
    model = share(weights)
    if name == "full":
        model = model.float() if next(model.parameters()).dtype == torch.float32 else model
    fields = list_methods()[name].Config.__dataclass_fields__
    settings = {**({"r": R} if "r" in fields else {}), **SETTINGS.get(name, {})}
    linear = list_methods()[name].site == "linear" and name != "full"
    inject(model, name, settings, targets=TARGETS if linear else None)
    parameters = list(trained_parameters(model).values())
    TRAINED[name] = sum(p.numel() for p in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    group = list(adapters(model).values())
    steps = [0]

    def step() -> float:
        steps[0] += 1
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        type(group[0]).before_step(group, TrainProgress(steps[0], 100), DeepSpeedOptimizerAccess(optimizer=optimizer))
        optimizer.step()
        type(group[0]).after_step(group, TrainProgress(steps[0], 100), DeepSpeedOptimizerAccess(optimizer=optimizer))
        for adapter in group:
            adapter.clear_cache()
        return loss.item()

    return step


def peft_side(weights: nn.Module, name: str, ids: Tensor) -> Step | None:
    """HF PEFT's form of the method, where it has one."""
    try:
        import peft
    except ImportError:
        return None
    low_rank: dict[str, Any] = {"r": R, "lora_alpha": 32, "target_modules": TARGETS}
    task: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    configs: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(**low_rank),
        "dora": lambda: peft.LoraConfig(**low_rank, use_dora=True),
        # Its own start would decompose; a LoRA of W's residual costs the same step.
        "pissa": lambda: peft.LoraConfig(**low_rank),
        "adalora": lambda: peft.AdaLoraConfig(
            init_r=R, target_r=16, lora_alpha=32, target_modules=TARGETS, total_step=100, tinit=10, tfinal=30
        ),
        "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),
        "ssl": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=TARGETS),
        "liera": lambda: peft.HiraConfig(r=R, target_modules=TARGETS),
        "bitfit": lambda: peft.BeftConfig(target_modules=TARGETS),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=20, **task),
        "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=20, encoder_hidden_size=4096, **task),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=30, **task),
    }
    if name not in configs:
        return None
    model: Any = peft.get_peft_model(share(weights), configs[name]())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    steps = [0]

    def step() -> float:
        steps[0] += 1
        optimizer.zero_grad()
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -ids.shape[1] :]
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if name == "adalora":
            model.base_model.update_and_allocate(steps[0])
        return loss.item()

    return step


def reset_peak() -> float:
    """Forget the most that was held so far; return what is held now, in MB."""
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """Return the most that was held since the last reset, in MB: allocated, or resident on a CPU."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_memory("VmHWM") / 2**20


def markdown(found: dict[str, dict[str, float]]) -> str:
    """Write the figures as a table."""
    rows = [
        "| method | trained | time / frozen | PEFT's | ours / PEFT's | MB | PEFT's | frozen |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, f in found.items():
        cells = [f"{f['time']:.3f}", _or_dash(f.get("peft_time")), _or_dash(f.get("over_peft"))]
        memory = [f["memory"], f.get("peft_memory", "-"), f["frozen_memory"]]
        rows.append(f"| {name} | {f['trained']:,.0f} | " + " | ".join([*cells, *map(str, memory)]) + " |")
    return "\n".join(rows)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
