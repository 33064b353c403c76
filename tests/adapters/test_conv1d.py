"""GPT-2's linear layers hold their weights transposed: a method does at them what it does at torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from subspace.adapters.base import LinearAdapter
from subspace.adapters.export import export_merged
from subspace.adapters.inject import inject, remove_adapters, trained_parameters
from subspace.adapters.merging import merge, unmerge
from subspace.adapters.registry import list_methods, resolve_method
from subspace.adapters.serialization import save_adapter
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model
from tests.helpers.tiny_models import bpe_tokenizer, save

IDS = torch.tensor([[5, 9, 33, 7, 120, 64, 3, 17], [8, 8, 250, 31, 2, 90, 4, 11]])
SETTINGS: dict[str, dict[str, Any]] = {"svdiff": {"p": 3}, "sam-parser": {"p": 3}, "flexlora": {"r": 2, "headroom": 2}}
LINEAR = [name for name, cls in list_methods().items() if issubclass(cls, LinearAdapter)]


def gpt2(folder: Path | None = None) -> Any:
    config = AutoConfig.for_model(
        "gpt2", vocab_size=384, n_embd=48, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    if folder:
        save(model, bpe_tokenizer(), folder)
    return model


def moved(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.config = layer, None


@pytest.mark.parametrize("method", LINEAR)
def test_a_method_computes_what_it_does_at_torchs_linear(method: str) -> None:
    torch.manual_seed(0)
    conv, linear = Conv1D(24, 40), nn.Linear(40, 24)  # type: ignore[no-untyped-call]
    linear.weight.data, linear.bias.data = conv.weight.data.T.contiguous(), conv.bias.data.normal_()
    found: list[Any] = []
    for layer in (conv, linear):
        inside = Layer(layer)
        inject(inside, method, SETTINGS.get(method, {}), targets=["q_proj"])
        moved(inside)
        found.append(inside.q_proj)
    x = torch.randn(3, 7, 40)
    outputs = [adapter(x) for adapter in found]
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    ours, theirs = (
        torch.autograd.grad(y.square().sum(), [*a.trained().values()]) for y, a in zip(outputs, found, strict=True)
    )
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in zip(ours, theirs, strict=True))
    merged = [adapter.merged() for adapter in found]
    assert torch.allclose(merged[0]["weight"].T, merged[1]["weight"], atol=1e-5)


@pytest.mark.parametrize("method", list_methods())
def test_gpt2_is_adapted_and_merged_or_refused_in_a_sentence(method: str) -> None:
    model = gpt2()
    before = logits(model)
    settings = {
        **SETTINGS.get(method, {}),
        **({"start": "zero"} if "start" in resolve_method(method)[0].Config.__dataclass_fields__ else {}),
    }
    if method in ("prompt", "p-tuning", "prefix"):
        with pytest.raises(
            UserError, match="GPT2LMHeadModel has no (embedding|attention) that an adapter could be put at"
        ):
            inject(model, method, {"n": 2})
        return
    found = inject(model, method, settings)
    assert torch.allclose(logits(model), before, atol=1e-3)
    moved(model)
    unmerged = logits(model)
    assert not torch.allclose(unmerged, before, atol=1e-2)
    if all(adapter.mergeable for adapter in found.values()):
        merge(model)
        assert torch.allclose(logits(model), unmerged, atol=1e-3)
        assert model.transformer.h[0].attn.c_attn.weight.shape == (48, 144)
        unmerge(model)
        assert torch.equal(logits(model), unmerged)
    remove_adapters(model)
    assert torch.equal(logits(model), before)


def test_a_merged_gpt2_is_an_ordinary_folder(tmp_path: Path) -> None:
    model = gpt2(tmp_path / "base")
    inject(model, "dora", {"r": 4})
    moved(model)
    save_adapter(model, tmp_path / "adapter")
    report = export_merged(
        ModelConfig(path=str(tmp_path / "base"), dtype="float32"), tmp_path / "adapter", tmp_path / "out"
    )
    assert report.layers == 6
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(plain), logits(model), atol=1e-3)


@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_a_quantised_gpt2_is_adapted_from_its_files(tmp_path: Path, method: str) -> None:
    """MiLoRA's start is of the unquantised weights, PiSSA's of those at hand."""
    gpt2(tmp_path)
    starts, seen = [], []
    for kind in ("none", "nf4"):
        model = open_model(ModelConfig(path=str(tmp_path), dtype="float32", quantize=kind))
        before = logits(model)
        inject(model, method, {"r": 4})
        assert torch.allclose(logits(model), before, atol=1e-4)
        starts.append({name: p.detach().clone() for name, p in trained_parameters(model).items()})
        seen.append(before)
    assert 0.01 < (seen[0] - seen[1]).norm() / seen[0].norm() < 0.5
    close = {name: torch.allclose(value, starts[1][name], atol=1e-5) for name, value in starts[0].items()}
    assert set(close.values()) == {method == "milora"}
