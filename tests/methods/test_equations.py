"""One case per method worked out on paper: it catches an equation that is wrong in both of its forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspace.adapters.base import Adapter, LinearAdapter, TrainProgress
from subspace.adapters.registry import resolve_method
from subspace.adapters.virtual_tokens import AttentionAdapter
from subspace.methods.adalora import budget
from subspace.training.optimizer_access import DeepSpeedOptimizerAccess

W = torch.tensor([[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]])  # 2 out, 3 in; row norms 3 and 5
X = torch.tensor([1.0, -1.0, 2.0])  # W X = (3, 5)


def at(name: str, tensors: dict[str, Any], **settings: Any) -> Adapter:
    base = nn.Linear(3, 2, bias=False)
    base.weight.data = W.clone()
    cls = resolve_method(name)[0]
    adapter = cls(base, cls.Config(**settings))
    adapter.init_from_weight(W)
    for key, value in tensors.items():
        adapter.trained()[key].data = torch.tensor(value)
    return adapter


def test_lora() -> None:
    adapter = at("lora", {"A": [[1.0, 0.0, 1.0]], "B": [[1.0], [-1.0]]}, r=1, alpha=2)
    # A X = 3; B A X = (3, -3); twice that is (6, -6).
    assert torch.allclose(adapter(X), torch.tensor([9.0, -1.0]))


def test_rank_stabilized_lora_divides_by_the_root() -> None:
    tensors = {"A": [[1.0, 0.0, 0.0]] * 2, "B": [[1.0] * 2, [0.0] * 2]}
    assert torch.allclose(at("lora", tensors, r=2, alpha=2)(X), torch.tensor([5.0, 5.0]))
    assert torch.allclose(at("lora", tensors, r=2, alpha=2, rslora=True)(X), torch.tensor([3.0 + 2 * 2**0.5, 5.0]))


def test_ssl_scales_the_input() -> None:
    assert torch.allclose(at("ssl", {"d": [2.0, 1.0, 0.0]})(X), torch.tensor([0.0, -3.0]))


def test_ssb_scales_both_sides() -> None:
    adapter = at("ssb", {"d": [2.0, 1.0, 0.0], "l": [5.0, -1.0]})
    assert isinstance(adapter, LinearAdapter)
    assert torch.allclose(adapter.weight(W), torch.tensor([[10.0, 10.0, 0.0], [0.0, -3.0, 0.0]]))


def test_dora_sets_the_row_lengths() -> None:
    adapter = at("dora", {"A": [[1.0, 0.0, 0.0]], "B": [[3.0], [0.0]], "m": [6.0, 1.0]}, r=1, alpha=1)
    # W + B A has rows (4, 2, 2), of length sqrt(24), and (0, 3, 4), of length 5.
    expected = torch.tensor([6 / 24**0.5 * (4 - 2 + 4), (-3 + 8) / 5])
    assert torch.allclose(adapter(X), expected)


def test_dora_starts_at_the_row_norms() -> None:
    assert torch.allclose(at("dora", {}, r=2).trained()["m"], torch.tensor([3.0, 5.0]))


def test_adalora() -> None:
    tensors = {"A": [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], "E": [2.0, 0.5], "B": [[1.0, 0.0], [0.0, 1.0]]}
    # A X = (3, -1); times E: (6, -0.5); alpha / r = 2: (12, -1).
    assert torch.allclose(at("adalora", tensors, r=2, alpha=4)(X), torch.tensor([15.0, 4.0]))


def test_adalora_penalty_is_the_mean_of_norms() -> None:
    tensors = {"A": [[2.0, 0.0, 0.0]], "E": [1.0], "B": [[1.0], [1.0]]}
    # A A^T - 1 = 3 and B^T B - 1 = 1; their mean is 2.
    assert torch.allclose(at("adalora", tensors, r=1, orthogonality=0.5).penalty(), torch.tensor(1.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "kept"), [(1, 24), (10, 24), (20, 20), (25, 24), (40, 17), (70, 16), (71, 16), (100, 16)]
)
def test_adalora_budget(step: int, kept: int) -> None:
    # 2 layers of 12 falling to 2 of 8 between steps 10 and 70: at 20, 1/6 has passed, and 16 + 8 (5/6)^3 = 20.6.
    config = resolve_method("adalora")[0].Config(r=12, target_r=8, warm_up=0.1, cool_down=0.3, every=10)  # type: ignore[call-arg]
    assert budget(config, TrainProgress(step, 100), 2 * 12, 2 * 8) == kept  # type: ignore[arg-type]


def test_adalora_zeroes_the_least_important_and_lets_it_come_back() -> None:
    adapter = at("adalora", {"E": [1.0, 1.0, 1.0]}, r=3, target_r=1, warm_up=0.0, cool_down=0.25, every=1)
    for step, grad in enumerate([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 1.0, 50.0]], start=1):
        for key, parameter in adapter.trained().items():
            parameter.grad = torch.zeros_like(parameter)
            if key == "E":
                parameter.grad = torch.tensor(grad)
        type(adapter).before_step([adapter], TrainProgress(step, 4), DeepSpeedOptimizerAccess())
        type(adapter).after_step([adapter], TrainProgress(step, 4), DeepSpeedOptimizerAccess())
        # Budgets: int(1 + 2 (2/3)^3) = 1, so one is left from the first step on, the one with the largest |E dL/dE|.
        assert (adapter.trained()["E"] != 0).tolist() == [True, False, False]
        adapter.trained()["E"].data[2] = 1.0 if step == 2 else adapter.trained()["E"].data[2]
    assert adapter.history["E"].shape == (2, 3)


def after(adapter: Adapter, step: int, steps: int, gradient: list[float]) -> list[bool]:
    """Take a step with this gradient of E; return which E are left."""
    for key, parameter in adapter.trained().items():
        parameter.grad = torch.tensor(gradient) if key == "E" else torch.zeros_like(parameter)
    type(adapter).before_step([adapter], TrainProgress(step, steps), DeepSpeedOptimizerAccess())
    type(adapter).after_step([adapter], TrainProgress(step, steps), DeepSpeedOptimizerAccess())
    return (adapter.trained()["E"] != 0).tolist()


def test_adalora_whose_target_is_its_start_prunes_nothing() -> None:
    adapter = at("adalora", {"E": [1.0, 1.0]}, r=2, target_r=2, warm_up=0.0, cool_down=0.5, every=1)
    assert [after(adapter, step, 4, [1.0, 0.5]) for step in (1, 2, 3, 4)] == [[True, True]] * 4


def test_adaloras_pattern_is_fixed_at_the_end() -> None:
    adapter = at("adalora", {"E": [1.0, 1.0]}, r=2, target_r=1, warm_up=0.0, cool_down=0.5, every=1)
    after(adapter, 1, 8, [9.0, 1.0])
    after(adapter, 4, 8, [9.0, 1.0])
    for step in (5, 6, 7, 8):
        adapter.trained()["E"].data[:] = 1.0
        assert after(adapter, step, 8, [0.1, 99.0]) == [True, False]


def test_a_pruned_direction_still_has_a_gradient() -> None:
    adapter = at("adalora", {"E": [1.0, 0.0]}, r=2)
    adapter(X).sum().backward()
    assert adapter.trained()["E"].grad[1] != 0  # type: ignore[index]


def test_houlsby() -> None:
    tensors = {"D": [[1.0, 1.0]], "U": [[1.0], [-1.0]], "c": [-9.0], "e": [0.5, 0.0]}
    # h = (3, 5); D h + c = -1, which relu turns to 0; so only e is added.
    assert torch.allclose(at("houlsby", tensors, bottleneck=1, activation="relu")(X), torch.tensor([3.5, 5.0]))
    tensors["c"] = [-7.0]  # D h + c = 1
    assert torch.allclose(
        at("houlsby", tensors, bottleneck=1, activation="relu", scale=2.0)(X), torch.tensor([6.0, 3.0])
    )


class _Attention(nn.Module):
    """One head that reads its input as query, key and value, in the manner of transformers' modules."""

    class config:  # noqa: N801
        _attn_implementation = "sdpa"
        num_key_value_heads = num_attention_heads = 1

    head_dim = 2
    layer_idx = 0

    def forward(self, hidden_states: Tensor, past_key_values: Any, attention_mask: Tensor) -> Tensor:
        q = k = v = hidden_states[:, None]
        k, v = past_key_values.update(k, v, 0)
        return F.scaled_dot_product_attention(q, k, v, attention_mask, scale=1.0)[:, 0]


def test_prefix() -> None:
    cls = resolve_method("prefix")[0]
    adapter = cls(_Attention(), cls.Config(n=1))  # type: ignore[call-arg]
    assert isinstance(adapter, AttentionAdapter)
    adapter.trained()["K"].data = torch.tensor([[[1.0, 0.0]]])
    adapter.trained()["V"].data = torch.tensor([[[10.0, 20.0]]])
    x = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    # Query (0, 1): logits 0 on the prefix, 1 on itself. Query (1, 0): 1 on the prefix, 0 on the first token, 1 on
    # itself.
    e = torch.e
    first = (torch.tensor([10.0, 20.0]) + e * x[0, 0]) / (1 + e)
    second = (e * torch.tensor([10.0, 20.0]) + x[0, 0] + e * x[0, 1]) / (2 * e + 1)
    assert torch.allclose(adapter(x), torch.stack([first, second])[None])
