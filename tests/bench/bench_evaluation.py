"""Time scoring by this project, by lm-evaluation-harness, and as LLM-Adapters does it, alternating in one process.

    python -m tests.bench.bench_evaluation --items 16 --rounds 5

Likelihood: the same items of the eight suites by this project and by the harness, same model, float32; the answers must
be the same. The harness is given the fixed batch size of ``--harness-batch``, its items sorted by length as it does by
itself. Tokenising and asking (templates) count for both.

Generation: the same prompts by protocol ``llm-adapters``, and the published way: one prompt at a time, beam search with
4 beams, 32 tokens. A model that was not trained says no answer word, so nothing stops early: ``--adapter`` gives a
trained run's.

Absolute figures depend on the machine; the ratios are what to read. On a machine that does other things too, CPU time
with OMP_NUM_THREADS=1 is the sounder one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subspace.adapter_file import load_adapter
from subspace.evaluate import EvaluateConfig, Sample, evaluate, find_tasks, take_sample
from subspace.generation import MAX_NEW_TOKENS, AnswerWords, Generation
from subspace.model import ModelConfig, open_model, open_tokenizer
from subspace.results import read_items
from tests.harness import harness_model, harness_predictions, harness_scores, harness_task

Side = Callable[[], Any]


def main() -> None:
    """Run the rounds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--adapter", type=Path, help="folder of trained adapters: runs/NAME/adapter")
    parser.add_argument("--tasks", default="all")
    parser.add_argument("--items", type=int, default=4, help="items of each task")
    parser.add_argument("--answer-tasks", default="piqa,arc_easy")
    parser.add_argument("--answers", type=int, default=5, help="items of each of the answer tasks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--harness-batch", type=int, default=8)
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    config = ModelConfig(path=options.model, dtype=options.dtype)
    model, tokenizer = open_model(config), open_tokenizer(config)
    if options.adapter:
        load_adapter(model, options.adapter)

    def samples(tasks: str, limit: int) -> list[Sample]:
        return [take_sample(task, "test", limit) for task in find_tasks(tasks)]

    asked, answered = samples(options.tasks, options.items), samples(options.answer_tasks, options.answers)
    alternate(
        "likelihood",
        sum(len(sample.items) for sample in asked),
        {
            "subspace": lambda: score(model, tokenizer, "likelihood", options.tasks, options.items),
            "lm-eval": lambda: by_harness(model, tokenizer, asked, options.harness_batch),
        },
        options.rounds,
    )
    alternate(
        "generation",
        sum(len(sample.items) for sample in answered),
        {
            "subspace": lambda: score(model, tokenizer, "llm-adapters", options.answer_tasks, options.answers),
            "LLM-Adapters": lambda: by_beams(model, tokenizer, answered),
        },
        options.rounds,
    )


def alternate(title: str, num_items: int, sides: Mapping[str, Side], rounds: int) -> None:
    """Run both sides in turn; print their medians, how many times faster the first is, and how many answers agree."""
    clocks = (time.perf_counter, time.process_time)
    seconds: dict[str, list[list[float]]] = {name: [] for name in sides}
    answers: dict[str, Any] = {}
    for _ in range(rounds):
        for name, side in sides.items():
            began = [clock() for clock in clocks]
            with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
                answers[name] = side()
            seconds[name].append([clock() - start for clock, start in zip(clocks, began, strict=True)])

    print(f"\n{title}: {num_items} items, medians of {rounds} rounds, {torch.get_num_threads()} threads")
    medians = {name: [statistics.median(column) for column in zip(*s, strict=True)] for name, s in seconds.items()}
    for name, (wall, cpu) in medians.items():
        several = ", ".join(f"{elapsed:.1f}" for elapsed, _ in seconds[name])
        print(f"  {name:<14} {wall:6.1f} s ({several}), {cpu:6.1f} s of CPU, {num_items / wall:5.2f} items/s")
    (wall, cpu), (their_wall, their_cpu) = medians.values()
    one, other = answers.values()
    agree = sum(a == b for a, b in zip(one, other, strict=True))
    print(f"  {their_wall / wall:.2f} times as fast, by CPU time {their_cpu / cpu:.2f}; {agree} of {num_items} agree")


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: str, tasks: str, limit: int
) -> list[Any]:
    """Score by this project, files and all; return the answers."""
    config = EvaluateConfig(protocol=protocol, tasks=tasks, limit=limit)
    with tempfile.TemporaryDirectory() as folder:
        results = evaluate(model, tokenizer, config, Path(folder))
        return [record["prediction"] for result in results if result.items for record in read_items(result.items)]


def by_harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: list[Sample], batch_size: int
) -> list[Any]:
    """Score by lm-evaluation-harness; return the answers."""
    lm, answers = harness_model(model, tokenizer, batch_size), []
    for sample in samples:
        task = harness_task(sample.task.name, sample.items)
        answers += harness_predictions(task, harness_scores(lm, task))
    return answers


def by_beams(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: list[Sample]) -> list[Any]:
    """Answer one prompt at a time with four beams; return the answers."""
    answers = []
    generate: Any = model.generate
    for sample in samples:
        scorer = Generation(model, tokenizer, sample.task, sample.items, "alpaca-indented")
        for prompt in scorer.prompts:
            ids = torch.tensor([prompt], device=model.device)
            settings = {"num_beams": 4, "max_new_tokens": MAX_NEW_TOKENS, "pad_token_id": tokenizer.pad_token_id}
            written = generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
            text = tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)
            answers.append(AnswerWords(sample.task.answer_words).first(str(text)))
    return answers


if __name__ == "__main__":
    main()
