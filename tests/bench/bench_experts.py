"""Time and memory of a training step of LoRA at a mixture's experts, beside the frozen model and HF PEFT.

    python -m tests.bench.bench_experts --markdown
    python -m tests.bench.bench_experts --implementations eager --dtype bfloat16 --rounds 5

A mixture of Qwen3-MoE's form with random weights, by default 4 layers, 768 wide, 32 experts of 384, of which a token
takes 4; r = 16 on every expert's matrices, and nowhere else. All sides share the model's tensors. PEFT adapts the same
parameters by ``target_parameters``: it adds the updates of all experts to the stack and multiplies by the sum. A step
is forward, backward and AdamW on the adapters, on the same random tokens; the frozen side is forward and the gradient
of the embedded input. Each round takes a step of each side in turn; figures are medians over rounds of the ratio within
a round, and of the highest resident size (on a GPU, allocated) during a step less that before it, in MB.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from subspace.adapters.inject import inject, trained_parameters
from subspace.distributed.device import device
from tests.bench.bench_methods import peak, reset_peak

R = 16
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
Step = Callable[[], float]


def main() -> None:
    """Run the rounds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", nargs="*", default=["grouped_mm", "eager"])
    parser.add_argument("--methods", nargs="*", default=["lora", "dora"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--rows", type=int, default=2, help="of 256 tokens")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--markdown", action="store_true", help="print a table instead of JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    weights = build(options.layers, options.experts, getattr(torch, options.dtype))
    torch.manual_seed(1)
    ids = torch.randint(0, 2048, (options.rows, 256)).to(device())
    found = {}
    for implementation in options.implementations:
        for method in options.methods:
            name = f"{method}, {implementation}"
            found[name] = measure(weights, method, implementation, ids, options.rounds)
            print(json.dumps({name: found[name]}), flush=True)
    if options.markdown:
        print(markdown(found))


def build(layers: int, experts: int, dtype: torch.dtype) -> nn.Module:
    """Return the model that all sides share."""
    config = Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=768,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        num_experts=experts,
        num_experts_per_tok=4,
        moe_intermediate_size=384,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(dtype)
    with device():
        model = Qwen3MoeForCausalLM(config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return model


def share(model: Any, implementation: str) -> Any:
    """Return another model with the very same tensors."""
    with torch.device("meta"):
        other = Qwen3MoeForCausalLM(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.model.rotary_emb = model.model.rotary_emb
    other.set_experts_implementation(implementation)
    return other.requires_grad_(False).train()


def measure(weights: nn.Module, method: str, implementation: str, ids: Tensor, rounds: int) -> dict[str, float]:
    """Return the figures of a method and a way to compute experts."""
    ours = share(weights, implementation)
    inject(ours, method, {"r": R}, targets=[r"experts\.(gate_up|down)_proj"])
    frozen = share(weights, implementation)
    frozen.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    sides = {
        "frozen": step_of(frozen, ids, []),
        "subspace": step_of(ours, ids, list(trained_parameters(ours).values())),
    }
    if method == "lora" and (theirs := with_peft(share(weights, implementation))) is not None:
        sides["peft"] = step_of(theirs, ids, [p for p in theirs.parameters() if p.requires_grad])
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
    figures = {
        "trained": float(sum(p.numel() for p in trained_parameters(ours).values())),
        "frozen_seconds": round(statistics.median(seconds["frozen"]), 4),
        "time": ratio(seconds["subspace"], seconds["frozen"]),
        "memory": round(statistics.median(peaks["subspace"])),
        "frozen_memory": round(statistics.median(peaks["frozen"])),
    }
    if "peft" in sides:
        figures["peft_time"] = ratio(seconds["peft"], seconds["frozen"])
        figures["peft_memory"] = round(statistics.median(peaks["peft"]))
        figures["over_peft"] = ratio(seconds["subspace"], seconds["peft"])
    return figures


def ratio(some: list[float], others: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(some, others, strict=True)), 3)


def with_peft(model: Any) -> Any:
    """Return the model with PEFT's LoRA at its experts; None where PEFT is not installed."""
    try:
        import peft
    except ImportError:
        return None
    config = peft.LoraConfig(r=R, lora_alpha=32, target_modules=[], target_parameters=EXPERTS)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=True)


def step_of(model: Any, ids: Tensor, parameters: list[nn.Parameter]) -> Step:
    """Return a training step, or a forward and backward pass where there is nothing to train."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None

    def step() -> float:
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return step


def markdown(found: dict[str, dict[str, float]]) -> str:
    """Write the figures as a table."""
    rows = [
        "| method, experts | trained | time / frozen | PEFT's | ours / PEFT's | MB | PEFT's | frozen |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, f in found.items():
        times = [f["time"], f.get("peft_time", "-"), f.get("over_peft", "-")]
        memory = [f["memory"], f.get("peft_memory", "-"), f["frozen_memory"]]
        rows.append(f"| {name} | {f['trained']:,.0f} | " + " | ".join(map(str, [*times, *memory])) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
