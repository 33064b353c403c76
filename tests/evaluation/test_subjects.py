"""Several subjects on one load: adapters of different methods go in and out, and each scores as it does alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import datasets
import pytest
import torch

from subspace.adapters.inject import adapters, inject, remove_adapters, trained_parameters
from subspace.adapters.registry import list_methods
from subspace.adapters.serialization import load_adapter, save_adapter
from subspace.data import samples as samples_module
from subspace.distributed.watchdog import Watchdog
from subspace.evaluation import evaluate as evaluate_module
from subspace.evaluation import subjects
from subspace.evaluation.config import EvaluateConfig, EvaluationSubject
from subspace.evaluation.results import read_items
from subspace.evaluation.subjects import evaluate_subjects
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model, open_tokenizer
from tests.helpers.items import items
from tests.helpers.tiny_models import tiny_llama

METHODS = ["lora", "prefix", "houlsby", "dora"]


@pytest.fixture(autouse=True)
def made_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "task_items", lambda name, split: datasets.Dataset.from_list(items(name, 12)))


def perturb(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("method", list_methods())
def test_a_model_is_what_it_was_once_adapters_are_out(method: str) -> None:
    model, ids = tiny_llama(), torch.arange(20)[None]
    before, tensors, modules = model(ids).logits, model.state_dict(), [type(m) for m in model.modules()]
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    inject(model, method)
    perturb(model)
    assert not torch.equal(model(ids).logits, before)
    remove_adapters(model)
    assert torch.equal(model(ids).logits, before)
    after = model.state_dict()
    assert after.keys() == copies.keys()
    assert all(torch.equal(after[name], copies[name]) for name in copies)
    assert [type(m) for m in model.modules()] == modules


def test_adapters_within_adapters_come_out() -> None:
    model, ids = tiny_llama(), torch.arange(20)[None]
    before = model(ids).logits
    inject(model, "lora")
    inject(model, "prefix")
    remove_adapters(model)
    assert not adapters(model)
    assert torch.equal(model(ids).logits, before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny model, and adapters of several methods for it."""
    folder = tmp_path_factory.mktemp("subjects")
    tiny_llama(folder / "base")
    for method in METHODS:
        model = tiny_llama()
        inject(model, method)
        perturb(model)
        save_adapter(model, folder / method)
    return folder


def subject(base: Path, out: Path, method: str = "", **settings: Any) -> EvaluationSubject:
    config = EvaluateConfig(**{"protocol": "likelihood,llm-adapters", "tasks": "siqa,openbookqa", **settings})
    model = ModelConfig(path=str(base / "base"), dtype="float32")
    return EvaluationSubject(model, config, out / (method or "base"), base / method if method else None, method)


def test_all_are_scored_on_one_load_as_each_is_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[ModelConfig] = []
    laid_out: list[EvaluateConfig] = []

    def counting(config: ModelConfig, zero3: Any) -> Any:
        opened.append(config)
        return open_model(config, zero3)

    def laying(model: Any, tokenizer: Any, config: EvaluateConfig, progress: Any, samples: Any) -> Any:
        laid_out.append(config)
        return evaluate_module.build_jobs(model, tokenizer, config, progress, samples)

    monkeypatch.setattr(subjects, "open_model", counting)
    monkeypatch.setattr(subjects, "build_jobs", laying)
    wanted = [subject(base, tmp_path, method) for method in ("lora", "", *METHODS[1:])]
    together = evaluate_subjects(wanted)
    assert (len(opened), len(laid_out)) == (1, 1)

    seen = set()
    for one, results in zip(wanted, together, strict=True):
        model, tokenizer = open_model(one.model), open_tokenizer(one.model)
        if one.adapter:
            load_adapter(model, one.adapter)
        alone = evaluate_module.evaluate(model, tokenizer, one.evaluate, tmp_path / "alone" / one.folder.name)
        for mine, its in zip(results, alone, strict=True):
            assert mine.items
            assert its.items
            assert read_items(mine.items) == read_items(its.items)
            assert (mine.adapter, mine.subject) == (one.method, its.subject)
        seen.add(str(read_items(results[0].items or Path())))
    assert len(seen) == len(wanted)


def test_subjects_that_are_scored_otherwise_are_laid_out_otherwise(base: Path, tmp_path: Path) -> None:
    plain, short = subject(base, tmp_path), subject(base, tmp_path, "lora", limit=5)
    assert [[r.n for r in results] for results in evaluate_subjects([plain, short])] == [[12] * 4, [5] * 4]


def test_a_scoring_is_watched_from_the_loading_of_the_model_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes wait for one another there as in a training."""
    limits, beats = [], []

    class Noted(Watchdog):
        def __enter__(self) -> Self:
            limits.append((self.folder, self.seconds))
            return super().__enter__()

        def beat(self, doing: int | str, patience: float = 1.0) -> None:
            beats.append(doing)
            super().beat(doing, patience)

    monkeypatch.setattr(subjects, "Watchdog", Noted)
    evaluate_subjects([subject(base, tmp_path, tasks="siqa", protocol="likelihood", hang_minutes=7.0)])
    assert limits == [(tmp_path / "base" / "hang", 420.0)]
    assert beats[0] == "the loading of the model"
    assert any(str(beat).startswith("score ") for beat in beats[1:])
