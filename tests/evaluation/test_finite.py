"""A model that yields NaN or infinity gets no score: the scoring ends, names the item and the cause, writes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from subspace.adapters.inject import inject, trained_parameters
from subspace.data.samples import take_sample
from subspace.data.tasks import find_task
from subspace.errors import RunFailed
from subspace.evaluation import config as config_module
from subspace.evaluation.evaluate import evaluate
from subspace.evaluation.results import RESULTS
from tests.helpers.tiny_models import bpe_tokenizer, tiny_llama
from tests.workers.score_tasks import made_items

BROKEN = {"nan": math.nan, "infinity": math.inf, "minus infinity": -math.inf}


def score(model: Any, protocol: str, folder: Path, **more: Any) -> None:
    config = config_module.EvaluateConfig(protocol=protocol, tasks="piqa", limit=4, **more)
    with made_items(12):
        evaluate(model, bpe_tokenizer(), config, folder)


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("protocol", config_module.PROTOCOLS)
def test_a_broken_adapter_gets_no_score(tmp_path: Path, protocol: str, value: str) -> None:
    model = tiny_llama()
    inject(model, "lora", {"r": 2})
    name, parameter = list(trained_parameters(model).items())[1]
    parameter.data.view(-1)[0] = BROKEN[value]
    with pytest.raises(RunFailed, match="PIQA, by .*, item '.*': the model's outputs are NaN or infinite") as raised:
        score(model, protocol, tmp_path)
    assert f"{name} holds values that are not finite" in str(raised.value)
    assert raised.value.status == 1
    assert not list(tmp_path.rglob(RESULTS))


@pytest.mark.parametrize("protocol", config_module.PROTOCOLS)
def test_the_first_item_is_named_wherever_it_stands_in_a_batch(tmp_path: Path, protocol: str) -> None:
    """One item overflows among others that do not: it is the one that is named, and finite weights are not blamed."""
    model, tokenizer = tiny_llama(), bpe_tokenizer()
    with made_items(12):
        chosen = take_sample(find_task("piqa"), "test", 4).items
    marked, *others = [chosen[2], *chosen[:2], chosen[3]]
    own = {*tokenizer(marked["question"])["input_ids"]}
    own -= {
        token
        for item in others
        for text in (item["question"], *item["choices"])
        for token in tokenizer(text)["input_ids"]
    }
    token = min(own)

    def overflow(module: nn.Module, given: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        return torch.where((given[0] == token).any(1)[:, None, None], torch.inf, out)

    model.model.embed_tokens.register_forward_hook(overflow)
    with pytest.raises(RunFailed, match=f"item '{marked['id']}'.*weights are finite"):
        score(model, protocol, tmp_path, batch_tokens=2048)
    assert not list(tmp_path.rglob(RESULTS))


def test_float16_is_told_its_range(tmp_path: Path) -> None:
    model = nn.Module.to(tiny_llama(), torch.float16)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e4)
        model.model.layers[0].mlp.down_proj.weight.fill_(60000.0)
    with pytest.raises(RunFailed, match=r"exceed float16's range \(65,504\). Score with model.dtype=bfloat16"):
        score(model, "likelihood", tmp_path)
