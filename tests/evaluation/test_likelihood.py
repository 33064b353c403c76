"""Protocol ``likelihood``: what shares a row, and that sharing, padding and batching change no score."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from subspace.adapters.inject import inject, trained_parameters
from subspace.adapters.registry import list_methods
from subspace.data import tasks as tasks_module
from subspace.data.tokenization import encode_pairs
from subspace.errors import UserError
from subspace.evaluation.batching import plan_batches
from subspace.evaluation.choice_scoring import ScoringRow, build_scoring_rows, score_choices
from subspace.evaluation.protocols.likelihood import Likelihood
from subspace.models.lm_head import lm_head_on_positions
from tests.helpers.items import items
from tests.helpers.tiny_models import ARCHITECTURES, VOCABULARY, bpe_tokenizer, tiny, tiny_llama

Choices = list[tuple[list[int], int]]

WINDOW = 2048


def made_choices(count: int, seed: int = 0) -> list[Choices]:
    """Return items of two to five choices that share a context, some of them a few more tokens, or nothing at all."""
    draw = random.Random(seed)

    def tokens(fewest: int, most: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(draw.randint(fewest, most))]

    def item() -> Choices:
        context, more = tokens(1, 40), tokens(0, 3)
        shared = draw.choice([[], context, context])
        contexts = [shared or tokens(1, 10) for _ in range(draw.randint(2, 5))]
        return [(own + more + tokens(1, 9), len(own)) for own in contexts]

    return [item() for _ in range(count)]


def plain_scores(model: nn.Module, choices: Choices) -> list[float]:
    """Score each choice by itself, from the definition."""

    def score(ids: list[int], num_context: int) -> float:
        log_probabilities = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(log_probabilities[i - 1, ids[i]]) for i in range(num_context, len(ids)))

    return [score(*choice) for choice in choices]


def shared_scores(model: nn.Module, made: Sequence[Choices]) -> list[list[float]]:
    return score_choices(model, [row for choices in made for row in build_scoring_rows(choices, WINDOW, share=True)])


def flat(scores: Sequence[Sequence[float]]) -> list[float]:
    return [score for several in scores for score in several]


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def test_a_row_holds_what_is_alike_once() -> None:
    (row,) = build_scoring_rows([([5, 6, 7, 8, 9], 2), ([5, 6, 7, 3, 4, 2], 2), ([5, 6, 1], 2)], WINDOW, share=True)
    assert row == ScoringRow(
        ids=[5, 6, 7, 8, 7, 3, 4],
        positions=[0, 1, 2, 3, 2, 3, 4],
        branches=[0, 0, 1, 1, 2, 2, 2],
        reads=[[1, 2, 3], [1, 4, 5, 6], [1]],
        targets=[[7, 8, 9], [7, 3, 4, 2], [1]],
    )


def test_choices_of_one_token_need_no_row_of_their_own() -> None:
    (row,) = build_scoring_rows([([5, 6, 7], 2), ([5, 6, 8], 2)], WINDOW, share=True)
    assert row == ScoringRow(ids=[5, 6], positions=[0, 1], branches=[0, 0], reads=[[1], [1]], targets=[[7], [8]])


def test_without_sharing_each_choice_has_its_row() -> None:
    rows = build_scoring_rows([([5, 6, 7], 2), ([5, 6, 8, 9], 2)], WINDOW, share=False)
    assert [row.ids for row in rows] == [[5, 6], [5, 6, 8]]
    assert [row.targets for row in rows] == [[[7]], [[8, 9]]]


@pytest.mark.parametrize(
    ("context", "window", "read"),
    [
        (range(10), 10, [1, 2, 3, 4, 5, 6, 7, 8, 9, 20]),
        (range(10), 11, [*range(10), 20]),
        (range(3), 10, [0, 1, 2, 20]),
    ],
)
def test_a_long_text_loses_its_beginning(context: range, window: int, read: list[int]) -> None:
    (row,) = build_scoring_rows([([*context, 20, 21], len(context))], window, share=True)
    assert (row.ids, row.targets) == (read, [[20, 21]])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (([1, 2], 2), "context or continuation has no token"),
        (([1, 2], 0), "context or continuation has no token"),
        (([1, *range(9)], 1), "a choice of 9 tokens was to be scored, but the model reads only 8 at once"),
    ],
)
def test_what_cannot_be_scored_is_refused(choice: tuple[list[int], int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_scoring_rows([choice], 8, share=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sharing_changes_no_score(architecture: str) -> None:
    model = tiny(architecture, attn_implementation="eager" if architecture == "gemma2" else "sdpa")
    made = made_choices(12)
    assert flat(shared_scores(model, made)) == pytest.approx(flat([plain_scores(model, c) for c in made]), abs=1e-4)


def test_sharing_changes_no_score_in_eager_attention() -> None:
    model, made = tiny_llama(attn_implementation="eager"), made_choices(12)
    assert flat(shared_scores(model, made)) == pytest.approx(flat([plain_scores(model, c) for c in made]), abs=1e-4)


@pytest.mark.parametrize("method", list_methods())
def test_sharing_changes_no_score_with_adapters(method: str) -> None:
    model, made = tiny_llama(), made_choices(12)
    before = flat(shared_scores(model, made))
    inject(model, method)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained_parameters(model).values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    shared = flat(shared_scores(model, made))
    assert shared == pytest.approx(flat([plain_scores(model, c) for c in made]), abs=1e-3)
    assert shared != pytest.approx(before, abs=0.1)


def test_a_batch_is_scored_as_its_rows_are() -> None:
    model = tiny_llama()
    rows = [row for choices in made_choices(12) for row in build_scoring_rows(choices, WINDOW, share=True)]
    assert flat(score_choices(model, rows)) == pytest.approx(
        flat([score_choices(model, [r])[0] for r in rows]), abs=1e-4
    )


def test_the_head_runs_where_a_token_is_scored() -> None:
    model, places = tiny_llama(), torch.tensor([2, 7])
    ids = torch.arange(10).reshape(2, 5)
    with lm_head_on_positions(model, places):
        logits = model(ids).logits
    assert logits.shape == (1, 2, VOCABULARY)
    torch.testing.assert_close(logits[0], model(ids).logits.flatten(0, 1)[places])


def test_half_precision_is_summed_in_full() -> None:
    model, made = tiny_llama(), made_choices(12)
    exact = flat(shared_scores(model, made))
    rough = flat(shared_scores(model.to(torch.bfloat16), made))  # type: ignore[arg-type]
    assert rough == pytest.approx(exact, rel=0.05, abs=0.5)
    assert rough != pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("name", tasks_module.list_tasks())
@pytest.mark.parametrize("budget", [1, 300])
def test_answers_do_not_depend_on_the_batch(name: str, budget: int) -> None:
    model, made = tiny_llama(), items(name, 20)
    scorer = Likelihood(model, bpe_tokenizer(), tasks_module.find_task(name), made)
    together = scorer.score(model, range(20))
    apart = {
        n: r
        for batch in plan_batches(scorer.sizes, budget)
        for n, r in zip(batch, scorer.score(model, batch), strict=True)
    }
    assert [apart[n]["prediction"] for n in range(20)] == [record["prediction"] for record in together]
    assert flat([apart[n]["scores"] for n in range(20)]) == pytest.approx(
        flat([r["scores"] for r in together]), abs=1e-4
    )


@pytest.mark.parametrize("window", [16, 1024])
def test_a_sliding_window_is_respected(window: int) -> None:
    """A 4-d mask would take the window's place, so choices of texts longer than it stand alone."""
    model, made, task = tiny("mistral", sliding_window=window), items("piqa", 12), tasks_module.find_task("piqa")
    tokenizer = bpe_tokenizer()
    encoded = [encode_pairs(tokenizer, task.likelihood.requests(item)) for item in made]
    scores = [record["scores"] for record in Likelihood(model, tokenizer, task, made).score(model, range(12))]
    assert flat(scores) == pytest.approx(flat([plain_scores(model, choices) for choices in encoded]), abs=1e-4)
    whole = flat([plain_scores(tiny("mistral"), choices) for choices in encoded])
    assert (flat(scores) == pytest.approx(whole, abs=1e-2)) is (window == 1024)
