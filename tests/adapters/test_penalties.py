"""A penalty's gradient is scaled as the loss is, in each model by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from subspace.adapters.inject import adapters, inject, trained_parameters
from subspace.adapters.linalg import orthogonality_gap
from subspace.adapters.penalties import with_penalties
from tests.helpers.tiny_models import tiny_llama

IDS = torch.arange(12).reshape(2, 6)


def penalized() -> Any:
    """Return a model with a penalty whose weight makes up nearly all of the gradient of A."""
    model = tiny_llama()
    inject(model, "lora", {"r": 4, "constraint": "orthogonal", "constraint_weight": 1e3}, targets=["q_proj"])
    inject(model, "lora", {"r": 4, "constraint": "orthogonal", "constraint_weight": 1e3}, targets=["v_proj"])
    return model.train()


def gradients(model: Any, scale: float, *, tapped: bool = True) -> list[Tensor]:
    """Return the gradients of A where an engine multiplies the loss by ``scale``."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    (scale * (with_penalties(loss, model) if tapped else loss)).backward()
    trained = trained_parameters(model).items()
    return [p.grad.clone() for name, p in trained if name.endswith("A") and p.grad is not None]


@pytest.mark.parametrize("scale", [0.25, 1024.0])
def test_a_penalty_is_scaled_as_the_loss(scale: float) -> None:
    model = penalized()
    for plain, scaled in zip(gradients(model, 1.0), gradients(model, scale), strict=True):
        assert torch.equal(scale * plain, scaled)


def test_models_do_not_scale_each_others_penalties() -> None:
    model, other = penalized(), penalized()
    expected = gradients(other, 1.0, tapped=False)
    gradients(model, 0.25)
    for plain, after in zip(expected, gradients(other, 1.0, tapped=False), strict=True):
        assert torch.equal(plain, after)


def test_adapters_of_several_injections_share_their_models_tap_and_copies_have_their_own() -> None:
    model = penalized()
    taps = {id(adapter.loss_tap) for adapter in adapters(model).values()}
    assert len(taps) == 1
    assert taps.isdisjoint(id(adapter.loss_tap) for adapter in adapters(copy.deepcopy(model)).values())


def test_a_model_without_adapters_has_its_loss_as_it_is() -> None:
    loss = torch.ones((), requires_grad=True)
    assert with_penalties(loss, tiny_llama()) is loss


def test_flexlora_is_penalized_for_the_directions_that_are_alive() -> None:
    adapter: Any = inject(tiny_llama(), "flexlora", {"r": 4, "headroom": 4}, targets=["0.self_attn.q_proj"]).popitem()[
        1
    ]
    adapter.A.data.normal_(std=0.06)
    adapter.penalty().backward()
    A, B = (factor.detach().clone().requires_grad_() for factor in (adapter.A[:4], adapter.B[:, :4]))
    (0.1 * orthogonality_gap(A, B.T)).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(adapter.A.grad[:4], A.grad)
    torch.testing.assert_close(adapter.B.grad[:, :4], B.grad)
    assert not adapter.A.grad[4:].any()
    assert not adapter.B.grad[:, 4:].any()


@pytest.mark.parametrize("method", ["adalora", "flexlora"])
def test_a_model_may_write_into_what_a_penalized_layer_returns(method: str) -> None:
    model = tiny_llama()
    adapter = inject(model, method, {"r": 4}, targets=["0.self_attn.q_proj"]).popitem()[1].train()
    (adapter(torch.randn(2, 64)).mul_(2)).sum().backward()
    assert all(parameter.grad is not None for parameter in trained_parameters(model).values())
