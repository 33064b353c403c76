"""Step 1: loss and gradients of every method on five bases, on the device against the CPU.

Two steps of AdamW with the method's schedule come first, so that nothing is at its start any more: a factor that is
zero would hide the other's mistakes. Then the device takes over the very tensors that the CPU arrived at, and one
forward and backward pass of both is compared. How far apart the device's own two steps had led is told beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subspace.adapters.base import TrainProgress
from subspace.adapters.inject import adapters, inject, remove_adapters, trained_parameters
from subspace.adapters.penalties import with_penalties
from subspace.adapters.registry import list_methods
from subspace.data.collate import IGNORE_INDEX
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from subspace.models.lm_head import summed_loss
from subspace.models.loading import open_model
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess
from tests.gpu.cases import Check, Figures, LeftOut, Missed
from tests.helpers.matrix import BASES
from tests.helpers.tiny_models import EARLY_SCHEDULES, VOCABULARY, tiny_llama

CHOSEN = ("fp32", "bf16", "nf4", "nf4-double", "int8")
#: How far the loss may lie from the CPU's, and the gradient, as a share of its length. In int8 a GPU rounds what enters
#: a layer, too, and a CPU does not. In 16 bits single values differ much more than this; the direction does not.
LOSS = {"fp32": 1e-4, "nf4": 1e-4, "bf16": 2e-2, "nf4-double": 2e-2, "int8": 5e-2}
GRADIENT = {"fp32": 1e-3, "nf4": 1e-3, "bf16": 0.1, "nf4-double": 0.1, "int8": 0.2}
STEPS = 2
#: Settings without which they take no quantised base.
ON_QUANTIZED = {"svdiff": {"p": 16}, "sam-parser": {"p": 16}}


def methods_on_cpu(check: Check) -> None:
    """Leave what the CPU computes in a file for each base and method."""
    _all(check, reference=True)


def methods(check: Check) -> None:
    """Compute the same on the device and compare."""
    _all(check, reference=False)


def _all(check: Check, *, reference: bool) -> None:
    folder = check.folder("methods-on-cpu")
    if reference:
        tiny_llama(folder / "model")
    models: dict[str, Any] = {}

    def run(base: str, name: str) -> Figures:
        if base not in models:
            models.clear()
            models[base] = open_model(ModelConfig(path=str(folder / "model"), **BASES[base]))
        file = folder / f"{base}-{name}.pt"
        if not reference and not file.exists():
            raise LeftOut("the CPU could not, either: see methods-on-cpu")
        try:
            _inject(models[base], name, quantized=BASES[base].get("quantize", "none") != "none")
            return _write(models[base], file) if reference else _compare(models[base], base, file)
        except UserError as error:
            raise LeftOut(str(error)) from None
        finally:
            remove_adapters(models[base])

    for base in CHOSEN:
        for name in list_methods():
            check.case(f"{base} {name}", run, base, name)


def _write(model: Any, file: Any) -> Figures:
    _two_steps(model)
    state = {site: _state(adapter) for site, adapter in adapters(model).items()}
    loss, gradients = _pass(model)
    torch.save({"state": state, "loss": loss, "gradients": gradients}, file)
    return {"loss": loss, "gradient": float(torch.stack([g.double().norm() for g in gradients.values()]).norm())}


def _compare(model: Any, base: str, file: Any) -> Figures:
    expected = torch.load(file, weights_only=True)
    _two_steps(model)
    own, _ = _pass(model)
    for site, adapter in adapters(model).items():
        _take(adapter, expected["state"][site])
    loss, gradients = _pass(model)
    assert gradients.keys() == expected["gradients"].keys(), "other tensors have a gradient"
    far = {n: gradients[n].double() - g.double() for n, g in expected["gradients"].items()}
    length = torch.stack([g.double().norm() for g in expected["gradients"].values()]).norm()
    distance = float(torch.stack([g.norm() for g in far.values()]).norm() / length)
    worst = max(far, key=lambda n: float(far[n].norm()))
    figures = {
        "loss": loss,
        "off the CPU's": abs(loss - expected["loss"]),
        "gradient off, share": distance,
        "worst in": worst,
        "loss after its own two steps, off": abs(own - expected["loss"]),
    }
    if not abs(loss - expected["loss"]) <= LOSS[base]:
        raise Missed(f"the loss is not the CPU's within {LOSS[base]}", **figures)
    if not distance <= GRADIENT[base]:
        raise Missed(f"the gradient is not the CPU's within {GRADIENT[base]} of its length", **figures)
    return figures


def _inject(model: Any, name: str, *, quantized: bool) -> None:
    model.train()
    model.config.use_cache = False
    inject(model, name, {**EARLY_SCHEDULES.get(name, {}), **(ON_QUANTIZED.get(name, {}) if quantized else {})})


def _two_steps(model: Any) -> None:
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=1e-3)
    group = list(adapters(model).values())
    kind, access = type(group[0]), DeepSpeedOptimizerAccess(optimizer=optimizer)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        _loss(model).backward()  # type: ignore[no-untyped-call]
        # Late enough for what a schedule does at some step: LoRA-Dash begins, FlexLoRA moves ranks.
        progress = TrainProgress(step + 4, 20)
        kind.before_step(group, progress, access)
        optimizer.step()
        kind.after_step(group, progress, access)
        for adapter in group:
            adapter.clear_cache()


def _pass(model: Any) -> tuple[float, dict[str, Tensor]]:
    """Return the loss, and the gradients on the CPU."""
    model.zero_grad()
    loss = _loss(model)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad.cpu() for n, p in trained_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def _loss(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (3, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    labels[:, :6] = IGNORE_INDEX
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    device = next(model.parameters()).device
    summed = summed_loss(model, {key: tensor.to(device) for key, tensor in batch.items()})
    return with_penalties(summed / int((labels[:, 1:] != IGNORE_INDEX).sum()), model)


def _state(adapter: Any) -> dict[str, dict[str, Tensor]]:
    return {
        "tensors": {key: tensor.detach().cpu().clone() for key, tensor in _tensors(adapter).items()},
        "history": {key: tensor.cpu().clone() for key, tensor in adapter.history.items()},
    }


def _take(adapter: Any, state: dict[str, dict[str, Tensor]]) -> None:
    tensors = _tensors(adapter)
    assert tensors.keys() == state["tensors"].keys()
    with torch.no_grad():  # not through .data: copies in 16 bits would not see that they are outdated
        for key, tensor in tensors.items():
            tensor.copy_(state["tensors"][key])
        for key, tensor in adapter.history.items():
            tensor.copy_(state["history"][key])
    adapter.clear_cache()


def _tensors(adapter: Any) -> dict[str, Tensor]:
    """Return all tensors of an adapter, those that no file keeps too."""
    return {**adapter.trained(), **dict(adapter.named_buffers(recurse=False))}
