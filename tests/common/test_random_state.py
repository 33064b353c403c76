"""Generators: whoever borrows one gives it back, and touches no other; a checkpoint has them all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import subspace
from subspace.adapters import linalg
from subspace.adapters.inject import inject
from subspace.common.random_state import random_states, seeded, set_random_states
from subspace.evaluation.protocols.llm_adapters_published import _dropout
from tests.helpers.tiny_models import tiny_llama


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.Generator]:
    """Return the generators of two GPUs, of which this process has the second; a CPU's stand in for them."""
    generators = [torch.Generator().manual_seed(number) for number in (1, 2)]
    monkeypatch.setattr(torch.cuda, "default_generators", tuple(generators))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return generators


def test_a_seed_is_torchs_and_is_given_back() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    with seeded(5):
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("device", "seen"), [("cuda:0", 0), ("cuda", 1), ("cpu", None), ("meta", None)])
def test_a_seed_touches_one_device(gpus: list[torch.Generator], device: str, seen: int | None) -> None:
    before = [generator.get_state() for generator in (torch.default_generator, *gpus)]
    with seeded(7, torch.device(device)):
        for number, generator in enumerate((torch.default_generator, *gpus)):
            chosen = number == (0 if seen is None else 1 + seen)
            assert (generator.initial_seed() == 7) == chosen
    for generator, state in zip((torch.default_generator, *gpus), before, strict=True):
        assert torch.equal(generator.get_state(), state)


def put_adapters_in(model: nn.Module) -> None:
    inject(model, "lora")


def decompose(model: nn.Module) -> None:
    linalg.largest_triplets(torch.rand(20, 16, generator=torch.Generator().manual_seed(0)), 2)


def score_with_dropout(model: nn.Module) -> None:
    with _dropout(model, ["a prompt"], active=True):
        torch.rand(1)


@pytest.mark.parametrize("borrow", [put_adapters_in, decompose, score_with_dropout])
def test_borrowing_reseeds_no_gpu(monkeypatch: pytest.MonkeyPatch, borrow: Callable[[nn.Module], None]) -> None:
    model = tiny_llama()
    reseeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    monkeypatch.setattr(linalg, "SMALL", 8)  # so that a small W is decomposed at random
    borrow(model)
    assert reseeded == []


def test_no_other_code_forks_or_seeds_the_process() -> None:
    """``fork_rng`` warns where there are several GPUs; ``torch.manual_seed`` is for a run's beginning."""
    root = Path(subspace.__file__).parent
    texts = {str(path.relative_to(root)): path.read_text() for path in root.rglob("*.py")}
    assert [path for path, text in texts.items() if "fork_rng(" in text] == []
    assert {path for path, text in texts.items() if "torch.manual_seed(" in text} <= {
        "run.py",
        "training/resume.py",
        "common/random_state.py",  # its docstring
    }


def test_every_gpus_generator_comes_back(gpus: list[torch.Generator]) -> None:
    states = json.loads(json.dumps(random_states()))
    drawn = [torch.rand(4, generator=generator) for generator in gpus]
    set_random_states(states)
    assert all(torch.equal(torch.rand(4, generator=g), values) for g, values in zip(gpus, drawn, strict=True))


def test_the_own_gpus_state_follows_it_to_another_number(
    gpus: list[torch.Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    states = random_states()
    drawn = torch.rand(4, generator=gpus[1])
    alone = torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", (alone,))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    set_random_states(states)
    assert torch.equal(torch.rand(4, generator=alone), drawn)


def test_states_of_older_checkpoints_are_read(gpus: list[torch.Generator]) -> None:
    states = random_states()
    del states["cuda_devices"]
    drawn = torch.rand(4, generator=gpus[1])
    set_random_states(states)
    assert torch.equal(torch.rand(4, generator=gpus[1]), drawn)
