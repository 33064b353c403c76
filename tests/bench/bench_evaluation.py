"""Time scoring by this project, by lm-evaluation-harness, and as LLM-Adapters does it, alternating in one process.

    python -m tests.bench.bench_evaluation --items 16 --rounds 5
    python -m tests.bench.bench_evaluation --only generation --dtype bfloat16 --adapter runs/NAME/adapter

Likelihood: the same items of the eight suites by this project and by the harness, same model, float32; the answers must
be the same. The harness gets all its requests in one call, as its own command gives them, sorts them by length, and
finds its batch size by itself (``--harness-batch auto``). On few items that search takes much of its time, so its time
is given without the search too; ``--harness-batch 8`` leaves it out. Tokenising and asking (templates) count for both.

Generation: the same prompts by protocol ``llm-adapters``, and the published way: one prompt at a time, beam search with
4 beams, 32 tokens, the adapter in HF PEFT. The published evaluators run in 16 bits, hence ``--dtype bfloat16``.
``--adapter`` gives a trained run's LoRA, as ``subspace train launch/recipes/commonsense-smollm2.yaml`` leaves it.
Without it the base is asked, which knows no form of answer, so that neither side stops early.

Together: as many adapters as ``--together`` says on one load of their base, against a load for each.

Mixed: the same adapters in the same batches, against one after the other; both on one load.

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
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subspace.adapters.inject import adapters, inject, remove_adapters, trained_parameters
from subspace.adapters.serialization import load_adapter, save_adapter
from subspace.common.host_memory import manage_malloc, set_malloc_trim
from subspace.data.samples import Sample, find_tasks, take_sample
from subspace.evaluation.answer_extraction import AnswerWords
from subspace.evaluation.config import EvaluateConfig, EvaluationSubject
from subspace.evaluation.evaluate import evaluate
from subspace.evaluation.protocols.llm_adapters import LLMAdapters
from subspace.evaluation.results import read_items
from subspace.evaluation.subjects import evaluate_subjects
from subspace.models.config import ModelConfig
from subspace.models.loading import open_model, open_tokenizer
from tests.helpers.lm_eval_harness import harness_model, harness_predictions, harness_scores, harness_task

Side = Callable[[], Any]

ASIDE: list[float] = []
"""CPU seconds that the other side spent on what can be left out of the comparison."""


def main() -> None:
    """Run the rounds and print the figures."""
    manage_malloc()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("likelihood", "generation", "together", "mixed")
    parser.add_argument("--only", nargs="+", default=parts, choices=parts, help="some of the comparisons")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--adapter", type=Path, help="folder of trained adapters: runs/NAME/adapter")
    parser.add_argument("--tasks", default="all")
    parser.add_argument("--items", type=int, default=4, help="items of each task")
    parser.add_argument("--answer-tasks", default="all")
    parser.add_argument("--answers", type=int, default=16, help="items of each of the answer tasks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--harness-batch", default="auto", help="a number, or auto")
    parser.add_argument("--harness-most", type=int, default=64, help="where the harness's search begins: its own is 64")
    parser.add_argument("--together", type=int, default=4, help="adapters on one load")
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    config = ModelConfig(path=options.model, dtype=options.dtype)
    model, tokenizer = open_model(config), open_tokenizer(config)
    if options.adapter:
        load_adapter(model, options.adapter)

    def samples(tasks: str, limit: int) -> list[Sample]:
        return [take_sample(task, "test", limit) for task in find_tasks(tasks)]

    asked, answered = samples(options.tasks, options.items), samples(options.answer_tasks, options.answers)
    num_asked, num_answered = (sum(len(sample.items) for sample in several) for several in (asked, answered))
    if "likelihood" in options.only:
        sides: dict[str, Side] = {
            "subspace": lambda: score(model, tokenizer, "likelihood", options.tasks, options.items),
            "lm-eval": lambda: by_harness(model, tokenizer, asked, options.harness_batch, options.harness_most),
        }
        alternate("likelihood", num_asked, sides, options.rounds, without="search for a batch size")
    if "generation" in options.only:
        published = in_peft(config, options.adapter) if options.adapter else model
        sides = {
            "subspace": lambda: score(model, tokenizer, "llm-adapters", options.answer_tasks, options.answers),
            "LLM-Adapters": lambda: by_beams(published, tokenizer, answered),
        }
        alternate("generation", num_answered, sides, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        evaluate_config = EvaluateConfig(tasks=options.tasks, limit=options.items, overwrite=True)
        if {"together", "mixed"} & {*options.only}:
            subjects = made_subjects(config, evaluate_config, options.together, Path(folder))
        if "together" in options.only:
            sides = {
                "one load": lambda: together([subjects]),
                "a load each": lambda: together([[subject] for subject in subjects]),
            }
            alternate("together", num_asked * options.together, sides, options.rounds)
        if "mixed" in options.only:
            in_one = [replace(subject, evaluate=replace(evaluate_config, batch_adapters=True)) for subject in subjects]
            sides = {"mixed": lambda: together([in_one]), "one by one": lambda: together([subjects])}
            alternate("mixed", num_asked * options.together, sides, options.rounds)


def alternate(title: str, num_items: int, sides: Mapping[str, Side], rounds: int, without: str = "") -> None:
    """Run both sides in turn; print their medians, how many times faster the first is, and how many answers agree.

    ``without`` names what :data:`ASIDE` holds of the second's CPU time.
    """
    clocks = (time.perf_counter, time.process_time)
    seconds: dict[str, list[list[float]]] = {name: [] for name in sides}
    answers: dict[str, Any] = {}
    for _ in range(rounds):
        for name, side in sides.items():
            set_malloc_trim(False)  # for the other side too: loading a model through this project has it returned
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
    if aside := sum(ASIDE) / rounds:
        print(f"  without the {without} ({aside:.1f} s): by CPU time {(their_cpu - aside) / cpu:.2f} times as fast")
    ASIDE.clear()


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: str, tasks: str, limit: int
) -> list[Any]:
    """Score by this project, files and all; return the answers."""
    config = EvaluateConfig(protocol=protocol, tasks=tasks, limit=limit)
    with tempfile.TemporaryDirectory() as folder:
        results = evaluate(model, tokenizer, config, Path(folder))
        return [record["prediction"] for result in results if result.items for record in read_items(result.items)]


def by_harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: list[Sample], batch: str, most: int
) -> list[Any]:
    """Score by lm-evaluation-harness; return the answers."""
    lm = harness_model(model, tokenizer, batch if batch == "auto" else int(batch), most)
    search = lm._detect_batch_size

    def timed(*arguments: Any) -> Any:
        began = time.process_time()
        try:
            return search(*arguments)
        finally:
            ASIDE.append(time.process_time() - began)

    lm._detect_batch_size = timed
    tasks = [harness_task(sample.task.name, sample.items) for sample in samples]
    with contextlib.redirect_stdout(io.StringIO()):  # it says which batch size it found
        scores = iter(harness_scores(lm, *tasks))
    return [answer for task in tasks for answer in harness_predictions(task, list(islice(scores, len(task.eval_docs))))]


def in_peft(config: ModelConfig, adapter: Path) -> Any:
    """Open a model with the LoRA of a folder as HF PEFT runs it."""
    import peft

    opened = open_model(config)
    load_adapter(opened, adapter)
    found = adapters(opened)
    settings: Any = next(iter(found.values())).config
    factors = {site: one.own_tensors() for site, one in found.items()}
    remove_adapters(opened)
    lora = peft.LoraConfig(r=settings.r, lora_alpha=settings.alpha, target_modules=list(found), task_type="CAUSAL_LM")
    adapted: Any = peft.get_peft_model(opened, lora).eval()
    for site, own in factors.items():
        layer = adapted.get_submodule(f"base_model.model.{site}")
        layer.lora_A.default.weight.data.copy_(own["A"])
        layer.lora_B.default.weight.data.copy_(own["B"])
    return adapted


def by_beams(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: list[Sample]) -> list[Any]:
    """Answer one prompt at a time with four beams; return the answers."""
    answers = []
    generate: Any = model.generate
    for sample in samples:
        scorer = LLMAdapters(model, tokenizer, sample.task, sample.items, "alpaca-indented")
        for prompt in scorer.prompts:
            ids = torch.tensor([prompt], device=model.device)
            settings = {
                "num_beams": 4,
                "max_new_tokens": sample.task.max_new_tokens,
                "pad_token_id": tokenizer.pad_token_id,
            }
            written = generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
            text = tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)
            answers.append(AnswerWords(sample.task.answer_words).find(str(text)))
    return answers


def made_subjects(model: ModelConfig, config: EvaluateConfig, count: int, folder: Path) -> list[EvaluationSubject]:
    """Make adapters that differ, as runs leave them."""
    network = open_model(model)
    subjects = []
    for number in range(count):
        inject(network, "lora", {"r": 32}, seed=number)
        with torch.no_grad():
            for parameter in trained_parameters(network).values():
                parameter.add_(0.01 * torch.randn_like(parameter))
        name = folder / str(number)
        save_adapter(network, name / "adapter")
        remove_adapters(network)
        subjects.append(EvaluationSubject(model, config, name, name / "adapter", f"lora {number}"))
    return subjects


def together(groups: list[list[EvaluationSubject]]) -> list[Any]:
    """Score the subjects of each group on one load; return the answers."""
    found = [results for group in groups for results in evaluate_subjects(group)]
    return [record["prediction"] for results in found for r in results if r.items for record in read_items(r.items)]


if __name__ == "__main__":
    main()
