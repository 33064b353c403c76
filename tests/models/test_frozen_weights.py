"""Every method on a base whose linears bitsandbytes holds in 4 or 8 bits: it trains alike, or says what works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from subspace.adapters.base import TrainProgress
from subspace.adapters.inject import adapter_groups, adapters, inject, trained_parameters
from subspace.adapters.linalg import bottom_singular_triplets
from subspace.adapters.registry import list_methods
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from subspace.models.frozen_weights import gather_weight_fp32
from subspace.models.loading import open_model
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess
from tests.helpers.tiny_models import EARLY_SCHEDULES, tiny_llama

IDS = torch.tensor([[5, 9, 33, 7, 120, 64, 3, 17], [8, 8, 250, 31, 2, 90, 4, 11]])
SETTINGS: dict[str, dict[str, Any]] = {**EARLY_SCHEDULES, "svdiff": {"p": 4}, "sam-parser": {"p": 4}, "ssl": {}}
REFUSED = ("full",)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    tiny_llama(folder)
    return folder


def opened(folder: Path, quantize: str) -> PreTrainedModel:
    return open_model(ModelConfig(path=str(folder), dtype="float32", quantize=quantize))


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    plain = tiny_llama()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            plain.get_submodule(name).weight.data = gather_weight_fp32(module).cpu()
    return plain


def with_adapters(model: PreTrainedModel, method: str, like: PreTrainedModel | None = None) -> PreTrainedModel:
    """Inject, launch and move; with ``like``, take that model's tensors."""
    inject(model, method, SETTINGS.get(method, {}), seed=3)
    for group in adapter_groups(model):
        if group[0].delayed_grad_params:
            type(group[0]).after_step(group, TrainProgress(group[0].config.launch, 30), DeepSpeedOptimizerAccess())
    torch.manual_seed(11)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    if like is not None:
        theirs = adapters(like)
        for site, adapter in adapters(model).items():
            for name, tensor in adapter.own_tensors().items():
                tensor.data.copy_(theirs[site].own_tensors()[name])
    return model


def loss(model: PreTrainedModel) -> Tensor:
    logits = model(IDS.to(model.device), use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).cpu(), IDS[:, 1:].flatten())


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("method", [name for name in list_methods() if name not in REFUSED])
def test_gradients_are_those_of_the_dequantised_weights(llama: Path, method: str, quantize: str) -> None:
    quantised = with_adapters(opened(llama, quantize), method)
    plain = with_adapters(dequantised(opened(llama, quantize)), method, like=quantised)
    values = []
    for model in (quantised, plain):
        value = loss(model.train())
        value.backward()  # type: ignore[no-untyped-call]
        values.append(value.item())
    assert values[0] == pytest.approx(values[1], rel=2e-2 if quantize == "int8" else 1e-5)
    own, other = (
        torch.cat([p.grad.flatten().cpu() for p in trained_parameters(m).values() if p.grad is not None])
        for m in (quantised, plain)
    )
    assert own.numel() == other.numel() > 0
    # int8 rounds its inputs too.
    assert (own - other).norm() < (0.2 if quantize == "int8" else 1e-4) * other.norm()


@pytest.mark.parametrize("method", ["milora", "lora-dash"])
def test_small_directions_come_from_the_unquantised_checkpoint(llama: Path, method: str) -> None:
    model = opened(llama, "nf4")
    created = inject(model, method, {"r": 4, **({"launch": 1} if method == "lora-dash" else {})})
    stored = load_file(llama / "model.safetensors")
    site = next(iter(created))
    adapter: Any = created[site]
    W = stored[f"{site}.weight"]
    assert not torch.equal(gather_weight_fp32(adapter.base).cpu(), W)
    if method == "milora":
        U, sigma, Vt = bottom_singular_triplets(W, 4)
        assert torch.allclose(adapter.scale * adapter.B0 @ adapter.A0, U * sigma @ Vt, atol=1e-6)
    else:
        each: Any
        for each in created.values():
            each.B.data += torch.randn_like(each.B)
        type(adapter).after_step(list(created.values()), TrainProgress(1, 10), DeepSpeedOptimizerAccess())
        image = adapter.U[:, 0] @ W @ adapter.Vt[0]  # u^T W v is a singular value only if both are W's own
        assert torch.allclose(W @ adapter.Vt[0], image * adapter.U[:, 0], atol=1e-5)


@pytest.mark.parametrize("method", ["milora", "lora-dash"])
def test_without_that_checkpoint_they_refuse(tmp_path: Path, method: str) -> None:
    tiny_llama(tmp_path)
    model = opened(tmp_path, "nf4")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"q_proj.weight unquantised. Open that checkpoint in full precision"):
        inject(model, method)
    assert not adapters(model)


@pytest.mark.parametrize("method", ["svdiff", "sam-parser"])
def test_all_singular_values_of_a_quantised_weight_are_refused(llama: Path, method: str) -> None:
    with pytest.raises(UserError, match=rf"method {method} .* 4bit.*Set method.p"):
        inject(opened(llama, "nf4"), method)
