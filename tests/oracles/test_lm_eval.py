"""Protocol ``likelihood`` against lm-evaluation-harness itself: the same questions, scores and answers."""

from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from subspace.data import tasks as tasks_module
from subspace.data.items import Item
from subspace.data.samples import Sample, take_sample
from subspace.evaluation.config import EvaluateConfig
from subspace.evaluation.evaluate import evaluate
from subspace.evaluation.protocols.likelihood import Likelihood, draw_examples
from subspace.evaluation.records import ItemRecord
from subspace.evaluation.results import read_items
from subspace.evaluation.retention import PassageScorer
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model, open_tokenizer
from tests.helpers.items import items
from tests.helpers.tiny_models import bpe_tokenizer, save_sentencepiece, tiny_llama

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the harness warns of when it is imported
    pytest.importorskip("lm_eval", reason="needs lm-eval")  # the library alone: a helper that has moved must fail
    from tests.helpers import lm_eval_harness as harness

every_task = pytest.mark.parametrize("name", list(tasks_module.list_tasks()))


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Keep the harness's progress bars to themselves."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Return tokenizers in LLaMA-3's and in LLaMA-2's manner; both put a token before every text."""
    if request.param == "bpe":
        return bpe_tokenizer()
    folder = tmp_path_factory.mktemp("sentencepiece")
    save_sentencepiece(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def both(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, items: Sequence[Item]
) -> tuple[list[ItemRecord], list[list[float]], list[dict[str, int]]]:
    """Return our records, the harness's scores, and its predictions."""
    task = harness.harness_task(name, items)
    theirs = harness.harness_scores(harness.harness_model(model, tokenizer), task)
    ours = Likelihood(model, tokenizer, tasks_module.find_task(name), items).score(model, range(len(items)))
    return ours, theirs, harness.harness_predictions(task, theirs)


@every_task
def test_the_harness_is_fed_the_same_items(name: str) -> None:
    task = tasks_module.find_task(name)
    made = items(name, 30)
    back = [task.make_item(harness.RECORDS[name](item), 0, "test") | {"id": item["id"]} for item in made]
    assert back == made


@every_task
def test_the_harness_asks_the_same(name: str) -> None:
    made = items(name, 30)
    theirs = [instance.args for instance in harness.harness_task(name, made).instances]
    assert [request for item in made for request in tasks_module.find_task(name).likelihood.requests(item)] == theirs


@every_task
@pytest.mark.parametrize("count", [1, 3])
def test_the_harness_s_examples_are_drawn(name: str, count: int) -> None:
    """The items of a sample have the examples that they have when the harness scores all of the split."""
    made = items(name, 20)
    instances = harness.harness_task(name, made, examples=count).instances
    theirs = {(instance.doc_id, instance.idx): instance.args for instance in instances}
    positions = [2, 5, 17]
    asked: dict[Any, Any] = {}
    own = tasks_module.find_task(name).splits["test"].official == "test"
    drawn = draw_examples(made, [made[n] for n in positions], positions, count, own_test_split=own)
    for position, several in zip(positions, drawn, strict=True):
        scorer = Likelihood(
            tiny_llama(), bpe_tokenizer(), tasks_module.find_task(name), [made[position]], examples=[several]
        )
        asked |= {(position, n): pair for n, pair in enumerate(scorer.requests[0])}
    assert asked == {key: theirs[key] for key in asked}


@every_task
def test_scores_and_answers_are_the_harness_s(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    ours, scores, predictions = both(tiny_llama(), tokenizer, name, items(name, 20))
    assert [score for record in ours for score in record["scores"]] == pytest.approx([*chain(*scores)], abs=1e-3)
    assert [record["prediction"] for record in ours] == predictions


def test_what_is_too_long_loses_the_same_beginning() -> None:
    model = tiny_llama(max_position_embeddings=64)
    ours, scores, predictions = both(model, bpe_tokenizer(), "boolq", items("boolq", 20))
    assert [score for record in ours for score in record["scores"]] == pytest.approx([*chain(*scores)], abs=1e-3)
    assert [record["prediction"] for record in ours] == predictions


@pytest.mark.model
@pytest.mark.long
@every_task
def test_every_real_item_is_asked_the_same(name: str) -> None:
    real = take_sample(tasks_module.find_task(name), "test", None).items
    theirs = [instance.args for instance in harness.harness_task(name, real).instances]
    assert [request for item in real for request in tasks_module.find_task(name).likelihood.requests(item)] == theirs


@pytest.fixture(scope="module")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = ModelConfig(dtype="float32")
    return open_model(config), open_tokenizer(config)


@pytest.fixture(scope="module")
def fast() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a tiny random model that reads SmolLM2's tokens."""
    tokenizer = open_tokenizer(ModelConfig())
    return tiny_llama(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, head_dim=8), tokenizer


@pytest.mark.model
@pytest.mark.long
@pytest.mark.parametrize(("which", "limit"), [("fast", None), ("smollm2", 500)])
@every_task
def test_a_model_answers_the_same(
    name: str,
    which: str,
    limit: int | None,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By every metric on at least 99.8 % of the items; what differs is a tie as far as float32 can tell."""
    model, tokenizer = request.getfixturevalue(which)
    (result,) = evaluate(model, tokenizer, EvaluateConfig(tasks=name, limit=limit), tmp_path)
    assert result.items
    ours = read_items(result.items)
    task = harness.harness_task(name, take_sample(tasks_module.find_task(name), "test", limit).items)
    scores = harness.harness_scores(harness.harness_model(model, tokenizer), task)
    theirs = harness.harness_predictions(task, scores)

    error = max(
        abs(a - b) for r, values in zip(ours, scores, strict=True) for a, b in zip(r["scores"], values, strict=True)
    )
    unlike = [
        (record["id"], metric, gap(record, metric, record["prediction"][metric], prediction[metric]))
        for record, prediction in zip(ours, theirs, strict=True)
        for metric in result.metrics
        if record["prediction"][metric] != prediction[metric]
    ]
    with capsys.disabled():
        print(
            f"\n{name}, {which}: {len(ours)} items, {len(unlike)} answers differ, scores by up to {error:.1e}", unlike
        )
    assert len({item for item, *_ in unlike}) <= 0.002 * len(ours)
    assert all(0 <= distance <= 2 * error for *_, distance in unlike)


def gap(record: ItemRecord, metric: str, one: int, other: int) -> float:
    """Return how much better the first choice is than the second."""
    divisors = record["characters"] if metric == "acc_norm" else [1] * len(record["scores"])
    return float(record["scores"][one] / divisors[one] - record["scores"][other] / divisors[other])


@pytest.mark.parametrize("longest", [512, 40])  # texts within the window, and longer than it
def test_bits_per_byte_are_the_harness_s(tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
    model = tiny_llama(max_position_embeddings=longest)
    task = tasks_module.find_task("boolq")
    passages = [{"id": item["id"], "context": item["context"]} for item in items("boolq", 12)]
    texts = [passage["context"] for passage in passages]
    ours: list[Any] = PassageScorer(model, tokenizer, Sample(task, passages, 0.0)).score(model, range(12))  # type: ignore[arg-type]
    theirs = harness.text_log_likelihoods(model, tokenizer, texts)
    assert [-record["bits"] * math.log(2) for record in ours] == pytest.approx(theirs, rel=1e-5)
    sizes = [len(text.encode()) for text in texts]
    assert [record["bytes"] for record in ours] == sizes
    whole = sum(record["bits"] for record in ours) / sum(sizes)
    assert whole == pytest.approx(harness.bits_per_byte(theirs, sizes), rel=1e-5)
