"""Score a model, as it is or with adapters, on the suites; by any number of processes.

Each protocol knows how to lay out a task's items and how to score a batch of them; everything else is here. Batches are
cut from the items sorted by length, the same on every process, and dealt out to them. So a score does not depend on the
number of processes, each makes equally many forward passes (which ZeRO-3 needs), and each returns all results.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from subspace import declarations, encoding
from subspace.answer_word import AnswerWord
from subspace.checksum import weights_checksum
from subspace.custom import custom_task, local_items
from subspace.declarations import Item, Task
from subspace.distributed import is_main, rank, share_object
from subspace.errors import UserError, nearest
from subspace.generation import Generation
from subspace.host_memory import keep_what_is_freed
from subspace.likelihood import Likelihood, draw_examples
from subspace.partial import Partial
from subspace.prepare import task_items
from subspace.progress import Progress, silent
from subspace.published import DEFECTS, PUBLISHED, Published
from subspace.results import TaskResult, accuracy, digest, find_result, items_file, write_items, write_results
from subspace.settings import Settings, setting
from subspace.workload import Halving, plan_batches, token_budget, turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROTOCOLS = (Likelihood.name, Generation.name, AnswerWord.name, Published.name)


class Scorer(Protocol):
    """A protocol with the items of a task, ready to be scored. ``truncated`` is how many lost their beginning."""

    name: str
    metrics: tuple[str, ...]
    writes: bool  # tokens, one by one
    sizes: list[tuple[int, int]]
    truncated: int

    @property
    def ingredients(self) -> dict[str, str]:
        """What the protocol's numbers depend on besides task, items and tokenizer."""

    def score(self, model: Any, batch: Sequence[int]) -> list[dict[str, Any]]:
        """Score the items of these numbers together; return the record of each."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """What to score, and how."""

    protocol: str | list[str] = setting(
        "likelihood", f"how an answer is got out of the model, one or several of {', '.join(PROTOCOLS)}"
    )
    tasks: str | list[str] = setting("all", "which tasks: all, a suite's name, their names, or YAML files of your own")
    limit: int | None = setting(None, "items of each task, always the same ones; none is all", min=1)
    split: str = setting("test", "which split; test is the one that the literature reports")
    examples: int = setting(0, "likelihood: answered items of the train split before each question (few-shot)", min=0)
    by_bytes: bool = setting(False, "likelihood: also acc_bytes, where a choice's score is divided by its bytes")
    data: str | None = setting(None, "folder of the published test files (gsm8k/test.json), for tasks read from there")
    prompt: str = setting("alpaca-indented", "protocols that ask: the text round the instruction, as data.prompt")
    defects: str | list[str] = setting(
        ",".join(PUBLISHED), f"llm-adapters-published: which of its defects are on, of {', '.join(DEFECTS)}; or none"
    )
    published_batch: int = setting(1, "llm-adapters-published: its batch size, felt with no_attention_mask", min=1)
    batch_tokens: int | None = setting(
        None, "tokens of a batch, padding included; none is what suits the device and the protocol", min=1
    )
    seen: str = setting(
        "refuse", "a suite with more than 1 % of its items in a run's training text", choices=("refuse", "score")
    )
    mixed: bool = setting(
        False, "several subjects of one base: score in the same batches those whose adapters act on linear layers alone"
    )
    engine: str | None = setting(
        None, "a base too large for one device: DeepSpeed's JSON of ZeRO-3, as ds_configs/zero3.json, to spread it by"
    )
    again: bool = setting(False, "score anew what is scored already")

    def __post_init__(self) -> None:
        super().__post_init__()
        for word, kind, known in [
            *((name, "protocol", PROTOCOLS) for name in self.protocols),
            *((name, "defects", DEFECTS) for name in self.defect_names),
        ]:
            if word not in known:
                raise UserError(f"EvaluateConfig.{kind} is {word!r}. {nearest(word, known)}")

    @property
    def protocols(self) -> list[str]:
        """The protocols, one or several."""
        return list(dict.fromkeys(_words(self.protocol)))

    @property
    def defect_names(self) -> list[str]:
        """The defects that are on."""
        return [name for name in _words(self.defects) if name not in ("", "none")]


def _words(value: str | Sequence[str]) -> list[str]:
    return [word.strip() for word in (value.split(",") if isinstance(value, str) else value)]


@dataclass(frozen=True)
class Sample:
    """The items of a task that are scored. ``majority`` is the share of the split's most frequent answer.

    ``positions`` is where each item stands in its split.
    """

    task: Task
    items: list[Item]
    majority: float
    positions: Sequence[int] = ()


@dataclass(frozen=True)
class Job:
    """One task by one protocol, laid out. It serves every model that has this tokenizer and this configuration."""

    sample: Sample
    scorer: Scorer
    ingredients: Mapping[str, str]


def lay_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig, progress: Progress = silent
) -> list[Job]:
    """Lay every task out by every protocol. What is missing is told here, before anything is scored."""
    samples = [take_sample(task, config.split, config.limit, config.data) for task in find_tasks(config.tasks)]
    wanted = [(protocol, sample) for protocol in config.protocols for sample in samples]
    encoded_by = encoding.fingerprint(tokenizer)[:12]
    jobs = []
    with (progress if is_main() else silent)("encode the items", len(wanted), "tasks") as at:
        for protocol, sample in wanted:
            scorer = _scorer(protocol, model, tokenizer, sample, config)
            jobs.append(Job(sample, scorer, _ingredients(scorer, sample, encoded_by)))
            at(len(jobs))
    return jobs


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluateConfig,
    folder: Path | None = None,
    *,
    model_name: str = "",
    adapter: str = "",
    progress: Progress = silent,
    jobs: Sequence[Job] | None = None,
    checksum: str = "",
) -> list[TaskResult]:
    """Score a model on the tasks. All ranks call it, and each returns all results.

    Args:
        model: with or without adapters; under ZeRO-3 the engine's ``module``.
        tokenizer: the model's.
        config: what to score, and how.
        folder: the run's folder, where items and ``results.json`` are written as each task is done; or none. What it
            holds of this very model, whole or in part, is not scored again.
        model_name: what the results call the base model.
        adapter: what the results call the adapters; nothing for the base model.
        progress: what is told how far it is, on the first process.
        jobs: what ``lay_out`` made of this configuration for a model of the same base.
        checksum: of base and adapters, where the model holds those of several subjects.
    """
    jobs = lay_out(model, tokenizer, config, progress) if jobs is None else jobs
    subject = checksum or (weights_checksum(model) if folder else "")
    total, done = sum(_work(job.scorer, range(len(job.sample.items))) for job in jobs), 0
    results = []
    title = f"score {adapter or model_name or 'the model'} by {', '.join(config.protocols)}"
    with _scoring(model), (progress if is_main() else silent)(title, total, "tokens") as at:

        def tell(tokens: int, detail: str) -> None:
            nonlocal done
            done += tokens
            at(min(done, total), detail)

        for job in jobs:
            file = items_file(folder, job.scorer.name, job.sample.task.name) if folder else None
            result = None if config.again else _scored_before(folder, job, subject)
            if result:
                tell(_work(job.scorer, range(len(job.sample.items))), f"{job.sample.task.title}, scored before")
                results.append(result)
                continue
            began = time.perf_counter()
            default = token_budget(model, writes=job.scorer.writes)
            with Partial(file, digest([subject, dict(job.ingredients)]), config.batch_tokens, default) as partial:
                records = _score(model, job, partial, tell)
                result = TaskResult(
                    model=model_name,
                    adapter=adapter,
                    dtype=str(model.dtype).removeprefix("torch."),
                    protocol=job.scorer.name,
                    task=job.sample.task.name,
                    metrics={m: accuracy([record["correct"][m] for record in records]) for m in job.scorer.metrics},
                    n=len(records),
                    majority=job.sample.majority,
                    truncated=job.scorer.truncated,
                    seconds=time.perf_counter() - began,
                    ingredients=job.ingredients,
                    items=file,
                    subject=subject,
                )
                if folder and file and is_main():
                    write_items(file, records)
                    write_results(folder, [result])
                partial.remove()
            results.append(result)
    return results


def _scored_before(folder: Path | None, job: Job, subject: str) -> TaskResult | None:
    """Return what a folder holds of this task, this protocol and this very model, on every rank."""
    found = None
    if folder and is_main():
        found = find_result(folder, job.scorer.name, job.sample.task.name)
        if found and (found.subject, found.fingerprint) != (subject, digest(dict(job.ingredients))):
            found = None
    return share_object(found) if folder else None


def _score(model: nn.Module, job: Job, partial: Partial, tell: Callable[[int, str], None]) -> list[dict[str, Any]]:
    """Return the record of every item, on every rank; each scores its share of the batches that are left."""
    scorer, began, scored = job.scorer, time.perf_counter(), 0
    halving = Halving(model, lambda batch: scorer.score(model, batch), scorer.sizes)
    plan = plan_batches(scorer.sizes, partial.budget)
    left = [batch for batch in plan if not partial.records.keys() >= set(batch)]
    before = set(range(len(scorer.sizes))).difference(*left)
    tell(_work(scorer, before), f"{job.sample.task.title}, {len(before)} items scored before")
    with scorer.beginning_read(model) if isinstance(scorer, Generation) and left else nullcontext():
        for turn in turns(left):
            mine = turn[rank()]
            partial.add(mine, halving.score(mine))
            scored += len({number for batch in turn for number in batch})
            speed = scored / (time.perf_counter() - began)
            tell(sum(_work(scorer, batch) for batch in turn), f"{job.sample.task.title}, {speed:.1f} items/s")
    partial.gather()
    return [partial.records[number] for number in range(len(scorer.sizes))]


def _work(scorer: Scorer, numbers: Iterable[int]) -> int:
    """Return the tokens of items, without padding."""
    return sum(rows * length for rows, length in (scorer.sizes[number] for number in numbers))


def find_tasks(names: str | Sequence[str]) -> list[Task]:
    """Return the tasks that a setting names, in the order of the literature's tables, one's own last."""
    found: list[Task] = []
    for name in _words(names):
        if name.endswith((".yaml", ".yml")):
            found.append(custom_task(Path(name)))
        else:
            suite = declarations.tasks("commonsense" if name == "all" else name)
            found += suite.values() or [declarations.task(name)]
    return sorted({task.name: task for task in found}.values(), key=lambda task: task.position)


def take_sample(task: Task, split: str, limit: int | None, data: str | None = None) -> Sample:
    """Return the items of a split, or ``limit`` of them: those with the smallest hashes of their ids, in their order.

    Hashes, because the first items of a split need not be like the others; and so a smaller sample is part of a larger
    one, on every machine, for every protocol.
    """
    items = split_items(task, split, data)
    by_answer = "label" if task.extraction == "first-word" else "choices"
    answers = Counter(str(item[by_answer]) for item in items)
    positions: Sequence[int] = range(len(items))
    if limit is not None and limit < len(items):
        hashes = [hashlib.sha256(item["id"].encode()).digest() for item in items]
        positions = sorted(sorted(positions, key=hashes.__getitem__)[:limit])
    return Sample(task, [items[i] for i in positions], max(answers.values()) / answers.total(), positions)


def split_items(task: Task, split: str, data: str | None) -> list[Item]:
    """Return the items of a split, prepared ones or a file's."""
    return local_items(task, split, data) or list(task_items(task.name, split))


def _scorer(
    protocol: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    config: EvaluateConfig,
) -> Scorer:
    given = model, tokenizer, sample.task, sample.items
    if protocol == Generation.name:
        return Generation(*given, config.prompt)
    if protocol == AnswerWord.name:
        return AnswerWord(*given, config.prompt)
    if protocol == Published.name:
        return Published(*given, config.defect_names, batch=config.published_batch)
    examples: list[list[Item]] = []
    if config.examples:
        pool = split_items(sample.task, "train", config.data)
        own = sample.task.splits[config.split].official == "test"
        examples = draw_examples(pool, sample.items, sample.positions, config.examples, own_test_split=own)
    return Likelihood(*given, examples=examples, by_bytes=config.by_bytes)


def _ingredients(scorer: Scorer, sample: Sample, tokenizer: str) -> dict[str, str]:
    return {
        **scorer.ingredients,
        "task": sample.task.name,
        "task version": sample.task.version,
        "items": digest([{field: item[field] for field in declarations.ITEM_FIELDS} for item in sample.items]),
        "metrics": ", ".join(scorer.metrics),
        "tokenizer": tokenizer,
    }


@contextmanager
def _scoring(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, without gradients, and afterwards back into the mode it was in.

    What a pass frees the next one wants again. Loading the model had it returned to the system, which clears each page
    that it gives back: a fifth to a third of the time, for a tenth less memory.
    """
    training = model.training
    keep_what_is_freed()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
