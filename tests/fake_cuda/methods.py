"""Trains, schedules and evaluates a method on a base that lies on the fake CUDA device, and says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from subspace.adapters.base import TrainProgress
from subspace.adapters.inject import adapter_groups, adapters, inject, remove_adapters, trained_parameters
from subspace.adapters.penalties import with_penalties
from subspace.data.collate import Batch
from subspace.evaluation.choice_scoring import build_scoring_rows, score_choices
from subspace.evaluation.greedy_decoding import decode_greedily, prefill_shared_prefix
from subspace.models.config import ModelConfig
from subspace.models.lm_head import SummedLoss
from subspace.models.loading import open_model
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess
from subspace.training.steps import run_schedules
from tests.helpers.tiny_models import EARLY_SCHEDULES, tiny_llama

BASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "nf4": {"quantize": "nf4"},
    "nf4-double": {"quantize": "nf4", "double_quant": True},
    "int8": {"quantize": "int8"},
}
CUDA = torch.device("cuda", 0)


def open_base(kind: str, folder: Path) -> Any:
    """Load the tiny LLaMA, saved in a folder, as a run would."""
    if not folder.exists():
        tiny_llama(folder)
    model = open_model(ModelConfig(path=str(folder), dtype="bfloat16", **BASES[kind]))
    model.config.use_cache = False
    return model


def made_up_batch() -> Batch:
    """Return a batch as the loop makes it: in pinned memory of the host, padded on the right."""
    ids = torch.arange(2, 34).view(2, 16)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 12:], labels[1, 12:], labels[:, :6] = 0, -100, -100
    return Batch.from_labels({"input_ids": ids, "attention_mask": mask, "labels": labels}).pinned()


def run(model: Any, method: str, settings: dict[str, Any]) -> list[str]:
    """Take two steps of two micro-batches with a method's adapters, score and decode; return what is wrong."""
    inject(model, method, {**EARLY_SCHEDULES.get(method, {}), **settings})
    try:
        return [*train(model), *evaluate(model), *misplaced(model)]
    finally:
        remove_adapters(model)


def train(model: Any) -> list[str]:
    """Take two steps, in which every schedule acts; return what is wrong with the gradients."""
    model.train()
    trained = trained_parameters(model)
    late = {f"{site}.{name}" for site, adapter in adapters(model).items() for name in adapter.delayed_grad_params}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    groups, access, summed_loss = adapter_groups(model), DeepSpeedOptimizerAccess(None, optimizer), SummedLoss(model)
    wrong = []
    for step in (5, 6):
        for _ in range(2):
            loss: Any = with_penalties(0.1 * summed_loss(made_up_batch().to(CUDA)), model)
            loss.backward()
        if loss.device != CUDA or not torch.isfinite(loss):
            wrong.append(f"loss {loss}")
        for name, parameter in trained.items():
            if parameter.grad is None or parameter.grad.device != CUDA or not torch.isfinite(parameter.grad).all():
                if parameter.grad is None and name in late:
                    continue
                wrong.append(f"step {step}: {name} has the gradient {parameter.grad}")
        run_schedules("before_step", groups, TrainProgress(step, 20), access)
        optimizer.step()
        optimizer.zero_grad()
        run_schedules("after_step", groups, TrainProgress(step, 20), access)
    return wrong


def evaluate(model: Any) -> list[str]:
    """Score choices and decode, as the two families of protocols do; return what is wrong."""
    model.eval()
    with torch.no_grad():
        rows = build_scoring_rows([([5, 9, 33, 7], 2), ([5, 9, 64], 2)], 64, share=True)
        scores = [score for row in score_choices(model, rows) for score in row]
        prompts = [[5, 9, 33, 7, 120], [5, 9, 64, 3]]
        texts = decode_greedily(model, prompts, lambda ids: False, 4, prefix=prefill_shared_prefix(model, prompts))
    finite = all(torch.isfinite(torch.tensor(score)).all() for score in scores)
    return [] if finite and [len(text) for text in texts] == [4, 4] else [f"scores {scores}, texts {texts}"]


def misplaced(model: Any) -> list[str]:
    """Return the model's tensors that are not on the device."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [f"{name} on {tensor.device}" for name, tensor in tensors if tensor.device != CUDA]


def rules(model: Any) -> list[str]:
    """Return which mistakes of placement the device lets pass, and which correct programs it stops."""
    here, there, host = (torch.ones(3, device=name) for name in ("cuda:0", "cuda:1", "cpu"))
    wrong = []
    mistakes: dict[str, Callable[[], Any]] = {
        "a sum with the host": lambda: here + host,
        "a sum with another device": lambda: here + there,
        "a product with the host": lambda: torch.outer(here, host),
        "an index of the host's memory by the device's": lambda: host[here.long()],
        "an embedding of ids on the host": lambda: torch.nn.functional.embedding(host.long(), here[:, None]),
        "numpy": lambda: here.numpy(),
        "no such device": lambda: torch.ones(3, device="cuda:7"),
    }
    for name, mistake in mistakes.items():
        try:
            mistake()
        except (RuntimeError, TypeError):
            continue
        wrong.append(f"{name} passes")
    here[:2].mul_(2).add_(torch.tensor(1.0))  # a scalar may be on the host
    here.view(3, 1).t_().copy_(there, non_blocking=True)
    if here.tolist() != [1, 1, 1] or here.cpu().device.type != "cpu" or here.storage_offset() or not here.is_cuda:
        wrong.append(f"{here}")
    inject(model, "lora", {})
    adapter: Any = next(iter(adapters(model).values()))
    adapter.A.data = adapter.A.data.cpu()  # what a method would do that forgets the device
    try:
        model(input_ids=made_up_batch().to(CUDA).input_ids)
        wrong.append("an adapter on the host passes")
    except RuntimeError:
        pass
    remove_adapters(model)
    return wrong
