"""Trained numbers as exact integers, every method on the true shapes: arithmetic on the papers' formulas, by hand.

On q, k, v, up and down, a LLaMA-7B has 876,544 inputs and as many outputs; the smaller sides add up to 655,360. A
LLaMA3-8B has 983,040 inputs, 786,432 outputs and smaller sides of 458,752.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import nn

from subspace.adapters.parameter_count import count_trained
from subspace.adapters.registry import list_methods, resolve_method
from subspace.models.config import ModelConfig
from subspace.models.loading import open_shape

R = {"r": 32}
LLAMA_7B: list[tuple[str, dict[str, Any], int]] = [
    ("adalora", R, 56_103_936),
    ("bitfit", {}, 876_544),
    ("dora", R, 56_975_360),
    ("dora", {"r": 4}, 7_888_896),
    ("flexlora", {"r": 32, "headroom": 4}, 56_103_936),
    ("flora", R, 56_262_656),
    ("full", {}, 6_738_415_616),
    ("houlsby", {"bottleneck": 32}, 17_041_408),
    ("ia3", {}, 876_544),
    ("ia3", {"variant": "original"}, 614_400),
    ("liera", R, 56_098_816),
    ("lora", R, 56_098_816),
    ("rslora", R, 56_098_816),
    ("lora+mpc-o", R, 56_098_816),
    ("lora+mpc-d", R, 56_098_816),
    ("lora+mpc-n", R, 56_098_816),
    ("lora-dash", R, 56_100_096),
    ("milora", R, 56_098_816),
    ("moslora", R, 56_262_656),
    ("p-tuning", {"n": 20, "hidden": 4096}, 50_425_856),
    ("parallel", {"bottleneck": 32}, 56_098_816),
    ("pfeiffer", {"bottleneck": 32}, 8_520_704),
    ("pissa", R, 56_098_816),
    ("prefix", {"n": 30}, 7_864_320),
    ("p-tuning-v2", {"n": 30}, 7_864_320),
    ("prompt", {"n": 20}, 81_920),
    ("sam-parser", {}, 655_360),
    ("series", {"bottleneck": 256}, 67_108_864),
    ("spectral", R, 56_098_816),
    ("ssb", {}, 1_753_088),
    ("ssl", {}, 876_544),
    ("svdiff", {}, 655_360),
    ("trilora", R, 56_103_936),
    ("trilora+mpc-o", R, 56_103_936),
]
LLAMA3_8B: list[tuple[str, dict[str, Any], int]] = [
    ("lora", R, 56_623_104),
    ("dora", R, 56_623_104 + 786_432),
    ("prefix", {"n": 30}, 1_966_080),
    ("ssb", {}, 1_769_472),
    ("ssl", {}, 983_040),
    ("bitfit", {}, 786_432),
    ("svdiff", {}, 458_752),
    ("full", {}, 8_030_261_248),
]
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@functools.cache
def shape(name: str) -> nn.Module:
    return open_shape(ModelConfig(path=name))


def count(model: str, method: str, settings: dict[str, Any]) -> int:
    cls, presets = resolve_method(method)
    linear = cls.target_kind(cls.Config(**presets, **settings)) == "linear"
    own_targets = settings.get("variant") == "original"
    return count_trained(shape(model), method, settings, targets=FIVE if linear and not own_targets else None)


def test_every_method_is_counted() -> None:
    assert {resolve_method(method)[0].name for method, _, _ in LLAMA_7B} == set(list_methods())


@pytest.mark.parametrize(("method", "settings", "expected"), LLAMA_7B)
def test_llama_7b(method: str, settings: dict[str, Any], expected: int) -> None:
    assert count("llama-7b", method, settings) == expected


@pytest.mark.parametrize(("method", "settings", "expected"), LLAMA3_8B)
def test_llama3_8b(method: str, settings: dict[str, Any], expected: int) -> None:
    """Grouped queries: keys and values are a quarter as wide as queries."""
    assert count("llama3-8b", method, settings) == expected


@pytest.mark.parametrize(
    ("model", "method", "settings", "targets", "per_cent"),
    [
        ("llama-7b", "lora", {"r": 32}, FIVE, 0.83),
        ("llama-7b", "lora", {"r": 4}, FIVE, 0.10),
        ("llama-7b", "series", {"bottleneck": 256}, ["down_proj"], 0.986),
        ("llama-7b", "parallel", {"bottleneck": 256}, ["up_proj", "down_proj"], 3.542),
        ("llama-7b", "prefix", {"n": 30}, None, 0.117),
        ("llama3-8b", "lora", {"r": 32}, FIVE, 0.70),
        ("llama3-8b", "lora", {"r": 16}, FIVE, 0.35),
    ],
)
def test_published_shares(
    model: str, method: str, settings: dict[str, Any], targets: list[str] | None, per_cent: float
) -> None:
    trained = count_trained(shape(model), method, settings, targets=targets)
    base = sum(parameter.numel() for parameter in shape(model).parameters())
    digits = len(f"{per_cent}".partition(".")[2])
    assert round(100 * trained / (base + trained), max(2, digits)) == per_cent
