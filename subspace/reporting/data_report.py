"""``subspace data``: statistics of a run's training text and test items, before the run.

For the training text: rows, repeats, truncated rows, answer frequencies. For each task: items, the majority baseline
(always giving the most frequent answer), truncated items, repeats, and items that occur in the training text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from typing_extensions import TypedDict

from subspace.common.foreign.templates import render
from subspace.common.foreign.text import read_json
from subspace.common.progress import Progress, no_progress
from subspace.common.tables import Grid
from subspace.data.chat.limits import NO_LIMITS, ModelLimits
from subspace.data.config import DataConfig
from subspace.data.contamination import (
    KINDS,
    NGRAM,
    Matcher,
    Text,
    count_duplicates,
    definitions,
    question_text,
    text_keys,
)
from subspace.data.dataset import Data, open_data
from subspace.data.items import Item
from subspace.data.prepare import task_items
from subspace.data.rows import Row
from subspace.data.samples import find_tasks, select_sample
from subspace.data.tasks import MixturePart, Task, find_mixture, find_task, prompt_template
from subspace.data.tokenization import encode_pairs, encode_rows
from subspace.evaluation.config import EvaluateConfig
from subspace.models.prepare import model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 2000
MOST_CHOICES = 8  # with more different answers, they count as free text


@dataclass(frozen=True)
class Part:
    """Statistics of a part of the training text. ``cut`` rows are longer than ``data.max_length`` and are truncated.

    ``repeats`` have the same prompt and answer as an earlier row; ``alike`` is the number of distinct rows whose
    question and choices equal another's, compared by letters and digits, in any order.
    """

    name: str
    rows: int
    repeats: int
    alike: int
    cut: int
    longest: int
    answers: dict[str, int]


@dataclass(frozen=True)
class Suite:
    """Statistics of a task's items. For each kind of match, ``found`` maps item ids to the first matching training row.

    ``cut`` items, with their answer, are longer than ``data.max_length``; ``beyond`` items exceed the model's window,
    either in the likelihood protocol or as a prompt.
    """

    task: str
    title: str
    items: int
    majority: float
    answers: dict[str, int]
    repeats: int
    cut: int
    beyond: int
    longest: int
    too_short: int
    found: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Report:
    """Statistics of a mixture and of the tasks; ``example`` is one row as it is trained on."""

    mixture: str
    max_length: int
    ngram: int
    parts: tuple[Part, ...]
    suites: tuple[Suite, ...]
    notices: tuple[str, ...]
    example: str = ""

    @property
    def grids(self) -> list[Grid]:
        """The report as two tables."""
        rows = [
            (p.name, *_counts(p.rows, p.repeats, p.alike, p.cut, p.longest), _balance(p.answers)) for p in self.parts
        ]
        total = [sum(getattr(p, name) for p in self.parts) for name in ("rows", "repeats", "alike", "cut")]
        rows.append(("all", *_counts(*total, max(p.longest for p in self.parts)), ""))
        train = Grid(
            f"{self.mixture}: training text",
            ("part", "rows", "repeats", "alike", f"over {self.max_length}", "longest", "answers in %"),
            tuple(rows),
            (
                "repeats: rows whose prompt and answer occurred before; alike: of the others, those with the "
                "question and choices of another, normalised",
                f"over {self.max_length}: rows that are longer, in tokens, and lose the beginning of their prompt; of "
                "one's own none is cut",
                *self.notices,
            ),
            last=1,
        )
        head = ("task", "items", "majority", "answers in %", "repeats", f"over {self.max_length}", "over window")
        grams = f"{self.ngram}-gram"
        suites = Grid(
            f"test items, and how many of them are in the training text of {self.mixture}",
            (*head, *KINDS[:3], grams, "too short"),
            tuple(
                (
                    s.title,
                    f"{s.items:,}",
                    f"{100 * s.majority:.1f}",
                    _balance(s.answers),
                    *_counts(s.repeats, s.cut, s.beyond),
                    *(_share(len(s.found[kind]), s.items) for kind in KINDS),
                    f"{s.too_short:,}",
                )
                for s in self.suites
            ),
            (
                "majority: the score of always giving the most frequent answer, in %",
                f"over {self.max_length}: items that training would cut, with their answer; over window: items that "
                "exceed the model's window",
                *(f"{grams if name == 'n-gram' else name}: {text}" for name, text in definitions(self.ngram).items()),
            ),
        )
        return [train, suites] if self.suites else [train]

    @property
    def items(self) -> Grid:
        """The matched items, each with the first training row that it matches, by the strictest kind of match."""
        rows = []
        for suite in self.suites:
            listed: set[str] = set()
            for kind in KINDS:
                rows += [
                    (suite.title, item, kind, row) for item, row in suite.found[kind].items() if item not in listed
                ]
                listed |= suite.found[kind].keys()
        return Grid("test items in the training text", ("task", "item", "match", "training row"), tuple(rows), left=4)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**asdict(self), "definitions": definitions(self.ngram)}


def build_report(
    data: DataConfig,
    evaluate: EvaluateConfig,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    ngram: int = NGRAM,
    compare: bool = True,
    limits: ModelLimits = NO_LIMITS,
    progress: Progress = no_progress,
) -> Report:
    """Return statistics of the training text and the test items of a run with these settings.

    Args:
        data: the training data settings.
        evaluate: the evaluation settings, for the tasks.
        model: name or path of the model.
        tokenizer: the model's.
        seed: the run's seed, which decides which rows are held out or drawn.
        ngram: number of consecutive words that make a match.
        compare: look for the tasks' items in the training text.
        limits: what the model can take.
        progress: progress display.
    """
    opened = open_data(data, tokenizer, seed, progress, limits=limits)
    template = prompt_template(data.prompt_name)
    mixture_parts = {part.name: part for part in find_mixture(data.mixture).parts}
    own = any(part.data for part in mixture_parts.values())
    window = _window(model)
    tasks = find_tasks(evaluate.selection.tasks) if compare else []
    samples, texts = [], []
    with progress("read the test items", len(tasks), "tasks") as at:
        for task in tasks:
            samples.append(select_sample(task, evaluate.selection))
            texts.append(list(map(question_text(task), samples[-1].items)))
            at(len(samples), task.title)
    prompts = [Text(s.task.instruction(item)) for s in samples for item in s.items] if own else None
    matcher = Matcher([text for task_texts in texts for text in task_texts], ngram, prompts)
    parts = list(_match_parts(matcher, opened, data, mixture_parts, progress))

    suites, begin = [], 0
    with progress("count the test items", len(tasks), "tasks") as at:
        for sample, task_texts in zip(samples, texts, strict=True):
            task, ids, end = sample.task, [item["id"] for item in sample.items], begin + len(sample.items)
            trained, read = _lengths(task, sample.items, template, tokenizer)
            suites.append(
                Suite(
                    task=task.name,
                    title=task.title,
                    items=len(ids),
                    majority=sample.majority,
                    answers=_answers(task, sample.items),
                    repeats=count_duplicates(text_keys(text).normalised for text in task_texts),
                    cut=sum(length > opened.train.max_length for length in trained),
                    beyond=sum(length > window for length in read) if window else 0,
                    longest=max(trained),
                    too_short=sum(begin <= n < end for n in matcher.too_short),
                    found={
                        kind: {ids[n - begin]: row for n, row in sorted(rows.items()) if begin <= n < end}
                        for kind, rows in matcher.found.items()
                    },
                )
            )
            begin = end
            at(len(suites), task.title)
    notices = [*opened.notices, *([opened.example] if own else [])]
    if own and tasks:
        notices.append("rows of one's own are compared by their instructions and turns: 'question' is as 'normalised'")
    return Report(
        opened.report["mixture"],
        opened.train.max_length,
        ngram,
        tuple(parts),
        tuple(suites),
        tuple(notices),
        opened.example,
    )


def _match_parts(
    matcher: Matcher, opened: Data, data: DataConfig, mixture: dict[str, MixturePart], progress: Progress
) -> Iterator[Part]:
    """Search the training text, each row once, for the matcher's items; yield the statistics of each part."""
    order, row_keys = opened.train.order, opened.train.keys
    lengths = opened.train.uncut_lengths
    ends = [*list(opened.parts.values())[1:], len(opened.train.table.keys)]
    done = 0
    with progress("read the training text", len(np.unique(order)), "rows") as at:
        for (name, begin), end in zip(opened.parts.items(), ends, strict=True):
            in_part = (order >= begin) & (order < end)
            numbers, times = np.unique(order[in_part] - begin, return_counts=True)
            part = mixture[name]
            chunks = _task_texts(part, numbers, times) if part.task else _own_texts(part, data)
            exact, alike = set[int](), set[int]()
            answers: Counter[str] = Counter()
            for texts, places, chunk_answers in chunks:
                for keys in matcher.read(texts, places):
                    exact.add(keys.exact)
                    alike.add(keys.normalised)
                answers.update(chunk_answers)
                done += len(texts)
                at(done, name)
            distinct = len(np.unique(row_keys[in_part]))
            yield Part(
                name=name,
                rows=int(in_part.sum()),
                repeats=int(in_part.sum()) - distinct,
                alike=(distinct if part.task else len(exact)) - len(alike),
                cut=int((lengths[in_part] > opened.train.max_length).sum()),
                longest=int(lengths[in_part].max(initial=0)),
                answers=dict(sorted(answers.items())),
            )


Texts = Iterator[tuple[list[Text], list[str], Counter[str]]]
"""Texts of rows in chunks, with their places, and how often each answer occurs."""


def _task_texts(part: MixturePart, numbers: npt.NDArray[np.int64], times: npt.NDArray[np.int64]) -> Texts:
    """Yield the texts of these rows of a task, each as often as it says."""
    task, rows = find_task(part.task), task_items(part.task, part.split)
    text = question_text(task)
    for first in range(0, len(numbers), CHUNK_ROWS):
        chunk = numbers[first : first + CHUNK_ROWS]
        items: list[Item] = rows.select(chunk).to_list()
        answers: Counter[str] = Counter()
        for item, count in zip(items, times[first : first + CHUNK_ROWS], strict=True):
            answers[_answer(task, item)] += int(count)
        yield [text(item) for item in items], [f"{part.name} row {n}" for n in chunk], answers


def _own_texts(part: MixturePart, data: DataConfig) -> Texts:
    """Yield the texts of all rows of a user's own data: what is asked in each, in one text or several."""
    for row in part.source(data.columns).rows():
        if isinstance(row, Row):
            asked = [str(turn.get("content", "")) for turn in row.messages if turn["role"] == "user"]
            if row.instruction is not None:
                asked = [row.instruction["instruction"] + row.instruction["input"]]
            said = [str(turn.get("content", "")) for turn in row.messages if turn["role"] == "assistant"]
            texts = [Text(text) for text in ([row.text] if row.text is not None else asked)]
            yield texts, [row.where] * len(texts), Counter(said[-1:])


def _rows(task: Task, items: Sequence[Item], template: str) -> list[tuple[str, str]]:
    """Return the prompts and answers of items, as in training."""
    return [(render(template, {"instruction": task.instruction(i), "input": ""}), task.output(i)) for i in items]


def _lengths(
    task: Task, items: Sequence[Item], template: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Return the number of tokens of each item: in training, with answer and end token; and its maximum in scoring."""
    encoded = encode_rows(tokenizer, _rows(task, items, template))
    read = [start for _, start in encoded]
    if task.extraction == "first-word":
        requests = [task.likelihood.requests(item) for item in items]
        choices = iter(encode_pairs(tokenizer, [pair for pairs in requests for pair in pairs]))
        read = [max(n, *(len(next(choices)[0]) - 1 for _ in pairs)) for n, pairs in zip(read, requests, strict=True)]
    return [len(ids) + 1 for ids, _ in encoded], read


class _Shape(TypedDict, total=False):
    max_position_embeddings: int | None


def _window(model: str) -> int | None:
    """Return a model's maximum number of input tokens, from its ``config.json``; None if that does not state it."""
    window: int | None = read_json(model_folder(model) / "config.json", _Shape).get("max_position_embeddings")
    return window


def _answer(task: Task, item: Item) -> str:
    """Return the number of the right choice, from 1; or the answer, if there are no choices."""
    return str(item["label"] + 1) if task.extraction == "first-word" else str(item["choices"][0])


def _answers(task: Task, items: Sequence[Item]) -> dict[str, int]:
    return dict(sorted(Counter(_answer(task, item) for item in items).items()))


def _balance(answers: dict[str, int]) -> str:
    """Return the frequency of each answer in per cent; for free text, the number of different answers."""
    total = sum(answers.values())
    if len(answers) > MOST_CHOICES:
        return f"{len(answers):,} different"
    return " / ".join(f"{100 * count / total:.0f}" for count in answers.values())


def _counts(*numbers: int) -> tuple[str, ...]:
    return tuple(f"{number:,}" for number in numbers)


def _share(count: int, of: int) -> str:
    return f"{count:,} ({100 * count / of:.1f} %)" if count else "0"
