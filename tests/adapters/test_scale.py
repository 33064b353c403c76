"""A share of an update: W + a (W' - W), for every method that has a W', in a pass, in a merge and in a folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from subspace.adapters.export import export_merged
from subspace.adapters.inject import adapters, inject, trained_parameters
from subspace.adapters.merging import merge, scale_updates, unmerge
from subspace.adapters.multi_adapter import batch_adapters, can_batch_adapters
from subspace.adapters.registry import list_methods
from subspace.adapters.serialization import save_adapter
from subspace.cli.main import main
from subspace.errors import UserError
from subspace.models.config import ModelConfig
from tests.helpers.tiny_models import tiny, tiny_llama

IDS = torch.tensor([[0, 9, 33, 7, 120, 64, 3, 17], [0, 8, 250, 31, 2, 90, 4, 11]])
MERGEABLE = [name for name, cls in list_methods().items() if cls.mergeable]
SCALE = 0.3


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits  # type: ignore[no-any-return]


def adapted(model: Any, method: str = "lora", **where: Any) -> Any:
    inject(model, method, **where)
    torch.manual_seed(11)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def merged_at(model: Any, scale: float | None) -> dict[str, Tensor]:
    """Return the weights of a model merged at a scale (None: without one), and take the merge back."""
    if scale is not None:
        scale_updates(model, scale)
    merge(model)
    weights = state(model)
    unmerge(model)
    return weights


@pytest.mark.parametrize("method", MERGEABLE)
def test_every_method_is_at_each_scale_what_its_weights_are_there(method: str) -> None:
    plain = state(tiny_llama())
    model = adapted(tiny_llama(), method)
    ends = merged_at(model, None)
    merge(model)
    holder = copy.deepcopy(model)  # plain layers, to be filled
    unmerge(model)
    scale_updates(model, 0.9)
    scale_updates(model, SCALE)  # in its place
    holder.load_state_dict({n: torch.lerp(plain.get(n, torch.zeros_like(end)), end, SCALE) for n, end in ends.items()})
    torch.testing.assert_close(logits(model), logits(holder), rtol=1e-4, atol=1e-5)
    part = merged_at(model, SCALE)
    assert part.keys() == ends.keys()
    for name, end in ends.items():
        start = plain.get(name, torch.zeros_like(end))
        torch.testing.assert_close(part[name] - start, SCALE * (end - start), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", MERGEABLE)
def test_the_ends_are_the_base_and_the_run_to_the_bit(method: str) -> None:
    base = tiny_llama(dtype="bfloat16")
    base.model.layers[0].self_attn.q_proj.weight.data[0, 0] = -0.0
    plain = state(base)
    model = adapted(base, method)
    ends, again, start = merged_at(model, None), merged_at(model, 1.0), merged_at(model, 0.0)
    assert all(torch.equal(ends[name], again[name]) for name in ends)
    assert start.keys() == plain.keys()  # no bias either, where a method creates one
    for name, tensor in plain.items():
        assert torch.equal(tensor.view(torch.uint8), start[name].view(torch.uint8)), name


def test_tied_tensors_stay_one_at_a_scale() -> None:
    model = adapted(tiny_llama(tie_word_embeddings=True), "full")
    scale_updates(model, SCALE)
    merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("method", ["lora", "ssb"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_a_stack_of_experts_is_scaled(method: str, implementation: str) -> None:
    model = tiny("mixtral")
    model.set_experts_implementation(implementation)
    adapted(model, method, targets=r".*\.experts\.(gate_up|up|down)_proj")
    scale_updates(model, SCALE)
    scaled = logits(model)
    merge(model)
    torch.testing.assert_close(scaled, logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_scales_of_one_adapter_are_mixed_in_one_batch(method: str) -> None:
    base = tiny_llama()
    several, alone = [], []
    for scale in (0.25, 0.5, 1.0):
        model = adapted(copy.deepcopy(base), method)
        scale_updates(model, scale)
        assert can_batch_adapters(model)
        alone.append(logits(model))
        several.append(adapters(model))
    with batch_adapters(base, several), torch.no_grad():
        mixed = base(IDS.repeat(3, 1), use_cache=False).logits
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert float((alone[0] - alone[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("method", [name for name, cls in list_methods().items() if not cls.mergeable])
def test_what_has_no_weight_lies_on_no_line(method: str) -> None:
    with pytest.raises(UserError, match=f"the update of {method} cannot be scaled"):
        scale_updates(adapted(tiny_llama(), method), SCALE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaled")
    tiny_llama(folder / "base")
    save_adapter(adapted(tiny_llama(), "dora"), folder / "adapter")
    return folder


def test_a_folder_is_written_at_a_scale(saved: Path, tmp_path: Path) -> None:
    model = ModelConfig(path=str(saved / "base"), dtype="float32")
    reports = {
        scale: export_merged(model, saved / "adapter", tmp_path / f"{scale}", scale=scale) for scale in (0, SCALE, 1)
    }
    files = {scale: load_file(tmp_path / f"{scale}" / "model.safetensors") for scale in reports}
    base = load_file(saved / "base" / "model.safetensors")
    assert all(torch.equal(tensor, base[name]) for name, tensor in files[0].items())
    for name, tensor in files[SCALE].items():
        torch.testing.assert_close(tensor, torch.lerp(base[name], files[1][name], SCALE), rtol=1e-5, atol=1e-7)
    assert [report.update for report in reports.values()] == pytest.approx(
        [0, SCALE * reports[1].update, reports[1].update], rel=1e-4
    )
    assert "at 0.3 of what was trained" in str(reports[SCALE])
    assert "at 0.3 of what was trained" in (tmp_path / f"{SCALE}" / "README.md").read_text()
    assert "of what was trained" not in f"{reports[1]}{(tmp_path / '1' / 'README.md').read_text()}"


@pytest.mark.parametrize("scale", [-0.1, 1.5, float("nan")])
def test_a_scale_beyond_the_ends_is_refused_before_anything_is_opened(
    saved: Path, tmp_path: Path, scale: float
) -> None:
    with pytest.raises(UserError, match="takes a share from 0, the base, to 1"):
        export_merged(ModelConfig(path=str(saved / "base")), saved / "adapter", tmp_path / "out", scale=scale)
    assert not (tmp_path / "out").exists()


def test_the_command_takes_shares_only(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("1,x", "", "2", "nan", "-1"):
        assert main(["evaluate", "anything", f"--scale={text}"]) == 2
        assert "shares from 0 to 1" in capsys.readouterr().err
