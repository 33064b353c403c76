"""Counting and matching: what a method trains in a model, and which size of it comes nearest to a number."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

import subspace
from subspace.adapters.inject import inject, trained_parameters
from subspace.adapters.parameter_count import count_trained, match_budget
from subspace.adapters.registry import list_methods
from subspace.errors import UserError
from subspace.methods.flexlora import FlexLoRA
from tests.helpers.tiny_models import tiny_llama

DIALS = [name for name, method in list_methods().items() if method.size_setting]
MODEL = tiny_llama()


def dial_of(method: str) -> str:
    """Return the setting that a method's size is chosen by."""
    dial = list_methods()[method].size_setting
    assert dial
    return dial


@pytest.mark.parametrize("method", list_methods())
def test_what_is_counted_is_what_is_trained(method: str) -> None:
    model = tiny_llama()
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    counted = count_trained(model, method)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    created = inject(model, method, start=False)
    idle = sum(adapter.idle_params() for adapter in created.values())
    assert counted == sum(p.numel() for p in trained_parameters(model).values()) - idle
    assert counted == count_trained(model)
    assert (idle > 0) == (method == "flexlora")


def test_directions_that_a_layer_may_gain_do_not_count() -> None:
    """As many are alive in all layers together for ever: those of ``headroom=0``."""
    model = tiny_llama()
    counted = count_trained(model, "flexlora", {"r": 5, "headroom": 0})
    assert count_trained(model, "flexlora", {"r": 5, "headroom": 3}) == counted
    assert match_budget("flexlora", model, counted, headroom=7) == 5
    first, second, *_ = inject(model, "flexlora", {"r": 5, "headroom": 3}, targets=["q_proj"]).values()
    before = count_trained(model)
    assert isinstance(first, FlexLoRA)
    assert isinstance(second, FlexLoRA)
    first.alive[0], second.alive[6] = 0, 1
    assert count_trained(model) == before
    second.alive[7] = 1
    assert count_trained(model) == before + 64 + 64 + 1


def test_a_size_is_found_again_from_its_count() -> None:
    for method, size in itertools.product(DIALS, (1, 17, 32)):
        parameters = count_trained(MODEL, method, {dial_of(method): size})
        assert match_budget(method, MODEL, parameters) == size, method


def test_no_neighbor_comes_nearer() -> None:
    for method, parameters in itertools.product(DIALS, (1, 9_137)):
        size = match_budget(method, MODEL, parameters)
        missed = {
            near: abs(count_trained(MODEL, method, {dial_of(method): near}) - parameters)
            for near in (size - 1, size, size + 1)
            if near >= 1
        }
        assert missed[size] == min(missed.values()), method
        assert missed.get(size - 1) != missed[size], f"{method}: of two as near, the smaller"


def test_the_settings_and_targets_given_are_kept() -> None:
    targets = ["q_proj", "v_proj"]
    parameters = count_trained(MODEL, "lora-dash", {"r": 9, "d": 3}, targets=targets)
    assert subspace.match_budget("lora-dash", MODEL, parameters, targets=targets, d=3) == 9
    assert subspace.match_budget("LoRA+MPC_o", MODEL, parameters, targets=targets) == 9


@pytest.mark.parametrize("method", ["pissa", "milora", "spectral"])
def test_a_size_that_a_layer_refuses_is_not_taken(method: str) -> None:
    assert match_budget(method, MODEL, 10**6) == 32


def test_a_spectrum_ends_where_it_ends() -> None:
    """Singular values are no more than the smaller side: 32 at k and v, 64 elsewhere."""
    every = count_trained(MODEL, "svdiff")
    assert match_budget("svdiff", MODEL, 10 * every) == 64
    assert match_budget("svdiff", MODEL, every) == 64
    assert match_budget("svdiff", MODEL, every - 2) == 64
    assert match_budget("svdiff", MODEL, every - 4) == 63


@pytest.mark.parametrize(
    ("method", "parameters", "settings", "complaint"),
    [
        ("ssl", 100, {}, r"the size of method ssl cannot be chosen\. That of these can: .*lora \(r\)"),
        ("lora", 100, {"r": 4}, "r=4 was given, but r is what is looked for"),
        ("lora", 0, {}, "0 parameters were asked for"),
        ("lora", 100, {"rank": 4}, "method lora has no setting 'rank'"),
        ("lroa", 100, {}, "Did you mean 'lora'"),
    ],
)
def test_what_cannot_be_matched_is_refused(
    method: str, parameters: int, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        match_budget(method, MODEL, parameters, **settings)
