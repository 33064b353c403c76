"""LoRA+ by HF PEFT's rule, beside PEFT's own optimizer; our rule, by roles, is tested with the loop."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from subspace.adapters.inject import inject
from subspace.training.config import TrainConfig
from subspace.training.optimizers import parameter_groups
from tests.helpers.tiny_models import tiny, tiny_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]


def sizes(groups: list[dict[str, object]]) -> dict[float, Counter[int]]:
    """Return how many tensors of which size learn at each rate."""
    found: dict[float, Counter[int]] = {}
    for group in groups:
        for parameter in group["params"]:  # type: ignore[attr-defined]
            found.setdefault(group["lr"], Counter())[parameter.numel()] += 1  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("method", "theirs"),
    [
        ("lora", LoraConfig(r=4, target_modules=TARGETS)),
        ("dora", LoraConfig(r=4, target_modules=TARGETS, use_dora=True)),
        ("adalora", AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS)),
    ],
)
def test_groups_and_rates_are_pefts(method: str, theirs: PeftConfig) -> None:
    with warnings.catch_warnings():  # PEFT asks transformers for what that has renamed
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(tiny_llama(), theirs)
        optimizer = create_loraplus_optimizer(peft_model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    model = tiny_llama()
    inject(model, method, {"r": 4}, targets=TARGETS)
    config = TrainConfig(learning_rate=1e-3, lora_plus_lr_ratio=16.0, lora_plus_rule="peft")
    ours, by_role = (
        sizes(parameter_groups(model, c)) for c in (config, TrainConfig(learning_rate=1e-3, lora_plus_lr_ratio=16))
    )
    # PEFT counts AdaLoRA's ranknum with its parameters; it is frozen, and so in no group.
    assert ours == sizes(optimizer.param_groups)
    assert (by_role == ours) == (method != "dora"), "by role, DoRA's magnitude learns as slowly as A"


def test_by_pefts_rule_biases_are_fast() -> None:
    model = tiny("qwen2")
    inject(model, "bitfit", targets=["q_proj"])
    config = TrainConfig(learning_rate=1e-3, lora_plus_lr_ratio=16.0, lora_plus_rule="peft")
    assert [group["lr"] for group in parameter_groups(model, config)] == [16e-3]
