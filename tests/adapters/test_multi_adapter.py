"""Adapters of several subjects in one batch: each subject's answers are those that it has alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn

from subspace.adapters.inject import adapters, inject, remove_adapters, trained_parameters
from subspace.adapters.multi_adapter import MixedAdapters, batch_adapters, can_batch_adapters
from subspace.adapters.registry import list_methods
from subspace.adapters.serialization import save_adapter
from subspace.data import samples as samples_module
from subspace.evaluation.config import EvaluateConfig, EvaluationSubject
from subspace.evaluation.protocols.likelihood import Likelihood
from subspace.evaluation.results import TaskResult, read_items
from subspace.evaluation.subjects import evaluate_subjects
from subspace.models.config import ModelConfig
from tests.helpers.items import items
from tests.helpers.tiny_models import tiny_llama

ELSEWHERE = {"full", "pfeiffer", "prefix", "prompt", "p-tuning"}
PROTOCOLS = "likelihood,llm-adapters,answer-word"


def perturb(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def put_in(model: nn.Module, method: str, seed: int, **settings: Any) -> None:
    inject(model, method, settings, seed=seed)
    perturb(model, seed)


@pytest.mark.parametrize("method", list_methods())
def test_a_batch_of_several_subjects_gives_each_its_own(method: str) -> None:
    """Two of a method, one of LoRA with another rank at other layers, and the base."""
    model, ids = tiny_llama(), torch.arange(60).reshape(3, 20)
    found, alone = [], []
    for seed, (name, targets) in enumerate([(method, None), ("lora", ["q_proj", "down_proj"]), (method, None)]):
        inject(model, name, {"r": 3} if targets else {}, targets=targets, seed=seed)
        perturb(model, seed)
        if not can_batch_adapters(model):
            assert method in ELSEWHERE
            return
        found.append(adapters(model))
        alone.append(model(ids).logits)
        remove_adapters(model)
    assert method not in ELSEWHERE
    before = model(ids).logits
    with torch.no_grad(), batch_adapters(model, [*found, {}]):
        together = model(ids.repeat(4, 1)).logits
    torch.testing.assert_close(together, torch.cat([*alone, before]), atol=2e-4, rtol=1e-4)
    assert not torch.allclose(together[:3], together[6:9], atol=1e-2)
    assert torch.equal(model(ids).logits, before)


def test_low_rank_updates_are_one_product() -> None:
    model = tiny_llama()
    found = []
    for method in ("lora", "moslora"):
        put_in(model, method, 0)
        found.append(adapters(model))
        remove_adapters(model)
    calls: list[Tensor] = []
    for adapter in found[0].values():
        adapter.register_forward_hook(lambda *_: calls.append(torch.zeros(0)))
    with torch.no_grad(), batch_adapters(model, found):
        assert all(part.factors is not None for part in model.modules() if isinstance(part, MixedAdapters))
        model(torch.arange(20).repeat(2, 1))
    assert not calls


def test_a_constraint_that_is_no_update_of_a_weight_runs_by_itself() -> None:
    model = tiny_llama()
    put_in(model, "lora+mpc-n", 0)
    found = adapters(model)
    remove_adapters(model)
    with batch_adapters(model, [found]):
        assert all(part.factors is None for part in model.modules() if isinstance(part, MixedAdapters))


def test_nothing_is_dropped_out() -> None:
    model, ids = tiny_llama().train(), torch.arange(20)[None]
    put_in(model, "dora", 0, dropout=0.5)
    found, expected = adapters(model), model.eval()(ids).logits
    model.train()
    remove_adapters(model)
    with torch.no_grad(), batch_adapters(model, [found]):
        torch.testing.assert_close(model.eval()(ids).logits, expected)


# Whole scorings


@pytest.fixture(autouse=True)
def made_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "task_items", lambda name, split: datasets.Dataset.from_list(items(name, 12)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny model, and adapters of several methods for it."""
    folder = tmp_path_factory.mktemp("mixed")
    tiny_llama(folder / "base")
    for seed, method in enumerate(("lora", "prefix", "houlsby", "dora")):
        model = tiny_llama()
        put_in(model, method, seed)
        save_adapter(model, folder / method)
    return folder


def scored(base: Path, out: Path, mix: bool, **settings: Any) -> list[list[TaskResult]]:
    config = EvaluateConfig(**{"protocol": PROTOCOLS, "tasks": "siqa,openbookqa", "batch_adapters": mix, **settings})
    model = ModelConfig(path=str(base / "base"), dtype="float32")
    return evaluate_subjects(
        [
            EvaluationSubject(model, config, out / (method or "base"), base / method if method else None, method)
            for method in ("lora", "prefix", "", "houlsby", "dora")
        ]
    )


def test_each_subject_s_answers_are_those_that_it_has_alone(base: Path, tmp_path: Path) -> None:
    together, alone = (scored(base, tmp_path / str(mix), mix, batch_tokens=400) for mix in (True, False))
    answers = set()
    for mine, its in zip(together, alone, strict=True):
        for one, other in zip(mine, its, strict=True):
            assert one.items
            assert other.items
            predictions = [[record["prediction"] for record in read_items(file)] for file in (one.items, other.items)]
            assert predictions[0] == predictions[1]
            assert (one.subject, one.fingerprint, one.adapter) == (other.subject, other.fingerprint, other.adapter)
        answers.add(str([read_items(one.items) for one in mine if one.items]))
    assert len(answers) == 5


class Killed(BaseException):
    """Stands for a signal that no handler sees."""


def test_a_killed_scoring_ends_with_the_same_files(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"protocol": "likelihood", "batch_tokens": 400}
    undisturbed = scored(base, tmp_path / "undisturbed", True, **settings)
    plain, passes = Likelihood.score, 0

    def killing(self: Likelihood, model: Any, batch: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes % 4 == 0:
            raise Killed
        return plain(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Likelihood, "score", killing)
        kills = 0
        while True:
            try:
                scored(base, tmp_path / "killed", True, **settings)
                break
            except Killed:
                kills += 1
    assert kills > 3
    for result in (one for results in undisturbed for one in results):
        assert result.items
        file = tmp_path / "killed" / result.items.relative_to(tmp_path / "undisturbed")
        assert file.read_bytes() == result.items.read_bytes()
