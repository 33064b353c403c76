r"""Retention: what a run has kept of its base, as bits per byte on Wikipedia passages that no training prompt shows.

.. math:: \Delta = \frac1n \sum_j \frac{\log_2 p_{base}(x_j) - \log_2 p_{run}(x_j)}{bytes(x_j)}

The texts are the distinct passages of BoolQ's test split: the commonsense rows ask its questions without them. A text's
probability is lm-evaluation-harness's (0.4.13, ``loglikelihood_rolling`` with ``add_bos_token=False``, which begins a
text once): of all its tokens, the first given the one that begins a text; one longer than the model's window is read in
windows of that size.

Base and runs are measured on one load, by batches of the same rows, so that adapters that do nothing yet differ by
exactly 0. A run's passages, each with the base's bits, are one file, ``evaluation/retention/wikipedia.jsonl``, whose
first line says of what they are and has their checksum. An interrupted measurement goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import TypedDict

from subspace.common.declarations import Amount, Positive, find_fault
from subspace.common.files import write_file
from subspace.common.foreign.text import MOST_RESULT_BYTES, read_bytes
from subspace.common.progress import Progress, no_progress
from subspace.data.samples import Sample, choose, split_items
from subspace.data.tasks import find_task
from subspace.data.tokenization import encode_pairs, tokenizer_fingerprint
from subspace.distributed import watchdog
from subspace.distributed.collectives import broadcast_object, is_main
from subspace.errors import UserError
from subspace.evaluation.batching import token_budget
from subspace.evaluation.choice_scoring import Choices
from subspace.evaluation.config import EvaluateConfig
from subspace.evaluation.evaluate import Job, count_work, score_job, scoring
from subspace.evaluation.records import PassageRecord
from subspace.evaluation.results import digest
from subspace.evaluation.resume import ResumableResults
from subspace.models.context import max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "retention"
SCHEMA = 1


@dataclass(frozen=True)
class Retention:
    """A measured model: bits per byte of each passage, and of the base; ``base`` is None of a base model itself."""

    file: Path
    model: str
    adapter: str
    dtype: str
    subject: str
    fingerprint_fields: Mapping[str, str]
    ids: tuple[str, ...]
    own: tuple[float, ...]
    base: tuple[float, ...] | None

    @property
    def mean(self) -> float:
        """Bits per byte, the mean over passages."""
        return sum(self.own) / len(self.own)


def retention_file(folder: Path) -> Path:
    """Return the path of a run's passages."""
    return folder / "evaluation" / NAME / "wikipedia.jsonl"


def select_passages(limit: int | None) -> Sample:
    """Return the distinct passages of BoolQ's test split, or ``limit`` of them, always the same ones, as items.

    Raises:
        UserError: the task is not prepared.
    """
    task = find_task("boolq")
    found: dict[str, str] = {}
    for item in split_items(task, "test", None):
        found.setdefault(item["context"], item["id"])
    texts, ids = [*found], [*found.values()]
    positions: Sequence[int] = range(len(ids)) if limit is None or limit >= len(ids) else choose(ids, limit)
    items: Any = [{"id": ids[i], "context": texts[i]} for i in positions]
    return Sample(replace(task, name="wikipedia", title="Wikipedia"), items, 0.0, positions)


class PassageScorer:
    """Passages as rows of tokens; a record has the bits of all of a passage's tokens."""

    name = NAME
    metrics: tuple[str, ...] = ()
    writes = False

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> None:
        self.items = sample.items
        self.texts = [item["context"] for item in sample.items]
        size = max_positions(model.config)
        encoded = encode_pairs(tokenizer, [("", text) for text in self.texts])
        self.counts = [len(ids) - start for ids, start in encoded]
        # The windows of a passage are choices of which each is scored; they share nothing.
        self.choices = Choices(model, [list(windows(ids, start, size)) for ids, start in encoded], share=False)
        self.truncated, self.sizes = self.choices.truncated, self.choices.sizes
        self.window = size if max(self.counts) >= size else None

    @property
    def fingerprint_fields(self) -> dict[str, str]:
        """What the bits depend on besides tokenizer and model."""
        window = {"window": str(self.window)} if self.window else {}
        return {"protocol": f"{NAME} 1", "passages": str(len(self.texts)), "texts": digest(self.texts), **window}

    def shared_prefix(self, model: Any) -> AbstractContextManager[None]:
        """Prefill nothing."""
        return nullcontext()

    def score(self, model: Any, batch: Sequence[int]) -> list[Any]:
        """Return the records of the passages with these numbers, by one forward pass."""
        records = []
        for number, scores in zip(batch, self.choices.scores(model, batch), strict=True):
            size, bits = len(self.texts[number].encode()), -math.fsum(scores) / math.log(2)
            identifier = self.items[number]["id"]
            records.append(
                PassageRecord(id=identifier, bytes=size, tokens=self.counts[number], bits=bits, base_bits=None)
            )
        return records


def windows(ids: list[int], start: int, size: int) -> Iterator[tuple[list[int], int]]:
    """Yield the rows of a text, each as ids and the number of those that are only read.

    Every token after the first ``start`` is predicted once, the first of a later row given one token at least. Of a row
    all ids but the last are the model's input, at most ``size``.
    """
    at = start
    while at < len(ids):
        end = min(len(ids), size + 1 if at == start else at + size)
        first = max(0, end - size - 1)
        yield ids[first:end], at - first
        at = end


class RetentionMeter:
    """The measurement of a base and of its runs, one after the other, on one load."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig, progress: Progress = no_progress
    ) -> None:
        sample = select_passages(config.retention_limit)
        scorer = PassageScorer(model, tokenizer, sample)
        fields = {**scorer.fingerprint_fields, "tokenizer": tokenizer_fingerprint(tokenizer)[:12]}
        self.job = Job(sample, cast(Any, scorer), fields)
        self.config, self.progress = config, progress
        self.base: list[float] | None = None  # the base's bits, once they are known
        self.budget = config.batch_tokens  # of all batches, so that base and runs have the same
        self.unfinished: ResumableResults | None = None

    def is_measured(self, folder: Path, subject: str) -> bool:
        """Return True, on every rank, if a folder has the passages of a subject."""
        found = None
        if is_main() and not self.config.overwrite:
            try:
                found = read_retention(folder)
            except UserError:  # damaged: it is measured again
                found = None
            if found and (found.subject, found.fingerprint_fields) != (subject, self.job.fingerprint_fields):
                found = None
        return bool(broadcast_object(found is not None))

    def measure_base(self, model: Any, folder: Path, subject: str) -> None:
        """Measure a base, a model without adapters, for its runs. An interrupted one is resumed from ``folder``."""
        file = retention_file(folder).with_name("base.jsonl")
        self.unfinished = ResumableResults(
            file, self._key(subject), self.budget, token_budget(model, writes=False), self._fits
        )
        with self.unfinished as partial:
            self.base = [record["bits"] for record in self._score(model, "the base", partial)]

    def measure(self, model: Any, folder: Path, subject: str, *, model_name: str, adapter: str) -> None:
        """Measure a subject and write its passages; one with adapters needs the base's bits."""
        assert not adapter or self.base is not None
        file = retention_file(folder)
        default = token_budget(model, writes=False)
        with ResumableResults(file, self._key(subject), self.budget, default, self._fits) as partial:
            records = self._score(model, adapter or model_name, partial)
            if not adapter:
                self.base = [record["bits"] for record in records]
            elif self.base:
                records = [cast(PassageRecord, {**r, "base_bits": b}) for r, b in zip(records, self.base, strict=True)]
            if is_main():
                what = {"model": model_name, "adapter": adapter, "dtype": str(model.dtype).removeprefix("torch.")}
                of = {"subject": subject, "ingredients": dict(self.job.fingerprint_fields)}
                write_retention(folder, {**what, **of}, records)
            partial.remove()

    def close(self) -> None:
        """Remove what only an interrupted measurement needs."""
        if self.unfinished:
            self.unfinished.remove()

    def _fits(self, number: int, record: Mapping[str, Any]) -> bool:
        """Return True if a record from a file is one of the passage of this number."""
        items, bits = self.job.sample.items, record.get("bits")
        mine = 0 <= number < len(items) and record.get("id") == items[number]["id"]
        return mine and isinstance(bits, float) and math.isfinite(bits)

    def _key(self, subject: str) -> str:
        return digest([subject, dict(self.job.fingerprint_fields)])

    def _score(self, model: Any, what: str, partial: ResumableResults) -> list[PassageRecord]:
        self.budget = partial.budget
        scorer, done = self.job.scorer, 0
        total = count_work(scorer, range(len(scorer.sizes)))
        title = f"measure retention of {what}"
        with scoring(model), (self.progress if is_main() else no_progress)(title, total, "tokens") as at:

            def advance(tokens: int, detail: str) -> None:
                nonlocal done
                done += tokens
                watchdog.beat(title)
                at(min(done, total), detail)

            return cast(list[PassageRecord], score_job(model, self.job, partial, advance))


# The file.


class _Head(TypedDict):
    """The first line of the file."""

    retention: str
    schema: int
    model: str
    adapter: str
    dtype: str
    subject: str
    ingredients: dict[str, str]
    passages: Positive
    sha256: str


class _Passage(TypedDict):
    id: str
    bytes: Positive
    tokens: Positive
    bits: Amount
    base_bits: Amount | None


def write_retention(folder: Path, about: Mapping[str, Any], records: Sequence[PassageRecord]) -> None:
    """Write a run's passages with what they are of: model, adapter, dtype, subject and ingredients."""
    lines = "".join(f"{json.dumps(record, ensure_ascii=False, allow_nan=False)}\n" for record in records)
    sealed = {"passages": len(records), "sha256": hashlib.sha256(lines.encode()).hexdigest()}
    head = {"retention": "wikipedia", "schema": SCHEMA, **about, **sealed}
    write_file(retention_file(folder), f"{json.dumps(head, ensure_ascii=False)}\n{lines}")


def read_retention(folder: Path) -> Retention | None:
    """Return what was measured in a run's folder; None if nothing was.

    Raises:
        UserError: the file is damaged, or of a newer version.
    """
    file = retention_file(folder)
    again = f"Measure it again: subspace evaluate {folder} evaluate.retention=wikipedia"
    try:
        content = read_bytes(file, most=MOST_RESULT_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}. {again}") from None
    first, _, rest = content.partition(b"\n")
    try:
        head, passages = json.loads(first), [json.loads(line) for line in rest.splitlines()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}. {again}") from None
    if isinstance(head, dict) and isinstance(head.get("schema"), int) and head["schema"] > SCHEMA:
        raise UserError(f"{file} is of a newer version of subspace than this one. Read it with that version")
    fault = find_fault(head, _Head) or find_fault(passages, list[_Passage])
    if not fault and (head["passages"], head["sha256"]) != (len(passages), hashlib.sha256(rest).hexdigest()):
        fault = ("passages",), "they are not those that it was written with"
    if not fault and len({passage["base_bits"] is None for passage in passages}) > 1:
        fault = ("passages",), "some have the base's bits, some have not"
    if fault:
        raise UserError(f"{file} is damaged: {'.'.join(map(str, fault[0])) or 'the whole'}: {fault[1]}. {again}")
    has_base = passages[0]["base_bits"] is not None
    return Retention(
        file=file,
        model=head["model"],
        adapter=head["adapter"],
        dtype=head["dtype"],
        subject=head["subject"],
        fingerprint_fields=head["ingredients"],
        ids=tuple(passage["id"] for passage in passages),
        own=tuple(passage["bits"] / passage["bytes"] for passage in passages),
        base=tuple(passage["base_bits"] / passage["bytes"] for passage in passages) if has_base else None,
    )
